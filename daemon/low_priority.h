// Threads whose work can wait: decoding goes first.
#pragma once

#include <ctime>

#include <cstdint>

namespace quarry {

// The calling thread yields to decode when cores are short: its nice value is 10 more than it was.
void RunBehindDecoding();

// While one lives, no thread offers its processor: somebody waits for what they do.
class Hurry {
 public:
  Hurry();
  ~Hurry();
  Hurry(const Hurry&) = delete;
  Hurry& operator=(const Hurry&) = delete;
};

// While it lives, the calling thread offers its processor every kStretchUs that it works. Threads
// that spin for a token offer theirs too, and one who computes for long takes it until the system's
// next tick, 4 ms at 250 Hz, whatever it is nice; an attend that comes right then would wait.
// Offers are made by a signal's handler, which interrupts no system call that can be restarted; so
// a thread that computes without locks is what this is for. One at a time on a thread.
class OfferingProcessor {
 public:
  static constexpr int64_t kStretchUs = 250;

  // Where the system has no timer left, nothing is offered.
  OfferingProcessor();
  ~OfferingProcessor();
  OfferingProcessor(const OfferingProcessor&) = delete;
  OfferingProcessor& operator=(const OfferingProcessor&) = delete;

  // By the calling thread since it began.
  static uint64_t Offers();

 private:
  timer_t timer_{};
  bool has_timer_ = false;
};

}  // namespace quarry

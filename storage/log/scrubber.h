// A thread that looks through the log at a bounded rate.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace quarry {

// What was looked at by one call.
struct ScrubStep {
  uint64_t bytes = 0;      // read
  bool ends_pass = false;  // all of the log has been
};

struct ScrubberOptions {
  uint64_t bytes_per_s = 0;
  // Between two passes: a log with little in it is not read all the time.
  absl::Duration between_passes = absl::Minutes(1);
  // Instead of a wait that the end interrupts; for tests.
  std::function<void(absl::Duration)> wait;
};

// Calls `next` until it ends, which waits for one call at most. The thread, `quarry-scrub`, has the
// lowest priority for processors and the disk.
class Scrubber {
 public:
  Scrubber(std::function<ScrubStep()> next, const ScrubberOptions& options);
  ~Scrubber();

 private:
  void Run();
  bool Ends();

  const std::function<ScrubStep()> next_;
  const ScrubberOptions options_;
  absl::Mutex mutex_;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last
};

}  // namespace quarry

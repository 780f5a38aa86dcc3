// Waits of tests for what has to come.
#pragma once

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace quarry::testing {

// How long what has to come may take: it bounds hangs, and claims nothing about speed. Sanitizers
// slow all threads of a test, so what would take a second may take a minute.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr absl::Duration kPatience = absl::Seconds(600);
#else
inline constexpr absl::Duration kPatience = absl::Seconds(60);
#endif

// Polls every millisecond until the condition holds; false if it does not at the deadline. From any
// thread; the condition is called on this one.
template <typename F>
bool Eventually(F condition, absl::Duration deadline = kPatience) {
  const absl::Time end = absl::Now() + deadline;
  while (!condition()) {
    if (absl::Now() > end) return condition();
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
}

}  // namespace quarry::testing

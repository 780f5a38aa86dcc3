// Time since an arbitrary start, as requests and counters measure it.
#pragma once

#include <chrono>
#include <cstdint>

namespace quarry {

inline uint64_t SteadyNowNs() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}

}  // namespace quarry

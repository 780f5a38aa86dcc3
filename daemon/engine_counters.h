// What the engine counts, for EngineStats.
#pragma once

#include <atomic>
#include <cstdint>

#include "daemon/latency_percentiles.h"

namespace quarry {

// Relaxed atomics; thread-safe.
struct EngineCounters {
  std::atomic<uint64_t> attend_rows{0}, attend_failures{0}, attend_bytes{0}, attend_tokens{0};
  std::atomic<uint64_t> append_tokens{0}, append_bytes{0};
  std::atomic<uint64_t> reused_tokens{0}, opened{0};
  std::atomic<uint64_t> shifted_tokens{0}, attend_shifted_rows{0};
  std::atomic<uint64_t> publish_failures{0}, read_digest_failures{0}, refused_batches{0};
  LatencyPercentiles attend, append, open;
};

}  // namespace quarry

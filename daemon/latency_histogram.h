// LatencyHistogram: durations in fixed buckets, for Prometheus and Admin.Statistics.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "absl/time/time.h"

namespace quarry {

// Bounds double from 1 us to about 8.4 s. Thread-safe, relaxed atomics, no lock.
class LatencyHistogram {
 public:
  static constexpr int kBounds = 24;
  static constexpr double BoundSeconds(int i) { return 1e-6 * static_cast<double>(1u << i); }

  struct Snapshot {
    std::array<uint64_t, kBounds + 1> cumulative{};  // the last counts everything
    double sum_seconds = 0;
    uint64_t count() const { return cumulative[kBounds]; }
    // Upper bound of the bucket that holds the share q in (0, 1]; 0 when empty.
    double Quantile(double q) const {
      if (count() == 0) return 0;
      for (int i = 0; i < kBounds; ++i) {
        if (static_cast<double>(cumulative[i]) >= q * static_cast<double>(count())) {
          return BoundSeconds(i);
        }
      }
      return BoundSeconds(kBounds - 1);
    }
  };

  void Record(absl::Duration duration) {
    const double seconds = absl::ToDoubleSeconds(duration);
    int bucket = 0;
    while (bucket < kBounds && seconds > BoundSeconds(bucket)) ++bucket;
    buckets_[bucket].fetch_add(1, std::memory_order_relaxed);
    sum_ns_.fetch_add(static_cast<uint64_t>(absl::ToInt64Nanoseconds(duration)),
                      std::memory_order_relaxed);
  }

  Snapshot Read() const {
    Snapshot out;
    uint64_t total = 0;
    for (int i = 0; i <= kBounds; ++i) {
      total += buckets_[i].load(std::memory_order_relaxed);
      out.cumulative[i] = total;
    }
    out.sum_seconds = static_cast<double>(sum_ns_.load(std::memory_order_relaxed)) * 1e-9;
    return out;
  }

 private:
  std::array<std::atomic<uint64_t>, kBounds + 1> buckets_{};
  std::atomic<uint64_t> sum_ns_{0};
};

}  // namespace quarry

// A latency histogram that costs two relaxed additions per observation.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>

namespace quarry {

// Buckets end at 1 µs * 2^i, from 1 µs to about 33 s, and one above. Any thread.
class LatencyHistogram {
 public:
  static constexpr int kBounds = 26;
  static constexpr double BoundSeconds(int i) { return 1e-6 * static_cast<double>(1ull << i); }

  void Observe(uint64_t nanoseconds) {
    buckets_[BucketOf(nanoseconds)].fetch_add(1, std::memory_order_relaxed);
    sum_ns_.fetch_add(nanoseconds, std::memory_order_relaxed);
  }

  struct Snapshot {
    std::array<uint64_t, kBounds + 1> cumulative{};  // the last one is the count
    double sum_seconds = 0;
    uint64_t count() const { return cumulative[kBounds]; }
    // The upper bound of the bucket that holds the quantile; 0 when nothing was observed.
    double Quantile(double q) const {
      if (count() == 0) return 0;
      const auto rank = static_cast<uint64_t>(q * static_cast<double>(count() - 1)) + 1;
      for (int i = 0; i < kBounds; ++i) {
        if (cumulative[i] >= rank) return BoundSeconds(i);
      }
      return BoundSeconds(kBounds);
    }
  };

  Snapshot Read() const {
    Snapshot out;
    uint64_t total = 0;
    for (int i = 0; i <= kBounds; ++i) {
      total += buckets_[i].load(std::memory_order_relaxed);
      out.cumulative[i] = total;
    }
    out.sum_seconds = 1e-9 * static_cast<double>(sum_ns_.load(std::memory_order_relaxed));
    return out;
  }

 private:
  // The smallest i with nanoseconds <= 1000 * 2^i.
  static int BucketOf(uint64_t nanoseconds) {
    const uint64_t microseconds = (nanoseconds + 999) / 1000;
    if (microseconds <= 1) return 0;
    const int i = std::bit_width(microseconds - 1);
    return i < kBounds ? i : kBounds;
  }

  std::array<std::atomic<uint64_t>, kBounds + 1> buckets_{};
  std::atomic<uint64_t> sum_ns_{0};
};

}  // namespace quarry

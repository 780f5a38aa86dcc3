// LatencyPercentiles: percentiles of durations, without a lock.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>

namespace quarry {

// Buckets of 8 per power of two of nanoseconds: a percentile is at most 12.5% above the truth.
// Thread-safe; Add costs two relaxed atomic adds.
class LatencyPercentiles {
 public:
  void Add(std::chrono::nanoseconds duration) {
    const auto ns = static_cast<uint64_t>(std::max<int64_t>(0, duration.count()));
    buckets_[BucketOf(ns)].fetch_add(1, std::memory_order_relaxed);
    uint64_t seen = max_ns_.load(std::memory_order_relaxed);
    while (seen < ns && !max_ns_.compare_exchange_weak(seen, ns, std::memory_order_relaxed)) {
    }
  }

  uint64_t Count() const {
    uint64_t count = 0;
    for (const auto& bucket : buckets_) count += bucket.load(std::memory_order_relaxed);
    return count;
  }
  uint64_t MaxNs() const { return max_ns_.load(std::memory_order_relaxed); }

  // Upper edge of the bucket that holds the share `p` in (0, 1]; 0 when empty.
  uint64_t PercentileNs(double p) const {
    const uint64_t count = Count();
    if (count == 0) return 0;
    const auto wanted = static_cast<uint64_t>(p * static_cast<double>(count - 1)) + 1;
    uint64_t seen = 0;
    for (uint32_t i = 0; i < kBuckets; ++i) {
      seen += buckets_[i].load(std::memory_order_relaxed);
      if (seen >= wanted) return std::min(UpperEdge(i), MaxNs());
    }
    return MaxNs();
  }

 private:
  static constexpr uint32_t kSubBits = 3;
  static constexpr uint32_t kBuckets = (64 - kSubBits + 1) << kSubBits;

  static uint32_t BucketOf(uint64_t ns) {
    if (ns < (1u << kSubBits)) return static_cast<uint32_t>(ns);
    const uint32_t shift = std::bit_width(ns) - 1 - kSubBits;
    return ((shift + 1) << kSubBits) +
           static_cast<uint32_t>((ns >> shift) & ((1u << kSubBits) - 1));
  }
  static uint64_t UpperEdge(uint32_t bucket) {
    if (bucket < (1u << kSubBits)) return bucket;
    const uint32_t shift = (bucket >> kSubBits) - 1;
    const uint64_t sub = bucket & ((1u << kSubBits) - 1);
    return (((1ull << kSubBits) + sub + 1) << shift) - 1;
  }

  std::array<std::atomic<uint64_t>, kBuckets> buckets_{};
  std::atomic<uint64_t> max_ns_{0};
};

}  // namespace quarry

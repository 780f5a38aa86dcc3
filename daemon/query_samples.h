// QuerySamples: queries of one sequence, kept so that indexes can be fitted to them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "daemon/drift_watch.h"
#include "proto/types.h"

namespace quarry {

// The memory of all sequences' samples. Thread-safe.
class SampleMemory {
 public:
  explicit SampleMemory(uint64_t max_bytes) : max_bytes_(max_bytes) {}
  // False: there is no room.
  bool Take(uint64_t bytes) {
    if (used_.fetch_add(bytes, std::memory_order_relaxed) + bytes <= max_bytes_) return true;
    GiveBack(bytes);
    return false;
  }
  void GiveBack(uint64_t bytes) { used_.fetch_sub(bytes, std::memory_order_relaxed); }
  uint64_t used() const { return used_.load(std::memory_order_relaxed); }

 private:
  const uint64_t max_bytes_;
  std::atomic<uint64_t> used_{0};
};

// Of each layer and KV head, the queries of its group at a bounded number of positions: the first
// ones, then an even choice of all that came. Where indexes that were fitted to them turn out not
// to fit live queries, new ones take the places of the old. Some heads are asked seldom or never,
// such as those of layers whose windows hold all: once another has had more queries than are kept,
// who has had less than half of its number is waited for no longer. Kept as bf16; where memory has
// no room for more, those that are kept give way to later ones all the same. Thread-safe.
class QuerySamples {
 public:
  // capacity: positions of each layer and KV head, at least 1.
  QuerySamples(const KvShape& shape, uint32_t capacity, std::shared_ptr<SampleMemory> memory);
  ~QuerySamples();
  QuerySamples(const QuerySamples&) = delete;
  QuerySamples& operator=(const QuerySamples&) = delete;

  // q: [kv_heads * group][head_dim] fp32 of one position. True if as many positions are kept now as
  // are worth another look at indexes that were fitted to fewer: 32, 64, 128, ... of the first of
  // these heads; when others are waited for no longer; and when they are renewed.
  bool Add(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads, const float* q);
  // The same if nobody else is at it, and else nothing: for those who must not wait.
  bool TryAdd(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads, const float* q);

  // Takes note of an audited answer. True if indexes do not fit any more: from here on, what comes
  // is counted and chosen as if nothing had come before, and takes the places of what did. When it
  // is at least half of what is kept, of each head that does not lag, they are renewed.
  bool NoteFit(uint32_t layer, uint32_t kv_head, IndexFit fit);
  // Which renewal was the last, 0: none yet. They are numbered in the order of time, whoever's
  // samples they are of, for contexts with samples of their own may share runs.
  uint64_t renewal() const { return renewal_.load(std::memory_order_acquire); }

  // Positions kept of the layer's KV head that has fewest, of those that do not lag, if any does
  // not.
  uint32_t LeastKept(uint32_t layer) const;
  // [positions * group][head_dim] fp32, multiplied by 1 / sqrt(head_dim) as scores are.
  std::vector<float> Scaled(uint32_t layer, uint32_t kv_head) const;

 private:
  struct Head {
    std::vector<uint16_t> q;  // bf16 [positions][group][head_dim]
    uint32_t seen = 0;        // since indexes were found not to fit
  };
  size_t floats() const { return size_t{shape_.group()} * shape_.head_dim; }
  uint32_t Kept(const Head& head) const { return static_cast<uint32_t>(head.q.size() / floats()); }
  uint32_t Renewed() const { return (capacity_ + 1) / 2; }
  // No sooner than more have come than are kept: a prefill brings its samples layer by layer.
  bool Lags(const Head& head) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return most_seen_ > capacity_ && head.seen < most_seen_ - head.seen;
  }
  bool IsRenewed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // By one position, for which the caller has the queries; false if there is no room.
  bool Grow(Head* head) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool AddLocked(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads, const float* q)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const KvShape shape_;
  const uint32_t capacity_;
  const std::shared_ptr<SampleMemory> memory_;
  mutable absl::Mutex mutex_;  // held for one position's, or one head's, copy
  std::vector<Head> heads_ ABSL_GUARDED_BY(mutex_);  // [layer][kv_head]
  uint32_t most_seen_ ABSL_GUARDED_BY(mutex_) = 0;   // of the heads
  DriftWatch drift_ ABSL_GUARDED_BY(mutex_);
  bool renewing_ ABSL_GUARDED_BY(mutex_) = false;
  std::atomic<uint64_t> renewal_{0};
};

}  // namespace quarry

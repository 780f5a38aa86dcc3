// RunIndexes: the indexes of one run, which come while it is searched.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "cpu_index/key_index.h"
#include "proto/types.h"

namespace quarry {

// Holds no block: it outlives the run's contexts in the registry, and serves the next context with
// the same tokens. Thread-safe; its lock is held for the copy of a pointer only.
class RunIndexes {
 public:
  explicit RunIndexes(const KvShape& shape)
      : kv_heads_(shape.kv_heads), heads_(size_t{shape.layers} * shape.kv_heads) {}

  // Null: none yet, the run is scanned. Whoever searches an index keeps it, so that another may take
  // its place at any time.
  std::shared_ptr<const KeyIndex> Get(uint32_t layer, uint32_t kv_head) const {
    absl::ReaderMutexLock lock(&mutex_);
    return heads_[Head(layer, kv_head)];
  }
  void Set(uint32_t layer, uint32_t kv_head, std::shared_ptr<const KeyIndex> index) {
    absl::MutexLock lock(&mutex_);
    heads_[Head(layer, kv_head)].swap(index);  // the old one ends outside the lock
  }

  bool empty() const;

  // What indexes were learned from.
  struct Learning {
    uint32_t samples = 0;  // positions whose queries were known
    uint32_t tokens = 0;   // of the runs that were learned from together
    uint64_t renewal = 0;  // QuerySamples::renewal, of these samples
    // It is worth learning again: several times more is known now, or samples were renewed since.
    bool OutdatedBy(const Learning& now) const;
  };

  // Whether all heads are to be indexed now, if that much can be learned from: for the first time,
  // or again since what was learned is outdated. The caller who is told so is the one who does it,
  // until End.
  enum class Due { kNo, kFirst, kAgain };
  Due Begin(const Learning& now);
  // learned: what was learned from; none if it was given up, as if Begin had not been called.
  void End(std::optional<Learning> learned);
  // None: never indexed.
  std::optional<Learning> learned() const {
    absl::ReaderMutexLock lock(&mutex_);
    return learned_;
  }

 private:
  size_t Head(uint32_t layer, uint32_t kv_head) const {
    return size_t{layer} * kv_heads_ + kv_head;
  }

  const uint32_t kv_heads_;
  mutable absl::Mutex mutex_;
  std::vector<std::shared_ptr<const KeyIndex>> heads_ ABSL_GUARDED_BY(mutex_);
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<Learning> learned_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry

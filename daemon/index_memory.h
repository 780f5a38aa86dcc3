// IndexMemory: what the indexes of runs take, and its bound.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "cpu_index/index_choice.h"

namespace quarry {

// Held by shared_ptr: an index may outlive whoever made it. Thread-safe.
class IndexMemory : public std::enable_shared_from_this<IndexMemory> {
 public:
  explicit IndexMemory(uint64_t max_bytes) : max_bytes_(max_bytes) {}

  // Takes the index over. Its room is given back when its last owner lets it go, that of what it
  // shares when the last of those that share it is let go. ResourceExhausted, and `made` as it was:
  // there is no room.
  absl::StatusOr<std::shared_ptr<const KeyIndex>> Keep(MadeIndex* made);
  // Of its own, with what it is the first to share.
  uint64_t BytesOf(const MadeIndex& made) const;
  uint64_t max_bytes() const { return max_bytes_; }
  uint64_t used() const;
  uint64_t free() const { return max_bytes_ - used(); }

 private:
  void Free(uint64_t bytes, const void* shared, uint64_t shared_bytes);
  uint64_t LockedBytesOf(const MadeIndex& made) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);

  const uint64_t max_bytes_;
  mutable absl::Mutex mutex_;
  uint64_t used_ ABSL_GUARDED_BY(mutex_) = 0;
  // How many indexes share it.
  absl::flat_hash_map<const void*, uint64_t> sharers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry

// IndexRoom: the memory that the indexes of runs may take, and what they are expected to take.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "cpu_index/index_choice.h"
#include "daemon/index_memory.h"
#include "daemon/run_registry.h"
#include "proto/types.h"

namespace quarry {

// Where room is wanted, indexes that no context uses give way, the longest unused first.
// Thread-safe.
class IndexRoom {
 public:
  // `runs` outlives it.
  IndexRoom(uint64_t max_bytes, RunRegistry* runs);

  // So many bytes, or all that there is room for.
  uint64_t UpTo(uint64_t bytes) const;
  uint64_t All() const { return UpTo(memory_->max_bytes()); }
  // What an index of one head of the run takes: as much as the one that was refused last, or as
  // those of other runs took, but no more than there could be room for: a guess may be
  // wrong. first: and what it is the first to share. 0: it is not known.
  uint64_t BytesFor(uint32_t layer, const KvShape& shape, const Run& run, bool first) const;
  // IndexMemory::Keep, for one head of the run. ResourceExhausted: the run knows what was refused.
  absl::StatusOr<std::shared_ptr<const KeyIndex>> Keep(uint32_t layer, const KvShape& shape,
                                                       const Run& run, MadeIndex* made);
  uint64_t used() const { return memory_->used(); }

 private:
  // Means, the latest ones counting most; 0: none was made.
  struct Size {
    double per_token = 0;
    double shared = 0;
  };
  void NoteSize(const KvShape& shape, const Run& run, const MadeIndex& made);

  RunRegistry* const runs_;
  const std::shared_ptr<IndexMemory> memory_;
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<uint32_t, Size> sizes_ ABSL_GUARDED_BY(mutex_);  // by head_dim
};

}  // namespace quarry

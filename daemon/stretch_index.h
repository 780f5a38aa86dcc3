// StretchIndex: published blocks by their content, whatever precedes them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "proto/types.h"
#include "storage/block_store.h"

namespace quarry {

// Where a published block was computed.
struct StretchPlace {
  BlockId block;
  BlockId parent;
  uint32_t number = 0;  // of the block in its sequence
};

// Hints that hold no memory of blocks: who finds a place acquires the block from the store, which
// compares the full key. Thread-safe; no attend comes here.
class StretchIndex {
 public:
  // The same content is computed again for each text before it; the latest places are enough.
  static constexpr size_t kMaxPlaces = 4;

  // The store outlives the index.
  explicit StretchIndex(const BlockStore& store) : store_(store) {}

  void Add(std::string_view tenant, const StretchId& content, const StretchPlace& place);
  // The latest first.
  std::vector<StretchPlace> Find(std::string_view tenant, const StretchId& content) const;
  // Forgets blocks that the store no longer has. Add does so too, as often as the index has
  // doubled.
  void Sweep();

 private:
  using Places = std::vector<StretchPlace>;  // the latest last
  using Tenant = absl::flat_hash_map<StretchId, Places>;

  void SweepLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const BlockStore& store_;
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<std::string, Tenant> tenants_ ABSL_GUARDED_BY(mutex_);
  size_t contents_ ABSL_GUARDED_BY(mutex_) = 0;  // of all tenants
  size_t sweep_at_ ABSL_GUARDED_BY(mutex_) = 1024;
};

}  // namespace quarry

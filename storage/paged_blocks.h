// Blocks of the disk that are used where they are, by the pages that are read of them.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "proto/types.h"
#include "storage/block_key.h"
#include "storage/block_store.h"
#include "storage/page_cache.h"
#include "storage/tenant_names.h"

namespace quarry {

// Leases of paged blocks; those who use the same block share its pages. Thread-safe.
class PagedBlocks {
 public:
  // Of a handle: it is one of these, not one of the store of whole blocks.
  static bool Has(BlockHandle block) { return (block.slot & kPagedSlot) != 0; }

  // The block that somebody uses already, or a new one that `open` makes, which may wait for the
  // disk. One lease is the caller's.
  absl::StatusOr<BlockView> Acquire(
      std::string_view tenant, const BlockKey& key,
      absl::FunctionRef<absl::StatusOr<std::unique_ptr<PagedBlock>>()> open);
  void Retain(BlockHandle block);
  void Release(BlockHandle block);
  // Neither purged nor lost by the disk; false of a stale handle.
  bool Stands(BlockHandle block) const;
  // As BlockStore::Purge: who uses them keeps the pages that are held, and gets no others.
  void Purge(std::string_view tenant, const std::optional<NamespaceDigest>& name_space,
             std::span<const BlockId> blocks);

 private:
  static constexpr uint32_t kPagedSlot = 1u << 31;

  struct Entry {
    TenantName tenant = nullptr;
    BlockKey key;
    std::unique_ptr<PagedBlock> block;  // null: the slot is free
    uint32_t leases = 0, generation = 0;
    bool purged = false;
  };

  const Entry* At(BlockHandle block) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  Entry& Leased(BlockHandle block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // One more lease of a usable block of this key, if there is one.
  std::optional<BlockView> Share(TenantName tenant, const BlockKey& key)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static BlockView ViewOf(uint32_t slot, const Entry& entry);

  mutable absl::Mutex mutex_;  // never held while the disk is waited for
  TenantNames tenants_ ABSL_GUARDED_BY(mutex_);
  std::vector<Entry> entries_ ABSL_GUARDED_BY(mutex_);
  std::vector<uint32_t> free_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::pair<TenantName, BlockId>, uint32_t> slots_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry

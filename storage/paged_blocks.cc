#include "storage/paged_blocks.h"

#include <algorithm>
#include <utility>

#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {

BlockView PagedBlocks::ViewOf(uint32_t slot, const Entry& entry) {
  BlockView view;
  view.handle = {slot | kPagedSlot, entry.generation};
  view.id = entry.key.id;
  view.tenant = *entry.tenant;
  view.paged = entry.block.get();
  view.digest = entry.block->digest();
  view.state = BlockState::kPublished;
  return view;
}

const PagedBlocks::Entry* PagedBlocks::At(BlockHandle block) const {
  const uint32_t slot = block.slot & ~kPagedSlot;
  if (!Has(block) || slot >= entries_.size()) return nullptr;
  const Entry& entry = entries_[slot];
  return entry.block != nullptr && entry.generation == block.generation ? &entry : nullptr;
}

PagedBlocks::Entry& PagedBlocks::Leased(BlockHandle block) {
  QUARRY_CHECK(At(block) != nullptr);
  return entries_[block.slot & ~kPagedSlot];
}

std::optional<BlockView> PagedBlocks::Share(TenantName tenant, const BlockKey& key) {
  const auto found = slots_.find({tenant, key.id});
  if (found == slots_.end()) return std::nullopt;
  Entry& entry = entries_[found->second];
  if (entry.purged || entry.block->lost() || entry.key.full_key != key.full_key) {
    return std::nullopt;
  }
  ++entry.leases;
  return ViewOf(found->second, entry);
}

absl::StatusOr<BlockView> PagedBlocks::Acquire(
    std::string_view tenant, const BlockKey& key,
    absl::FunctionRef<absl::StatusOr<std::unique_ptr<PagedBlock>>()> open) {
  {
    absl::MutexLock lock(&mutex_);
    if (auto shared = Share(tenants_.Intern(tenant), key); shared.has_value()) return *shared;
  }
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<PagedBlock> block, open());
  absl::MutexLock lock(&mutex_);
  const TenantName name = tenants_.Intern(tenant);
  // Somebody else may have opened it meanwhile.
  if (auto shared = Share(name, key); shared.has_value()) return *shared;
  if (free_.empty()) {
    free_.push_back(static_cast<uint32_t>(entries_.size()));
    entries_.emplace_back();
  }
  const uint32_t slot = free_.back();
  free_.pop_back();
  Entry& entry = entries_[slot];
  entry = {name, key, std::move(block), 1, entry.generation + 1, false};
  // One that is purged or lost is found no more, whoever still uses it.
  slots_[{name, key.id}] = slot;
  return ViewOf(slot, entry);
}

void PagedBlocks::Retain(BlockHandle block) {
  absl::MutexLock lock(&mutex_);
  ++Leased(block).leases;
}

void PagedBlocks::Release(BlockHandle block) {
  std::unique_ptr<PagedBlock> gone;  // its addresses are given back outside the lock
  absl::MutexLock lock(&mutex_);
  Entry& entry = Leased(block);
  if (--entry.leases > 0) return;
  const uint32_t slot = block.slot & ~kPagedSlot;
  const auto found = slots_.find({entry.tenant, entry.key.id});
  if (found != slots_.end() && found->second == slot) slots_.erase(found);
  gone = std::move(entry.block);
  free_.push_back(slot);
}

bool PagedBlocks::Stands(BlockHandle block) const {
  absl::ReaderMutexLock lock(&mutex_);
  const Entry* const entry = At(block);
  return entry != nullptr && !entry->purged && !entry->block->lost();
}

void PagedBlocks::Purge(std::string_view tenant, const std::optional<NamespaceDigest>& name_space,
                        std::span<const BlockId> blocks) {
  absl::MutexLock lock(&mutex_);
  const TenantName name = tenants_.Find(tenant);
  for (Entry& entry : entries_) {
    if (entry.block == nullptr || entry.tenant != name) continue;
    if (name_space.has_value() && entry.key.name_space != *name_space) continue;
    if (!blocks.empty() && std::find(blocks.begin(), blocks.end(), entry.key.id) == blocks.end()) {
      continue;
    }
    entry.purged = true;
  }
}

}  // namespace quarry

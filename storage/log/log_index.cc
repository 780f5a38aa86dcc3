#include "storage/log/log_index.h"

#include "storage/slot_size.h"

namespace quarry {

uint64_t LoggedPart::disk_bytes() const { return frame_bytes + RoundUp(part_bytes, kSectorBytes); }

void LogIndex::Count(const LoggedBlock& block, int sign) {
  for (const LoggedPart& part : block.parts) {
    live_bytes_[part.place.segment] += static_cast<uint64_t>(sign) * part.disk_bytes();
  }
  bytes_ += static_cast<uint64_t>(sign) * block.bytes;
}

void LogIndex::Add(LoggedBlock block) {
  const Key key(block.tenant, block.id);
  Remove(block.tenant, block.id);
  Count(block, 1);
  blocks_.emplace(key, std::move(block));
}

LoggedBlock* LogIndex::Find(TenantName tenant, const BlockId& id) {
  const auto it = blocks_.find(Key(tenant, id));
  return it == blocks_.end() ? nullptr : &it->second;
}
const LoggedBlock* LogIndex::Find(TenantName tenant, const BlockId& id) const {
  const auto it = blocks_.find(Key(tenant, id));
  return it == blocks_.end() ? nullptr : &it->second;
}

void LogIndex::Remove(TenantName tenant, const BlockId& id) {
  const auto it = blocks_.find(Key(tenant, id));
  if (it == blocks_.end()) return;
  Count(it->second, -1);
  blocks_.erase(it);
}

template <typename Predicate>
uint64_t LogIndex::RemoveIf(Predicate predicate) {
  uint64_t removed = 0;
  for (auto it = blocks_.begin(); it != blocks_.end();) {
    const auto block = it++;  // stays valid: erase moves nothing
    if (!predicate(block->second)) continue;
    Count(block->second, -1);
    blocks_.erase(block);
    ++removed;
  }
  return removed;
}

uint64_t LogIndex::Purge(TenantName tenant, const std::optional<NamespaceDigest>& name_space,
                         std::span<const BlockId> blocks) {
  const auto meant = [&](const LoggedBlock& block) {
    return block.tenant == tenant && (!name_space.has_value() || block.name_space == *name_space);
  };
  if (blocks.empty()) return RemoveIf(meant);
  uint64_t removed = 0;
  for (const BlockId& id : blocks) {
    const LoggedBlock* const block = Find(tenant, id);
    if (block == nullptr || !meant(*block)) continue;
    Remove(tenant, id);
    ++removed;
  }
  return removed;
}

std::vector<const LoggedBlock*> LogIndex::List(TenantName tenant, uint32_t limit) const {
  std::vector<const LoggedBlock*> list;
  for (auto it = blocks_.begin(); it != blocks_.end() && list.size() < limit; ++it) {
    if (it->second.tenant == tenant) list.push_back(&it->second);
  }
  return list;
}

}  // namespace quarry

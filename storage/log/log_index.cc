#include "storage/log/log_index.h"

#include "proto/check.h"
#include "storage/slot_size.h"

namespace quarry {

uint64_t LoggedPart::disk_bytes() const { return frame_bytes + RoundUp(part_bytes, kSectorBytes); }

uint64_t LoggedBlock::disk_bytes() const {
  uint64_t bytes = 0;
  for (const LoggedPart& part : parts) bytes += part.disk_bytes();
  return bytes;
}

void LogIndex::CountHeld(const LoggedBlock& block, int sign) {
  for (const LoggedPart& part : block.parts) {
    const uint64_t bytes = static_cast<uint64_t>(sign) * part.disk_bytes();
    held_bytes_of_[part.place.segment] += bytes;
    held_bytes_ += bytes;
  }
}

void LogIndex::Count(const LoggedBlock& block, int sign) {
  for (const LoggedPart& part : block.parts) {
    live_bytes_[part.place.segment] += static_cast<uint64_t>(sign) * part.disk_bytes();
  }
  bytes_ += static_cast<uint64_t>(sign) * block.bytes;
  if (block.held()) CountHeld(block, sign);
}

void LogIndex::Add(LoggedBlock block) {
  const Key key(block.tenant, block.id);
  Remove(block.tenant, block.id);
  block.origin = block.born;
  Count(block, 1);
  blocks_.emplace(key, std::move(block));
}

void LogIndex::Move(LoggedBlock block) {
  const auto it = blocks_.find(Key(block.tenant, block.id));
  QUARRY_CHECK(it != blocks_.end());
  block.origin = it->second.origin;
  block.holders = it->second.holders;
  Count(it->second, -1);
  Count(block, 1);
  it->second = std::move(block);
}

void LogIndex::Hold(LoggedBlock* block) {
  if (!block->held()) CountHeld(*block, 1);
  ++block->holders;
}

void LogIndex::Release(TenantName tenant, const BlockId& id, uint64_t origin) {
  LoggedBlock* const block = Find(tenant, id);
  if (block == nullptr || block->origin != origin) return;
  if (--block->holders == 0) CountHeld(*block, -1);
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

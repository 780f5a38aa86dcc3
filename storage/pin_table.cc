#include "storage/pin_table.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace quarry {

absl::StatusOr<std::vector<BlockId>> PinTable::Set(
    std::string_view tenant, std::string_view name,
    std::span<const std::pair<BlockId, uint64_t>> blocks, absl::Time expires) {
  Key key{std::string(tenant), std::string(name)};
  auto it = pins_.find(key);
  uint64_t replaced = it == pins_.end() ? 0 : it->second.bytes;
  uint64_t wanted = 0;
  for (const auto& [id, bytes] : blocks) wanted += bytes;
  uint64_t held = bytes_[key.first] - replaced;
  if (wanted > max_bytes_ || held > max_bytes_ - wanted) {
    return absl::ResourceExhaustedError(absl::StrCat("pin ", key.second, " of ", wanted,
                                                     " bytes: tenant ", key.first, " has pinned ",
                                                     held, " of ", max_bytes_));
  }
  std::vector<BlockId> dropped;
  if (it != pins_.end()) dropped = Drop(it);
  Pin& pin = pins_[key];
  pin.blocks.assign(blocks.begin(), blocks.end());
  pin.expires = expires;
  pin.bytes = wanted;
  bytes_[key.first] += wanted;
  for (const auto& [id, bytes] : blocks) by_block_[id].push_back(key);
  return dropped;
}

absl::StatusOr<std::vector<BlockId>> PinTable::Remove(std::string_view tenant,
                                                      std::string_view name) {
  auto it = pins_.find({std::string(tenant), std::string(name)});
  if (it == pins_.end()) {
    return absl::NotFoundError(absl::StrCat("no pin is named ", std::string(name)));
  }
  return Drop(it);
}

std::vector<BlockId> PinTable::Expire(absl::Time now) {
  std::vector<BlockId> dropped;
  for (auto it = pins_.begin(); it != pins_.end();) {
    auto next = std::next(it);
    if (it->second.expires <= now) {
      std::vector<BlockId> ids = Drop(it);
      dropped.insert(dropped.end(), ids.begin(), ids.end());
    }
    it = next;
  }
  return dropped;
}

void PinTable::Forget(const BlockId& id) {
  auto it = by_block_.find(id);
  if (it == by_block_.end()) return;
  for (const Key& key : it->second) {
    Pin& pin = pins_.at(key);
    std::erase_if(pin.blocks, [&](const auto& block) {
      if (block.first != id) return false;
      pin.bytes -= block.second;
      bytes_[key.first] -= block.second;
      return true;
    });
  }
  by_block_.erase(it);
}

std::vector<std::string> PinTable::NamesOf(const BlockId& id) const {
  std::vector<std::string> names;
  auto it = by_block_.find(id);
  if (it == by_block_.end()) return names;
  for (const Key& key : it->second) names.push_back(key.second);
  return names;
}

std::vector<BlockId> PinTable::Drop(std::map<Key, Pin>::iterator it) {
  std::vector<BlockId> ids;
  for (const auto& [id, bytes] : it->second.blocks) {
    ids.push_back(id);
    auto held = by_block_.find(id);
    std::erase(held->second, it->first);
    if (held->second.empty()) by_block_.erase(held);
  }
  bytes_[it->first.first] -= it->second.bytes;
  pins_.erase(it);
  return ids;
}

}  // namespace quarry

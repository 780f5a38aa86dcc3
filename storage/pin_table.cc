#include "storage/pin_table.h"

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {

absl::Status PinTable::CheckQuota(const Key& key, std::span<const SizedBlock> blocks) const {
  auto usage = usage_.find(key.first);
  const Usage held = usage == usage_.end() ? Usage() : usage->second;
  auto replaced = pins_.find(key);
  if (replaced == pins_.end() && held.pins >= limits_.max_pins_per_tenant) {
    return absl::ResourceExhaustedError(absl::StrCat("pin ", key.second, ": tenant ", *key.first,
                                                     " has ", held.pins, " pins of ",
                                                     limits_.max_pins_per_tenant, " allowed"));
  }
  absl::flat_hash_set<BlockId> kept;
  uint64_t more = 0;
  for (const SizedBlock& block : blocks) {
    kept.insert(block.id);
    if (!by_block_.contains(TenantId(key.first, block.id))) more += block.bytes;
  }
  uint64_t less = 0;
  if (replaced != pins_.end()) {
    for (const BlockId& id : replaced->second.blocks) {
      const PinnedBlock& pinned = by_block_.at(TenantId(key.first, id));
      if (!kept.contains(id) && pinned.names.size() == 1) less += pinned.bytes;
    }
  }
  if (held.bytes - less + more > limits_.max_bytes_per_tenant) {
    return absl::ResourceExhaustedError(
        absl::StrCat("pin ", key.second, " of ", blocks.size(), " blocks: ", more,
                     " bytes more wanted, tenant ", *key.first, " has pinned ", held.bytes - less,
                     " of ", limits_.max_bytes_per_tenant));
  }
  return absl::OkStatus();
}

absl::StatusOr<PinTable::Change> PinTable::Set(TenantName tenant, std::string_view name,
                                               std::span<const SizedBlock> blocks,
                                               absl::Time expires) {
  const Key key(tenant, name);
  QUARRY_RETURN_IF_ERROR(CheckQuota(key, blocks));
  Change change;
  absl::flat_hash_set<BlockId> lost;
  if (auto replaced = pins_.find(key); replaced != pins_.end()) {
    Drop(replaced, &change);
    lost.insert(change.lost.begin(), change.lost.end());
  }
  Pin& pin = pins_[key];
  pin.expires = expires;
  by_expiry_.emplace(expires, key);
  Usage& usage = usage_[tenant];
  ++usage.pins;
  for (const SizedBlock& block : blocks) {
    pin.blocks.push_back(block.id);
    PinnedBlock& pinned = by_block_[TenantId(tenant, block.id)];
    if (pinned.names.empty()) {
      pinned.bytes = block.bytes;
      usage.bytes += block.bytes;
      // Lost with the replaced pin and gained again is no change.
      if (lost.erase(block.id) == 0) change.gained.push_back(block.id);
    }
    pinned.names.insert(key.second);
  }
  change.lost.assign(lost.begin(), lost.end());
  return change;
}

absl::StatusOr<PinTable::Change> PinTable::Remove(TenantName tenant, std::string_view name) {
  auto it = pins_.find(Key(tenant, name));
  if (it == pins_.end()) {
    return absl::NotFoundError(absl::StrCat("no pin is named ", std::string(name)));
  }
  Change change;
  Drop(it, &change);
  return change;
}

bool PinTable::RemoveOneExpired(absl::Time now, TenantName* tenant, Change* change) {
  if (by_expiry_.empty() || by_expiry_.begin()->first > now) return false;
  const Key key = by_expiry_.begin()->second;
  *tenant = key.first;
  *change = Change();
  Drop(pins_.find(key), change);
  return true;
}

void PinTable::Forget(TenantName tenant, const BlockId& id) {
  auto it = by_block_.find(TenantId(tenant, id));
  if (it == by_block_.end()) return;
  for (const std::string& name : it->second.names) {
    std::erase(pins_.at(Key(tenant, name)).blocks, id);
  }
  DropUsage(tenant, it->second.bytes, 0);
  by_block_.erase(it);
}

std::vector<std::string> PinTable::NamesOf(TenantName tenant, const BlockId& id) const {
  auto it = by_block_.find(TenantId(tenant, id));
  if (it == by_block_.end()) return {};
  return {it->second.names.begin(), it->second.names.end()};
}

uint64_t PinTable::PinnedBytes(TenantName tenant) const {
  auto it = usage_.find(tenant);
  return it == usage_.end() ? 0 : it->second.bytes;
}

void PinTable::Drop(std::map<Key, Pin>::iterator pin, Change* change) {
  const auto& [tenant, name] = pin->first;
  uint64_t bytes = 0;
  for (const BlockId& id : pin->second.blocks) {
    auto pinned = by_block_.find(TenantId(tenant, id));
    pinned->second.names.erase(name);
    if (!pinned->second.names.empty()) continue;
    bytes += pinned->second.bytes;
    by_block_.erase(pinned);
    change->lost.push_back(id);
  }
  DropUsage(tenant, bytes, 1);
  by_expiry_.erase({pin->second.expires, pin->first});
  pins_.erase(pin);
}

void PinTable::DropUsage(TenantName tenant, uint64_t bytes, uint32_t pins) {
  auto usage = usage_.find(tenant);
  usage->second.bytes -= bytes;
  usage->second.pins -= pins;
  if (usage->second.pins == 0) usage_.erase(usage);
}

}  // namespace quarry

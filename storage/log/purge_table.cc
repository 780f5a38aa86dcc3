#include "storage/log/purge_table.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace quarry {

void PurgeTable::Add(const Key& key, uint64_t born, uint32_t segment) {
  Place& place = purges_[key];
  if (born < place.born) return;
  if (place.born == 0 || place.segment != segment) {
    SegmentPurges& here = by_segment_[segment];
    here.keys.push_back(key);
    if (key.has_block) {
      here.tenants.insert(key.tenant);
      ++here.of_blocks;
    }
  }
  place = {born, segment};
}

void PurgeTable::Add(TenantName tenant, const PurgeFrame& purge, uint32_t segment) {
  Key key{tenant, purge.has_name_space, !purge.blocks.empty(), purge.name_space, {}};
  if (purge.blocks.empty()) return Add(key, purge.born, segment);
  for (const PurgedBlock& block : purge.blocks) {
    key.block = block.id;
    Add(key, block.born, segment);
  }
}

uint64_t PurgeTable::LatestOf(const Key& key) const {
  const auto found = purges_.find(key);
  return found == purges_.end() ? 0 : found->second.born;
}

bool PurgeTable::Covers(const LoggedBlock& block) const {
  Key key{block.tenant, false, false, {}, {}};
  uint64_t latest = LatestOf(key);
  key.has_block = true;
  key.block = block.id;
  latest = std::max(latest, LatestOf(key));
  key.has_name_space = true;
  key.name_space = block.name_space;
  latest = std::max(latest, LatestOf(key));
  key.has_block = false;
  key.block = BlockId();
  latest = std::max(latest, LatestOf(key));
  return block.born < latest;
}

std::vector<PurgeFrame> PurgeTable::Take(uint32_t segment, uint64_t oldest, size_t most) {
  std::vector<PurgeFrame> frames;
  std::map<std::tuple<TenantName, bool, NamespaceDigest>, PurgeFrame> of_blocks;
  const SegmentPurges here = std::exchange(by_segment_[segment], {});
  for (const Key& key : here.keys) {
    const auto found = purges_.find(key);
    if (found == purges_.end() || found->second.segment != segment) continue;
    const uint64_t born = found->second.born;
    purges_.erase(found);
    if (born <= oldest) continue;
    PurgeFrame one{*key.tenant, key.has_name_space, key.name_space, {}, born};
    if (!key.has_block) {
      frames.push_back(std::move(one));
      continue;
    }
    PurgeFrame& many = of_blocks[{key.tenant, key.has_name_space, key.name_space}];
    if (many.blocks.empty()) many = std::move(one);
    many.blocks.push_back({key.block, born});
    many.born = std::max(many.born, born);
    if (many.blocks.size() < most) continue;
    frames.push_back(std::exchange(many, PurgeFrame()));
  }
  for (auto& [whose, frame] : of_blocks) {
    if (!frame.blocks.empty()) frames.push_back(std::move(frame));
  }
  return frames;
}

uint64_t PurgeTable::bytes(uint32_t segment) const {
  const SegmentPurges& here = by_segment_[segment];
  const uint64_t frames = here.keys.size() - here.of_blocks + here.tenants.size();
  return 2 * (frames * kSectorBytes + here.of_blocks * sizeof(PurgedBlock));
}

}  // namespace quarry

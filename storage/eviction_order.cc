#include "storage/eviction_order.h"

#include "proto/check.h"

namespace quarry {
namespace {

// The small queue gives way while it has more than one of so many blocks: S3-FIFO's tenth.
constexpr uint64_t kSmallShare = 10;

}  // namespace

void EvictionOrder::Occupy(TenantName tenant, const ArenaSlot& slot) {
  auto [it, added] = extents_.try_emplace(slot.extent);
  ExtentUse& extent = it->second;
  if (added) {
    extent.slot_class = {tenant, slot.slot_bytes};
    extent.bytes = arena_.ExtentBytes(slot.extent);
    classes_[extent.slot_class].extents.insert(slot.extent);
  }
  ++extent.used;
  CountHeld(&extent, slot.extent, +1);
}

void EvictionOrder::Assign(uint32_t block) {
  const ArenaSlot& slot = blocks_.at(block).memory;
  std::vector<uint32_t>& blocks = extents_.at(slot.extent).blocks;
  if (blocks.size() <= NumberOf(slot)) blocks.resize(NumberOf(slot) + 1, kNoBlock);
  blocks[NumberOf(slot)] = block;
}

void EvictionOrder::Vacate(const ArenaSlot& slot) {
  auto it = extents_.find(slot.extent);
  ExtentUse& extent = it->second;
  if (NumberOf(slot) < extent.blocks.size()) extent.blocks[NumberOf(slot)] = kNoBlock;
  // First the count of slots in use: an extent in which nothing is used is not ours to evict.
  --extent.used;
  CountHeld(&extent, slot.extent, -1);
  if (extent.used > 0) return;
  auto of_class = classes_.find(extent.slot_class);
  of_class->second.extents.erase(slot.extent);
  if (of_class->second.extents.empty()) classes_.erase(of_class);
  extents_.erase(it);
}

// Keeps the set of extents that eviction could empty.
void EvictionOrder::CountHeld(ExtentUse* extent, uint32_t index, int change) {
  const std::pair place(extent->last_used, index);
  ClassUse& of_class = classes_.at(extent->slot_class);
  if (evictable_extents_.erase(place) > 0) {
    evictable_extent_bytes_ -= extent->bytes;
    of_class.evictable_extent_bytes -= extent->bytes;
  }
  extent->held += static_cast<uint32_t>(change);
  if (extent->held > 0 || extent->used == 0) return;
  evictable_extents_.insert(place);
  evictable_extent_bytes_ += extent->bytes;
  of_class.evictable_extent_bytes += extent->bytes;
}

void EvictionOrder::Touch(uint32_t block) {
  BlockRecord& record = blocks_.at(block);
  QUARRY_CHECK(record.held && !record.in_order);
  record.last_used = ++tick_;
  extents_.at(record.memory.extent).last_used = tick_;
}

void EvictionOrder::Admit(uint32_t block) {
  policy_->Admit(&blocks_.at(block), blocks_.published());
  CountQueued(block, +1);
  Touch(block);
}

void EvictionOrder::Use(uint32_t block) {
  policy_->Use(&blocks_.at(block));
  Touch(block);
}

void EvictionOrder::LetGo(uint32_t block) {
  policy_->LetGo(&blocks_.at(block));
  Touch(block);
}

void EvictionOrder::Retire(uint32_t block) { CountQueued(block, -1); }

void EvictionOrder::CountQueued(uint32_t block, int change) {
  const BlockRecord& record = blocks_.at(block);
  ClassUse& of_class = ClassOf(record);
  of_class.published += static_cast<uint64_t>(change);
  if (record.queue == EvictionQueue::kSmall) of_class.small += static_cast<uint64_t>(change);
}

void EvictionOrder::Update(uint32_t block) {
  while (block != kNoBlock) {
    BlockRecord& record = blocks_.at(block);
    ExtentUse& extent = extents_.at(record.memory.extent);
    ClassUse& of_class = classes_.at(extent.slot_class);
    const bool held = record.state != BlockState::kPublished || record.leases > 0 ||
                      record.pinned || record.held_children > 0;
    const bool in_order = !held && record.children == 0;
    if (in_order != record.in_order) {
      record.in_order = in_order;
      const Place place(record.rank, record.last_used, block);
      if (in_order) {
        LeavesOf(&of_class, record.queue).insert(place);
      } else {
        LeavesOf(&of_class, record.queue).erase(place);
      }
    }
    if (held == record.held) return;
    record.held = held;
    CountHeld(&extent, record.memory.extent, held ? +1 : -1);
    if (held) {
      --of_class.evictable_slots;
    } else {
      ++of_class.evictable_slots;
    }
    block = record.parent;
    if (block == kNoBlock) return;
    blocks_.at(block).held_children += held ? 1u : ~0u;
  }
}

uint64_t EvictionOrder::EvictableSlots(const SlotClass& slot_class) const {
  auto it = classes_.find(slot_class);
  return it == classes_.end() ? 0 : it->second.evictable_slots;
}

uint64_t EvictionOrder::EvictableExtentBytesExcept(const SlotClass& slot_class) const {
  auto it = classes_.find(slot_class);
  return evictable_extent_bytes_ -
         (it == classes_.end() ? 0 : it->second.evictable_extent_bytes);
}

std::optional<uint32_t> EvictionOrder::NextLeaf(const SlotClass& slot_class) {
  auto it = classes_.find(slot_class);
  if (it == classes_.end()) return std::nullopt;
  ClassUse& of_class = it->second;
  std::set<Place>& small = LeavesOf(&of_class, EvictionQueue::kSmall);
  std::set<Place>& main = LeavesOf(&of_class, EvictionQueue::kMain);
  while (!small.empty() || !main.empty()) {
    const bool from_small =
        main.empty() || (!small.empty() && of_class.small * kSmallShare > of_class.published);
    std::set<Place>& queue = from_small ? small : main;
    const uint32_t block = std::get<2>(*queue.begin());
    BlockRecord& record = blocks_.at(block);
    CountQueued(block, -1);
    const bool spared = policy_->Spare(&record);
    CountQueued(block, +1);
    if (!spared) return block;
    queue.erase(queue.begin());
    LeavesOf(&of_class, record.queue).emplace(record.rank, record.last_used, block);
  }
  return std::nullopt;
}

std::optional<uint32_t> EvictionOrder::AnyEvictable(const SlotClass& slot_class) const {
  auto it = classes_.find(slot_class);
  if (it == classes_.end() || it->second.evictable_slots == 0) return std::nullopt;
  for (uint32_t extent : it->second.extents) {
    for (uint32_t block : extents_.at(extent).blocks) {
      if (block != kNoBlock && !blocks_.at(block).held) return block;
    }
  }
  return std::nullopt;
}

std::optional<uint32_t> EvictionOrder::ColdestExtentExcept(const SlotClass& slot_class) const {
  for (const auto& [last_used, extent] : evictable_extents_) {
    if (extents_.at(extent).slot_class != slot_class) return extent;
  }
  return std::nullopt;
}

std::vector<uint32_t> EvictionOrder::BlocksIn(uint32_t extent) const {
  std::vector<uint32_t> blocks;
  for (uint32_t block : extents_.at(extent).blocks) {
    if (block != kNoBlock) blocks.push_back(block);
  }
  return blocks;
}

}  // namespace quarry

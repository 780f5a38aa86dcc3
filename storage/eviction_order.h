// Which blocks may be evicted, in which order, and which extents that would empty.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "storage/arena.h"
#include "storage/block_records.h"

namespace quarry {

// Slots of one tenant and size.
struct SlotClass {
  TenantName tenant = nullptr;
  uint64_t slot_bytes = 0;
  friend auto operator<=>(const SlotClass&, const SlotClass&) = default;
};

// A slot in use is held unless it belongs to a published block without leases and pins whose
// descendants are all like that too: exactly what leaf-first eviction can free. Kept up to date
// block by block, so that asking costs no scan. Not thread-safe.
class EvictionOrder {
 public:
  EvictionOrder(BlockRecords& blocks, const Arena& arena) : blocks_(blocks), arena_(arena) {}

  // A slot is in use from now on, and held; Assign says by which block.
  void Occupy(TenantName tenant, const ArenaSlot& slot);
  void Assign(uint32_t block);
  void Vacate(const ArenaSlot& slot);  // must be held

  // The block is used now. It must be held.
  void Touch(uint32_t block);
  // After any change of the block's state, leases, pins or children. O(log n), and once more for
  // each ancestor that becomes held or free by it.
  void Update(uint32_t block);

  // Slots of the class that eviction could free.
  uint64_t EvictableSlots(const SlotClass& slot_class) const;
  // Bytes of extents of other classes in which nothing is held.
  uint64_t EvictableExtentBytesExcept(const SlotClass& slot_class) const;
  // The least recently used block of the class that may go and has no children.
  std::optional<uint32_t> ColdestLeaf(const SlotClass& slot_class) const;
  // An evictable block of the class, leaf or not: for families of mixed sizes, where all leaves
  // are of other classes. Scans the class's extents.
  std::optional<uint32_t> AnyEvictable(const SlotClass& slot_class) const;
  // The extent of another class in which nothing is held, whose latest use is longest ago.
  std::optional<uint32_t> ColdestExtentExcept(const SlotClass& slot_class) const;
  uint64_t LastUseOfExtent(uint32_t extent) const { return extents_.at(extent).last_used; }
  // The blocks in an extent in which nothing is held.
  std::vector<uint32_t> BlocksIn(uint32_t extent) const;

 private:
  struct ExtentUse {
    SlotClass slot_class;
    uint64_t bytes = 0;
    uint64_t last_used = 0;
    uint32_t used = 0, held = 0;
    std::vector<uint32_t> blocks;  // by slot number; kNoBlock: none, or a reserved slot
  };
  struct ClassUse {
    uint64_t evictable_slots = 0;
    uint64_t evictable_extent_bytes = 0;
    std::set<std::pair<uint64_t, uint32_t>> leaves;  // (last use, block)
    std::set<uint32_t> extents;
  };

  void CountHeld(ExtentUse* extent, uint32_t index, int change);
  static uint32_t NumberOf(const ArenaSlot& slot) {
    return static_cast<uint32_t>(slot.offset / slot.slot_bytes);
  }

  BlockRecords& blocks_;
  const Arena& arena_;
  absl::flat_hash_map<uint32_t, ExtentUse> extents_;
  std::map<SlotClass, ClassUse> classes_;
  std::set<std::pair<uint64_t, uint32_t>> evictable_extents_;  // (last use, extent)
  uint64_t evictable_extent_bytes_ = 0;
  uint64_t tick_ = 0;
};

}  // namespace quarry

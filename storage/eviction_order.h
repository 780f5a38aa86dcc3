// Which blocks may be evicted, in which order, and which extents that would empty.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "storage/arena.h"
#include "storage/block_records.h"
#include "storage/eviction_policy.h"

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
  EvictionOrder(BlockRecords& blocks, const Arena& arena, std::unique_ptr<EvictionPolicy> policy)
      : blocks_(blocks), arena_(arena), policy_(std::move(policy)) {}

  // A slot is in use from now on, and held; Assign says by which block.
  void Occupy(TenantName tenant, const ArenaSlot& slot);
  void Assign(uint32_t block);
  void Vacate(const ArenaSlot& slot);  // must be held

  // Of a held block: it was published now and linked to its parent; it was found again; its last
  // lease ends now; and a published one ceases to be.
  void Admit(uint32_t block);
  void Use(uint32_t block);
  void LetGo(uint32_t block);
  void Retire(uint32_t block);
  // It goes for room: to be said before Retire.
  void NoteEvicted(uint32_t block) { policy_->Evicted(blocks_.at(block)); }
  // After any change of the block's state, leases, pins or children. O(log n), and once more for
  // each ancestor that becomes held or free by it.
  void Update(uint32_t block);

  // Slots of the class that eviction could free.
  uint64_t EvictableSlots(const SlotClass& slot_class) const;
  // Bytes of extents of other classes in which nothing is held.
  uint64_t EvictableExtentBytesExcept(const SlotClass& slot_class) const;
  // The block of the class that goes next by the policy, of those that may go and have no
  // children. Others that the policy spares on the way change places: each use of a block pays for
  // one such change, of O(log n).
  std::optional<uint32_t> NextLeaf(const SlotClass& slot_class);
  // An evictable block of the class, leaf or not: for families of mixed sizes, where all leaves
  // are of other classes. Scans the class's extents.
  std::optional<uint32_t> AnyEvictable(const SlotClass& slot_class) const;
  // The extent of another class in which nothing is held, whose latest use is longest ago.
  std::optional<uint32_t> ColdestExtentExcept(const SlotClass& slot_class) const;
  uint64_t GhostHits() const { return policy_->GhostHits(); }
  uint64_t LastUseOfExtent(uint32_t extent) const { return extents_.at(extent).last_used; }
  // The blocks in an extent in which nothing is held.
  std::vector<uint32_t> BlocksIn(uint32_t extent) const;

 private:
  using Place = std::tuple<uint64_t, uint64_t, uint32_t>;  // (rank, last use, block)

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
    uint64_t published = 0, small = 0;      // blocks; those of the small queue
    std::array<std::set<Place>, 2> leaves;  // by EvictionQueue
    std::set<uint32_t> extents;
  };

  void CountHeld(ExtentUse* extent, uint32_t index, int change);
  void Touch(uint32_t block);
  void CountQueued(uint32_t block, int change);
  ClassUse& ClassOf(const BlockRecord& record) {
    return classes_.at(extents_.at(record.memory.extent).slot_class);
  }
  static std::set<Place>& LeavesOf(ClassUse* of_class, EvictionQueue queue) {
    return of_class->leaves[static_cast<size_t>(queue)];
  }
  static uint32_t NumberOf(const ArenaSlot& slot) {
    return static_cast<uint32_t>(slot.offset / slot.slot_bytes);
  }

  BlockRecords& blocks_;
  const Arena& arena_;
  const std::unique_ptr<EvictionPolicy> policy_;
  absl::flat_hash_map<uint32_t, ExtentUse> extents_;
  std::map<SlotClass, ClassUse> classes_;
  std::set<std::pair<uint64_t, uint32_t>> evictable_extents_;  // (last use, extent)
  uint64_t evictable_extent_bytes_ = 0;
  uint64_t tick_ = 0;
};

}  // namespace quarry

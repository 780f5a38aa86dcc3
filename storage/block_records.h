// The block table: one record per block, found by slot and generation or by tenant and id, linked
// to parent and children.
#pragma once

#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "proto/types.h"
#include "storage/arena.h"
#include "storage/block_state.h"
#include "storage/block_store.h"
#include "storage/tenant_names.h"

namespace quarry {

inline constexpr uint32_t kNoBlock = ~0u;

// Most policies have one queue, the main one.
enum class EvictionQueue : uint8_t { kMain, kSmall };

struct BlockRecord {
  BlockState state = BlockState::kEmpty;
  uint32_t generation = 1;
  TenantName tenant = nullptr;
  ArenaSlot memory;
  BlockKey key;
  ByteDigest digest;
  uint32_t leases = 0;
  bool pinned = false;

  // Of published blocks, among published blocks: the parent may come later or go earlier.
  uint32_t parent = kNoBlock;
  uint32_t first_child = kNoBlock;
  uint32_t next_sibling = kNoBlock, previous_sibling = kNoBlock;
  uint32_t children = 0;
  // Blocks before it, as far as they were here when it came.
  uint32_t depth = 0;

  // Kept by EvictionOrder.
  uint32_t held_children = 0;
  bool held = true;
  bool in_order = false;
  uint64_t last_used = 0;

  // Kept by EvictionPolicy: lower ranks go first, of equal ones what was used longest ago.
  uint64_t rank = 0;
  EvictionQueue queue = EvictionQueue::kMain;
  uint8_t uses = 0;
  double load_bytes_per_s = 0;  // of its copy on the disk; 0: there is none
};

// Not thread-safe.
class BlockRecords {
 public:
  // An EMPTY record; one that was used before has its next generation.
  uint32_t New();
  // RETIRING -> FREE; the handle is stale from now on.
  void Free(uint32_t block);
  // CHECKs that the life table allows it.
  void Move(uint32_t block, BlockState to);

  BlockRecord& at(uint32_t block) { return records_[block]; }
  const BlockRecord& at(uint32_t block) const { return records_[block]; }
  uint32_t size() const { return static_cast<uint32_t>(records_.size()); }
  bool IsCurrent(BlockHandle handle) const {
    return handle.slot < records_.size() && records_[handle.slot].generation == handle.generation &&
           records_[handle.slot].state != BlockState::kFree;
  }
  BlockHandle HandleOf(uint32_t block) const { return {block, records_[block].generation}; }

  // Published blocks; kNoBlock if there is none.
  uint32_t Find(TenantName tenant, const BlockId& id) const;
  uint64_t published() const { return by_id_.size(); }

  // Makes a PUBLISHED block findable and links it to its parent and to children that were here
  // before it. Its id must be free.
  void Insert(uint32_t block);
  // Undoes Insert; its children stay, without a parent. Returns the parent it had.
  uint32_t Remove(uint32_t block);

 private:
  using TenantId = std::pair<TenantName, BlockId>;

  void Link(uint32_t block, uint32_t parent, uint32_t* first);
  void Adopt(uint32_t block);

  std::deque<BlockRecord> records_;
  std::vector<uint32_t> free_;
  absl::flat_hash_map<TenantId, uint32_t> by_id_;
  // First of the published children whose parent is not published, by the parent's id.
  absl::flat_hash_map<TenantId, uint32_t> orphans_;
};

}  // namespace quarry

// Reserve, and the evictions that make room for it.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "proto/check.h"
#include "proto/status_macros.h"
#include "storage/ram_block_store.h"
#include "storage/slot_size.h"

namespace quarry {

absl::Status RamBlockStore::Reserve(std::string_view tenant, uint64_t bytes, uint32_t count) {
  if (count == 0) return absl::OkStatus();
  if (bytes == 0) return absl::InvalidArgumentError("blocks of 0 bytes were asked for");
  Reservation wanted;
  wanted.bytes = bytes;
  wanted.count = count;
  {
    absl::MutexLock lock(&mutex_);
    const uint64_t capacity = options_.arena.capacity_bytes;
    if (bytes > capacity || count > capacity / bytes) return Refuse(bytes, count);
    wanted.tenant = tenants_.Intern(tenant);
    wanted.slot_class = {wanted.tenant, SlotBytesFor(bytes)};
    QUARRY_RETURN_IF_ERROR(TakeRoom(&wanted));
  }
  absl::Status status = wanted.claim.has_value() ? BuildClaim(&wanted) : absl::OkStatus();
  {
    absl::MutexLock lock(&mutex_);
    if (status.ok()) {
      QUARRY_CHECK(wanted.slots.size() == count);
      std::vector<ArenaSlot>& pool = reserved_[{wanted.tenant, bytes}];
      pool.insert(pool.end(), wanted.slots.begin(), wanted.slots.end());
      reserved_bytes_ += bytes * count;
    } else {
      ++refused_;
      for (const ArenaSlot& slot : wanted.slots) order_.Vacate(slot);
      arena_->Free(wanted.slots, &wanted.emptied);
    }
  }
  GiveBack(std::move(wanted.emptied));
  return status;
}

// Plans before it touches anything, so that a refusal changes nothing. The plan is exact: slots
// change hands under mutex_ only, but for memory that is being mapped or unmapped, and where that
// decides, it is waited for.
absl::Status RamBlockStore::TakeRoom(Reservation* wanted) {
  ExpirePins();
  while (true) {
    const ArenaSupply supply = arena_->SupplyOf(*wanted->tenant, wanted->bytes);
    if (supply.free_slots >= wanted->count) break;
    const uint64_t missing = wanted->count - supply.free_slots;
    if (!growing_.contains(wanted->slot_class)) {
      if (missing <= supply.SlotsIn(supply.room_bytes + supply.other_spare_bytes)) break;
      // What is on its way back is waited for before anything is evicted.
      if (supply.returning_bytes == 0) {
        if (CouldMake(missing, supply, wanted->slot_class)) break;
        return Refuse(wanted->bytes, wanted->count);
      }
    }
    AwaitMemory();
  }
  for (const ArenaSlot& slot : arena_->TakeFree(*wanted->tenant, wanted->bytes, wanted->count)) {
    TakeSlot(wanted, slot);
  }
  MakeRoom(wanted);
  return absl::OkStatus();
}

// Makes the claimed extents, which may take seconds, and takes its slots of them.
absl::Status RamBlockStore::BuildClaim(Reservation* wanted) {
  const absl::Status status = arena_->Build(&*wanted->claim);
  absl::MutexLock lock(&mutex_);
  growing_.erase(wanted->slot_class);
  ++memory_changes_;
  if (!status.ok()) return status;
  for (const ArenaSlot& slot : arena_->Add(*std::move(wanted->claim))) TakeSlot(wanted, slot);
  return absl::OkStatus();
}

void RamBlockStore::TakeSlot(Reservation* wanted, ArenaSlot slot) {
  slot.bytes = wanted->bytes;
  order_.Occupy(wanted->tenant, slot);
  wanted->slots.push_back(slot);
}

bool RamBlockStore::CouldMake(uint64_t slots, const ArenaSupply& supply,
                              const SlotClass& slot_class) const {
  const uint64_t room = supply.room_bytes + supply.other_spare_bytes +
                        order_.EvictableExtentBytesExcept(slot_class);
  return slots <= supply.SlotsIn(room) + order_.EvictableSlots(slot_class);
}

// Completes the reservation: with room for new extents, then with spare extents of others, then
// with evictions. TakeRoom has made sure that it can.
void RamBlockStore::MakeRoom(Reservation* wanted) {
  while (wanted->slots.size() < wanted->count) {
    const auto missing = static_cast<uint32_t>(wanted->count - wanted->slots.size());
    const ArenaSupply supply = arena_->SupplyOf(*wanted->tenant, wanted->bytes);
    const uint64_t room = supply.room_bytes + wanted->emptied.bytes;
    if (supply.SlotsIn(room) >= missing) {
      auto claim = arena_->ClaimRoom(*wanted->tenant, wanted->bytes, missing, &wanted->emptied);
      QUARRY_CHECK(claim.ok());
      wanted->claim = *std::move(claim);
      growing_.insert(wanted->slot_class);
      return;
    }
    if (arena_->DropOtherSpare(*wanted->tenant, wanted->bytes, &wanted->emptied)) continue;
    const uint64_t more = order_.EvictableExtentBytesExcept(wanted->slot_class);
    std::vector<FreedSlot> freed;
    EvictColdest(wanted->slot_class, supply.SlotsIn(room + more) > supply.SlotsIn(room), &freed);
    // Slots of our kind are taken as they are; others may empty an extent.
    auto others = std::partition(freed.begin(), freed.end(), [&](const FreedSlot& slot) {
      return slot.tenant == wanted->tenant && slot.memory.slot_bytes == supply.slot_bytes;
    });
    auto taken = freed.begin();
    for (; taken != others && wanted->slots.size() < wanted->count; ++taken) {
      TakeSlot(wanted, taken->memory);
    }
    FreeSlots(std::span(taken, freed.end()), &wanted->emptied);
  }
}

// Our own next leaf by the policy, unless all of some other extent has not been used for longer.
void RamBlockStore::EvictColdest(const SlotClass& slot_class, bool extents_help,
                                 std::vector<FreedSlot>* freed) {
  std::optional<uint32_t> leaf = order_.NextLeaf(slot_class);
  std::optional<uint32_t> extent;
  if (extents_help) extent = order_.ColdestExtentExcept(slot_class);
  const bool take_extent =
      extent.has_value() &&
      (!leaf.has_value() || order_.LastUseOfExtent(*extent) < records_.at(*leaf).last_used);
  if (take_extent) {
    for (uint32_t block : order_.BlocksIn(*extent)) {
      // It may have gone with the family of one before it.
      if (records_.at(block).state == BlockState::kPublished) EvictFamily(block, freed);
    }
    return;
  }
  if (!leaf.has_value()) leaf = order_.AnyEvictable(slot_class);
  QUARRY_CHECK(leaf.has_value());
  EvictFamily(*leaf, freed);
}

// Evicts a block after its descendants: children first, so that no parent goes before them.
void RamBlockStore::EvictFamily(uint32_t block, std::vector<FreedSlot>* freed) {
  uint32_t at = block;
  while (true) {
    const BlockRecord& record = records_.at(at);
    if (record.first_child != kNoBlock) {
      at = record.first_child;
      continue;
    }
    QUARRY_CHECK(record.in_order);  // a leaf, and nothing holds it
    const uint32_t parent = record.parent;
    order_.NoteEvicted(at);
    Retire(at, freed);
    ++evictions_;
    if (at == block) return;
    at = parent;
  }
}

void RamBlockStore::AwaitMemory() {
  struct Wait {
    const uint64_t* changes;
    uint64_t seen;
    static bool Changed(Wait* wait) { return *wait->changes != wait->seen; }
  } wait{&memory_changes_, memory_changes_};
  mutex_.Await(absl::Condition(&Wait::Changed, &wait));
}

absl::Status RamBlockStore::Refuse(uint64_t bytes, uint32_t count) {
  ++refused_;
  const ArenaStats arena = arena_->Stats();
  return absl::ResourceExhaustedError(absl::StrCat(
      "the RAM tier is full: ", count, " blocks of ", bytes, " bytes wanted, capacity ",
      arena.capacity_bytes, ", in use ", arena.used_bytes, " (", live_ - records_.published(),
      " blocks unfinished or retiring, ", leased_, " leased, ", pinned_, " pinned, ",
      reserved_bytes_, " bytes reserved)"));
}

void RamBlockStore::FreeSlots(std::span<const FreedSlot> freed, EmptyExtents* emptied) {
  for (const FreedSlot& slot : freed) arena_->Free(std::span(&slot.memory, 1), emptied);
}

void RamBlockStore::GiveBack(EmptyExtents emptied) {
  if (emptied.bytes > 0) extent_return_.Add(std::move(emptied));
}

void RamBlockStore::Unreserve(std::string_view tenant, uint64_t bytes, uint32_t count) {
  if (count == 0) return;
  EmptyExtents emptied;
  {
    absl::MutexLock lock(&mutex_);
    auto it = reserved_.find({tenants_.Find(tenant), bytes});
    QUARRY_CHECK(it != reserved_.end() && it->second.size() >= count);
    for (uint32_t i = 0; i < count; ++i) {
      const ArenaSlot slot = it->second.back();
      it->second.pop_back();
      order_.Vacate(slot);
      arena_->Free(std::span(&slot, 1), &emptied);
    }
    if (it->second.empty()) reserved_.erase(it);
    reserved_bytes_ -= bytes * count;
  }
  GiveBack(std::move(emptied));
}

absl::StatusOr<BlockView> RamBlockStore::Begin(std::string_view tenant, uint64_t bytes) {
  absl::MutexLock lock(&mutex_);
  const TenantName owner = tenants_.Find(tenant);
  auto it = reserved_.find({owner, bytes});
  if (it == reserved_.end()) {
    return absl::FailedPreconditionError(absl::StrCat("no block of ", bytes,
                                                      " bytes is reserved for tenant ",
                                                      std::string(tenant)));
  }
  const uint32_t block = records_.New();
  BlockRecord& record = records_.at(block);
  record.tenant = owner;
  record.memory = it->second.back();
  record.leases = 1;
  it->second.pop_back();
  if (it->second.empty()) reserved_.erase(it);
  reserved_bytes_ -= bytes;
  records_.Move(block, BlockState::kWriting);
  order_.Assign(block);
  ++live_;
  live_bytes_ += bytes;
  return ViewOf(block);
}

}  // namespace quarry

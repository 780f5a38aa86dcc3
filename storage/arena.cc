#include "storage/arena.h"

#include <algorithm>
#include <numeric>

#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "proto/check.h"
#include "proto/status_macros.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

// The first extent of a size; each further one doubles what is there, up to extent_bytes, so that
// a rare size holds little and a common one has few extents.
constexpr uint64_t kFirstExtentBytes = kHugePageBytes;

}  // namespace

absl::StatusOr<std::unique_ptr<Arena>> Arena::Create(const ArenaOptions& options) {
  for (const auto& [name, value] :
       {std::pair("capacity_bytes", options.capacity_bytes),
        std::pair("extent_bytes", options.extent_bytes)}) {
    if (value < kSmallPageBytes || value > (1ull << 60)) {
      return absl::InvalidArgumentError(absl::StrCat("arena: ", name, " is ", value, "; ",
                                                     kSmallPageBytes, " to 2^60 are allowed"));
    }
  }
  return std::unique_ptr<Arena>(new Arena(options));
}

Arena::Arena(const ArenaOptions& options) : options_([&] {
  ArenaOptions whole_pages = options;
  whole_pages.capacity_bytes &= ~(kSmallPageBytes - 1);
  whole_pages.extent_bytes &= ~(kSmallPageBytes - 1);
  return whole_pages;
}()) {}

Arena::~Arena() = default;

// ---- Slots.

absl::StatusOr<ArenaSlot> Arena::Allocate(std::string_view tenant, uint64_t bytes) {
  if (bytes == 0) return absl::InvalidArgumentError("arena: a slot of 0 bytes was asked for");
  if (std::vector<ArenaSlot> free = TakeFree(tenant, bytes, 1); !free.empty()) return free[0];
  EmptyExtents emptied;
  absl::StatusOr<ArenaClaim> claim = ClaimRoom(tenant, bytes, 1, &emptied);
  while (!claim.ok() && DropOtherSpare(tenant, bytes, &emptied)) {
    claim = ClaimRoom(tenant, bytes, 1, &emptied);
  }
  if (!claim.ok()) {
    GiveBack(std::move(emptied));
    return claim.status();
  }
  QUARRY_RETURN_IF_ERROR(Build(&*claim));
  return Add(*std::move(claim))[0];
}

void Arena::Free(const ArenaSlot& slot) {
  EmptyExtents emptied;
  Free(std::span(&slot, 1), &emptied);
  GiveBack(std::move(emptied));
}

std::vector<ArenaSlot> Arena::TakeFree(std::string_view tenant, uint64_t bytes, uint32_t count) {
  std::vector<ArenaSlot> slots;
  absl::MutexLock lock(&mutex_);
  auto it = classes_.find({std::string(tenant), SlotBytesFor(bytes)});
  if (it == classes_.end()) return slots;
  while (slots.size() < count && !it->second.with_room.empty()) {
    slots.push_back(TakeSlot(*it->second.with_room.begin(), bytes));
  }
  return slots;
}

void Arena::Free(std::span<const ArenaSlot> slots, EmptyExtents* emptied) {
  absl::MutexLock lock(&mutex_);
  for (const ArenaSlot& slot : slots) FreeSlot(slot, emptied);
}

ArenaSlot Arena::TakeSlot(uint32_t index, uint64_t bytes) {
  SlottedExtent& extent = extents_.at(index);
  ClassExtents& siblings = classes_.at(extent.slot_class);
  if (extent.free.size() == extent.used.size()) {
    spares_.erase(index);
    spare_bytes_ -= extent.memory->bytes();
    siblings.spare_bytes -= extent.memory->bytes();
  }
  const uint32_t number = extent.free.back();
  extent.free.pop_back();
  extent.used[number] = true;
  if (extent.free.empty()) siblings.with_room.erase(index);
  --siblings.free_slots;
  const uint64_t slot_bytes = extent.slot_class.second;
  used_bytes_ += slot_bytes;
  const uint64_t offset = number * slot_bytes;
  return {extent.memory->data() + offset, bytes, index, offset, slot_bytes};
}

void Arena::FreeSlot(const ArenaSlot& slot, EmptyExtents* emptied) {
  auto it = extents_.find(slot.extent);
  QUARRY_CHECK(it != extents_.end());
  SlottedExtent& extent = it->second;
  ClassExtents& siblings = classes_.at(extent.slot_class);
  const auto number = static_cast<uint32_t>(slot.offset / extent.slot_class.second);
  QUARRY_CHECK(number < extent.used.size() && extent.used[number]);
  extent.used[number] = false;
  extent.free.push_back(number);
  siblings.with_room.insert(slot.extent);
  ++siblings.free_slots;
  used_bytes_ -= extent.slot_class.second;
  if (extent.free.size() < extent.used.size()) return;
  const uint64_t bytes = extent.memory->bytes();
  spares_.insert(slot.extent);
  spare_bytes_ += bytes;
  siblings.spare_bytes += bytes;
  if (spare_bytes_ > options_.spare_bytes) Detach(slot.extent, emptied);
}

// A spare extent leaves the table; its bytes count as held until they are unmapped.
void Arena::Detach(uint32_t index, EmptyExtents* emptied) {
  auto it = extents_.find(index);
  SlottedExtent& extent = it->second;
  auto siblings = classes_.find(extent.slot_class);
  const uint64_t bytes = extent.memory->bytes();
  siblings->second.with_room.erase(index);
  siblings->second.free_slots -= extent.free.size();
  siblings->second.bytes -= bytes;
  siblings->second.spare_bytes -= bytes;
  if (siblings->second.bytes == 0) classes_.erase(siblings);
  spares_.erase(index);
  spare_bytes_ -= bytes;
  extent_bytes_ -= bytes;
  if (extent.memory->page_bytes() == kHugePageBytes) huge_page_bytes_ -= bytes;
  returning_bytes_ += bytes;
  emptied->bytes += bytes;
  emptied->extents.push_back(std::move(extent.memory));
  extents_.erase(it);
}

bool Arena::DropOtherSpare(std::string_view tenant, uint64_t bytes, EmptyExtents* emptied) {
  const SlotClass own(std::string(tenant), SlotBytesFor(bytes));
  absl::MutexLock lock(&mutex_);
  for (uint32_t index : spares_) {
    if (extents_.at(index).slot_class == own) continue;
    Detach(index, emptied);
    return true;
  }
  return false;
}

// ---- Extents.

absl::StatusOr<ArenaClaim> Arena::ClaimRoom(std::string_view tenant, uint64_t bytes,
                                            uint32_t count, EmptyExtents* emptied) {
  ArenaClaim claim;
  claim.tenant = std::string(tenant);
  claim.bytes = bytes;
  claim.slot_bytes = SlotBytesFor(bytes);
  claim.count = count;
  absl::MutexLock lock(&mutex_);
  const uint64_t room = options_.capacity_bytes - held_bytes_ + emptied->bytes;
  if (SlotsInRoom(room, claim.slot_bytes, options_.extent_bytes) < count) {
    return absl::ResourceExhaustedError(
        absl::StrCat("arena: ", count, " slots of ", claim.slot_bytes, " bytes wanted, ", room,
                     " bytes left of ", options_.capacity_bytes));
  }
  SizeExtents(room, &claim);
  // What `emptied` gives back is counted as held until it is unmapped.
  claim.held_bytes = std::max(claim.extent_bytes, emptied->bytes);
  held_bytes_ += claim.held_bytes - emptied->bytes;
  returning_bytes_ += claim.held_bytes - claim.extent_bytes;
  returning_bytes_ -= emptied->bytes;
  claim.emptied = std::move(*emptied);
  *emptied = EmptyExtents();
  return claim;
}

// Cuts the claim into extents; the last one has as many slots more as the size has already.
void Arena::SizeExtents(uint64_t room_bytes, ArenaClaim* claim) const {
  const uint64_t slot_bytes = claim->slot_bytes;
  auto it = classes_.find({claim->tenant, slot_bytes});
  const uint64_t have = it == classes_.end() ? 0 : it->second.bytes;
  const uint64_t grow = std::clamp(have, std::min(kFirstExtentBytes, options_.extent_bytes),
                                   options_.extent_bytes);
  uint64_t per_extent = SlotsPerExtent(slot_bytes, options_.extent_bytes);
  uint64_t wanted = std::max<uint64_t>(claim->count, grow / slot_bytes);
  // Slots that fill huge pages exactly, where that does not ask for much more.
  const uint64_t even = kHugePageBytes / std::gcd(kHugePageBytes, slot_bytes);
  if (even <= per_extent && even <= wanted) {
    per_extent = per_extent / even * even;
    wanted = RoundUp(wanted, even);
  }
  wanted = std::min(wanted, SlotsInRoom(room_bytes, slot_bytes, options_.extent_bytes));
  for (uint64_t made = 0; made < claim->count;) {
    const uint64_t slots = std::min(per_extent, wanted - made);
    claim->extent_slots.push_back(static_cast<uint32_t>(slots));
    claim->extent_bytes += RoundUp(slots * slot_bytes, kSmallPageBytes);
    made += slots;
  }
}

absl::Status Arena::Build(ArenaClaim* claim) {
  const uint64_t given_back = claim->emptied.bytes;
  claim->emptied = EmptyExtents();
  absl::Status status;
  for (uint32_t slots : claim->extent_slots) {
    auto extent = MakeExtent(RoundUp(slots * claim->slot_bytes, kSmallPageBytes));
    status = extent.status();
    if (!extent.ok()) break;
    claim->built.push_back(*std::move(extent));
  }
  if (!status.ok()) claim->built.clear();
  absl::MutexLock lock(&mutex_);
  given_back_bytes_ += given_back;
  returning_bytes_ -= claim->held_bytes - claim->extent_bytes;
  held_bytes_ -= claim->held_bytes - (status.ok() ? claim->extent_bytes : 0);
  return status;
}

std::vector<ArenaSlot> Arena::Add(ArenaClaim claim) {
  std::vector<ArenaSlot> taken;
  absl::MutexLock lock(&mutex_);
  for (size_t i = 0; i < claim.built.size(); ++i) {
    const uint32_t index = next_extent_++, slots = claim.extent_slots[i];
    const uint64_t bytes = claim.built[i]->bytes();
    SlottedExtent& extent = extents_[index];
    extent.memory = std::move(claim.built[i]);
    extent.slot_class = {claim.tenant, claim.slot_bytes};
    extent.used.assign(slots, false);
    for (uint32_t n = slots; n > 0; --n) extent.free.push_back(n - 1);
    extent_bytes_ += bytes;
    if (extent.memory->page_bytes() == kHugePageBytes) huge_page_bytes_ += bytes;
    ClassExtents& siblings = classes_[extent.slot_class];
    siblings.with_room.insert(index);
    siblings.free_slots += slots;
    siblings.bytes += bytes;
    siblings.spare_bytes += bytes;  // until its first slot is taken
    spares_.insert(index);
    spare_bytes_ += bytes;
    while (taken.size() < claim.count && !extent.free.empty()) {
      taken.push_back(TakeSlot(index, claim.bytes));
    }
  }
  QUARRY_CHECK(taken.size() == claim.count);
  return taken;
}

// Huge pages where the machine gives them, without complaint where it does not.
absl::StatusOr<std::unique_ptr<Extent>> Arena::MakeExtent(uint64_t bytes) {
  ExtentOptions options;
  options.bytes = bytes;
  options.numa_node = RoomiestNumaNode();
  options.prefault = options_.prefault;
  if (options_.huge_pages == ArenaOptions::HugePages::kTry) {
    if (bytes % kHugePageBytes == 0) {
      options.page_bytes = kHugePageBytes;
      if (auto extent = Extent::Create(options); extent.ok()) return extent;
      options.page_bytes = kSmallPageBytes;
    }
    bool first;
    {
      absl::MutexLock lock(&mutex_);
      first = huge_page_fallbacks_++ == 0;
    }
    if (first) spdlog::info("arena: an extent of {} bytes has small pages only", bytes);
  }
  return Extent::Create(options);
}

void Arena::GiveBack(EmptyExtents emptied) {
  if (emptied.bytes == 0) return;
  emptied.extents.clear();  // unmapped before others may use the room
  absl::MutexLock lock(&mutex_);
  held_bytes_ -= emptied.bytes;
  returning_bytes_ -= emptied.bytes;
  given_back_bytes_ += emptied.bytes;
}

// ---- What there is.

uint64_t ArenaSupply::SlotsIn(uint64_t room) const {
  return SlotsInRoom(room, slot_bytes, extent_bytes);
}

ArenaSupply Arena::SupplyOf(std::string_view tenant, uint64_t bytes) const {
  ArenaSupply supply;
  supply.slot_bytes = SlotBytesFor(bytes);
  supply.extent_bytes = options_.extent_bytes;
  absl::MutexLock lock(&mutex_);
  supply.room_bytes = options_.capacity_bytes - held_bytes_;
  supply.returning_bytes = returning_bytes_;
  supply.other_spare_bytes = spare_bytes_;
  auto it = classes_.find({std::string(tenant), supply.slot_bytes});
  if (it != classes_.end()) {
    supply.free_slots = it->second.free_slots;
    supply.other_spare_bytes -= it->second.spare_bytes;
  }
  return supply;
}

uint64_t Arena::ExtentBytes(uint32_t extent) const {
  absl::MutexLock lock(&mutex_);
  return extents_.at(extent).memory->bytes();
}

absl::StatusOr<ExtentInfo> Arena::ExtentDescriptor(std::string_view tenant,
                                                   uint32_t extent) const {
  absl::MutexLock lock(&mutex_);
  auto it = extents_.find(extent);
  if (it == extents_.end() || it->second.slot_class.first != tenant) {
    return absl::NotFoundError(absl::StrCat("arena: extent ", extent, " is not there"));
  }
  const Extent& memory = *it->second.memory;
  ExtentInfo info;
  info.index = extent;
  info.fd = memory.descriptor()->fd();
  info.bytes = memory.bytes();
  info.page_bytes = memory.page_bytes();
  info.numa_node = memory.numa_node();
  info.tenant = std::string(tenant);
  info.keep_open = memory.descriptor();
  return info;
}

ArenaStats Arena::Stats() const {
  absl::MutexLock lock(&mutex_);
  ArenaStats stats;
  stats.capacity_bytes = options_.capacity_bytes;
  stats.extent_bytes = extent_bytes_;
  stats.used_bytes = used_bytes_;
  stats.extents = extents_.size();
  stats.huge_page_bytes = huge_page_bytes_;
  stats.spare_bytes = spare_bytes_;
  stats.committed_bytes = held_bytes_;
  stats.given_back_bytes = given_back_bytes_;
  stats.huge_page_fallbacks = huge_page_fallbacks_;
  return stats;
}

}  // namespace quarry

// RAM arena: memfd extents, each of one (tenant, NUMA node, page size), cut into equal slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "proto/types.h"
#include "storage/extent.h"

namespace quarry {

struct ArenaOptions {
  uint64_t capacity_bytes = 4ull << 30;  // of all tenants together
  uint64_t extent_bytes = 64ull << 20;   // of a large extent; at least one slot, fewer at first
  enum class HugePages { kNever, kTry } huge_pages = HugePages::kTry;
  bool prefault = true;                  // at the extent's creation, never on a decode step
  // Wholly free extents kept for their tenant and size, so that what was pre-faulted is not
  // faulted again; whoever else needs the room takes them first. More go back to the system.
  uint64_t spare_bytes = 1ull << 30;
};

// Memory of one slot. Bytes stay mapped until the slot is freed.
struct ArenaSlot {
  std::byte* data = nullptr;
  uint64_t bytes = 0;       // as asked; the slot may be larger
  uint32_t extent = 0;      // index for ExtentDescriptor()
  uint64_t offset = 0;      // within the extent
  uint64_t slot_bytes = 0;  // SlotBytesFor(bytes)
};

struct ExtentInfo {
  uint32_t index = 0;
  int fd = -1;             // sealed: shrink, grow, seal, future-write; open while keep_open is held
  uint64_t bytes = 0;
  uint64_t page_bytes = 0;
  uint32_t numa_node = 0;
  std::string tenant;
  std::shared_ptr<const ExtentDescriptorHandle> keep_open;
};

struct ArenaStats {
  uint64_t capacity_bytes = 0, extent_bytes = 0, used_bytes = 0;
  uint64_t extents = 0;
  uint64_t huge_page_bytes = 0;
  uint64_t spare_bytes = 0;          // of extents in which nothing is used
  uint64_t committed_bytes = 0;      // extents, those being made and those on their way back
  uint64_t given_back_bytes = 0;     // to the system, since the start
  uint64_t huge_page_fallbacks = 0;  // extents that asked for huge pages and got small ones
};

// Extents in which nothing is used any more, on their way back to the system: hand them to
// ClaimRoom or GiveBack.
struct EmptyExtents {
  std::vector<std::unique_ptr<Extent>> extents;
  uint64_t bytes = 0;
};

// Room set aside for new extents; hand it to Build, then to Add.
struct ArenaClaim {
  std::string tenant;
  uint64_t bytes = 0, slot_bytes = 0;
  uint32_t count = 0;                  // slots that the claimer takes
  std::vector<uint32_t> extent_slots;  // slots of each extent to make, at least `count` in all
  uint64_t extent_bytes = 0;           // of them together
  uint64_t held_bytes = 0;             // of capacity: more than extent_bytes until `emptied` is gone
  EmptyExtents emptied;                // unmapped before the new ones are made
  std::vector<std::unique_ptr<Extent>> built;
};

// What slots of one tenant and size could come from.
struct ArenaSupply {
  uint64_t slot_bytes = 0;
  uint64_t free_slots = 0;
  uint64_t room_bytes = 0;         // of capacity, neither in extents nor claimed
  uint64_t returning_bytes = 0;    // on its way back to room_bytes
  uint64_t other_spare_bytes = 0;  // of spare extents of other tenants or sizes
  uint64_t extent_bytes = 0;       // as in ArenaOptions

  // Slots that new extents in `room_bytes` would have.
  uint64_t SlotsIn(uint64_t room_bytes) const;
};

// Thread-safe. Slots of one (tenant, size) share extents; memory that one tenant used never serves
// another. A freed slot keeps its bytes, so a tenant may see its own stale bytes, never others'.
// The capacity bounds the extents held here at every moment; an extent that a client still maps
// stays in memory until that client unmaps it.
class Arena {
 public:
  // InvalidArgument names the option and its value.
  static absl::StatusOr<std::unique_ptr<Arena>> Create(const ArenaOptions& options);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A free slot, or one of a new extent (slow: pre-faulting). ResourceExhausted names the bytes
  // wanted and the bytes left.
  absl::StatusOr<ArenaSlot> Allocate(std::string_view tenant, uint64_t bytes);
  void Free(const ArenaSlot& slot);
  // NotFound for an unknown extent, and for one of another tenant.
  absl::StatusOr<ExtentInfo> ExtentDescriptor(std::string_view tenant, uint32_t extent) const;
  ArenaStats Stats() const;

  // The same in steps, for an owner that plans under a lock of its own: all are quick but
  // GiveBack and Build, which map and unmap memory and belong outside that lock.
  ArenaSupply SupplyOf(std::string_view tenant, uint64_t bytes) const;
  // As many free slots as there are, at most `count`.
  std::vector<ArenaSlot> TakeFree(std::string_view tenant, uint64_t bytes, uint32_t count);
  void Free(std::span<const ArenaSlot> slots, EmptyExtents* emptied);
  // Empties the oldest spare extent that is not of this tenant and size; false if there is none.
  bool DropOtherSpare(std::string_view tenant, uint64_t bytes, EmptyExtents* emptied);
  // Sets room aside for `count` slots, from what is left and what `emptied` gives back.
  // ResourceExhausted where that is too little; `emptied` is then untouched.
  absl::StatusOr<ArenaClaim> ClaimRoom(std::string_view tenant, uint64_t bytes, uint32_t count,
                                       EmptyExtents* emptied);
  // Makes the claimed extents. On failure the claim is gone.
  absl::Status Build(ArenaClaim* claim);
  // Adds the built extents and takes the claimed slots of them.
  std::vector<ArenaSlot> Add(ArenaClaim claim);
  void GiveBack(EmptyExtents emptied);
  uint64_t ExtentBytes(uint32_t extent) const;

 private:
  using SlotClass = std::pair<std::string, uint64_t>;  // tenant, slot bytes
  struct SlottedExtent {
    std::unique_ptr<Extent> memory;
    SlotClass slot_class;
    std::vector<uint32_t> free;  // slot numbers
    std::vector<bool> used;      // by slot number
  };
  // What one (tenant, size) has.
  struct ClassExtents {
    std::set<uint32_t> with_room;  // the lowest is filled first, so that the highest empty
    uint64_t free_slots = 0;
    uint64_t bytes = 0, spare_bytes = 0;
  };

  explicit Arena(const ArenaOptions& options);

  ArenaSlot TakeSlot(uint32_t index, uint64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FreeSlot(const ArenaSlot& slot, EmptyExtents* emptied)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Detach(uint32_t index, EmptyExtents* emptied) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SizeExtents(uint64_t room_bytes, ArenaClaim* claim) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<std::unique_ptr<Extent>> MakeExtent(uint64_t bytes);

  const ArenaOptions options_;

  mutable absl::Mutex mutex_;  // never held while memory is mapped, touched or unmapped
  std::map<uint32_t, SlottedExtent> extents_ ABSL_GUARDED_BY(mutex_);
  std::map<SlotClass, ClassExtents> classes_ ABSL_GUARDED_BY(mutex_);
  std::set<uint32_t> spares_ ABSL_GUARDED_BY(mutex_);  // extents, the oldest first
  uint32_t next_extent_ ABSL_GUARDED_BY(mutex_) = 0;   // never reused: clients cache mappings
  uint64_t held_bytes_ ABSL_GUARDED_BY(mutex_) = 0;    // extents, claims and what is on its way back
  uint64_t returning_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t extent_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t used_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t spare_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t huge_page_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t given_back_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t huge_page_fallbacks_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace quarry

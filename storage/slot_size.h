// Sizes of arena slots: few enough that slots are reused, close enough that little is wasted.
#pragma once

#include <bit>
#include <cstdint>

namespace quarry {

inline constexpr uint64_t kSmallPageBytes = 4096;
inline constexpr uint64_t kHugePageBytes = 2ull << 20;
inline constexpr uint64_t kSlotAlignment = 64;

constexpr uint64_t RoundUp(uint64_t x, uint64_t unit) { return (x + unit - 1) / unit * unit; }

// The slot that holds `bytes` (1 to 2^63): whole cache lines below a page, whole pages from there
// on, so that a lease never shows part of a neighbour's page. At most eight sizes per doubling:
// beyond that rounding at most an eighth is wasted. Sizes that are 8 to 15 times a power of two
// (those of most models' blocks) waste nothing.
constexpr uint64_t SlotBytesFor(uint64_t bytes) {
  const uint64_t unit = bytes < kSmallPageBytes ? kSlotAlignment : kSmallPageBytes;
  const uint64_t rounded = RoundUp(bytes, unit);
  const uint64_t step = std::bit_floor(rounded) / 8;
  return RoundUp(rounded, step < unit ? unit : step);
}

// Slots of one extent: at least one, else what fits into `extent_bytes`.
constexpr uint64_t SlotsPerExtent(uint64_t slot_bytes, uint64_t extent_bytes) {
  const uint64_t slots = extent_bytes / slot_bytes;
  return slots < 1 ? 1 : slots > (1u << 30) ? 1u << 30 : slots;
}

// Slots that whole extents and a last smaller one have room for in `room_bytes` (whole pages).
constexpr uint64_t SlotsInRoom(uint64_t room_bytes, uint64_t slot_bytes, uint64_t extent_bytes) {
  const uint64_t slots = SlotsPerExtent(slot_bytes, extent_bytes);
  const uint64_t whole = RoundUp(slots * slot_bytes, kSmallPageBytes);
  return room_bytes / whole * slots + room_bytes % whole / slot_bytes;
}

}  // namespace quarry

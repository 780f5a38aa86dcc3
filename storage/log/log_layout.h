// Where what lies on the disk of a log: storage/FORMAT.md.
#pragma once

#include <algorithm>
#include <cstdint>

#include "storage/disk/disk.h"

namespace quarry {

// Two areas have a note of every segment each, and the keys of an encrypted log, so that whatever
// happens to a stretch of the disk leaves one: one area before the segments, one behind them.
// Offsets are on the disk.
struct LogLayout {
  uint64_t segment_bytes = 0;
  uint32_t segments = 0;
  uint32_t key_slots = 0;  // 0: it is not encrypted

  static constexpr uint32_t kLeastKeySlots = 64, kMostKeySlots = 1024;
  // Of an encrypted log: one for each tenant.
  static constexpr LogLayout Encrypted(uint64_t segment_bytes, uint32_t segments) {
    return {segment_bytes, segments, std::clamp(segments, kLeastKeySlots, kMostKeySlots)};
  }
  static constexpr uint64_t kFirstArea = 1ull << 20;
  static constexpr uint64_t kAreaUnit = 1ull << 20;  // areas have a multiple of it
  static constexpr int kSuperblocks = 3;
  static constexpr int kAreas = 2;

  constexpr uint64_t AreaBytes() const {
    const uint64_t bytes = (uint64_t{segments} + key_slots) * kSectorBytes;
    return (bytes + kAreaUnit - 1) / kAreaUnit * kAreaUnit;
  }
  constexpr uint64_t SegmentOffset(uint32_t segment) const {
    return kFirstArea + AreaBytes() + segment * segment_bytes;
  }
  constexpr uint64_t AreaOffset(int area) const {
    return area == 0 ? kFirstArea : SegmentOffset(segments);
  }
  constexpr uint64_t NoteOffset(int area, uint32_t segment) const {
    return AreaOffset(area) + segment * kSectorBytes;
  }
  constexpr uint64_t KeyOffset(int area, uint32_t slot) const {
    return NoteOffset(area, segments) + slot * kSectorBytes;
  }
  constexpr uint64_t SuperblockOffset(int copy) const {
    return copy == 0 ? 0 : copy == 1 ? kFirstArea / 2 : AreaOffset(1) + AreaBytes();
  }
  constexpr uint64_t bytes() const { return SuperblockOffset(2) + kSectorBytes; }
  friend bool operator==(const LogLayout&, const LogLayout&) = default;
};

}  // namespace quarry

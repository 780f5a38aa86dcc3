// Where what lies on the disk of a log: storage/FORMAT.md.
#pragma once

#include <cstdint>

#include "storage/disk/disk.h"

namespace quarry {

// Two areas have a note of every segment each, so that whatever happens to a stretch of the disk
// leaves one: one area before the segments, one behind them. Offsets are on the disk.
struct LogLayout {
  uint64_t segment_bytes = 0;
  uint32_t segments = 0;

  static constexpr uint64_t kFirstArea = 1ull << 20;
  static constexpr uint64_t kAreaUnit = 1ull << 20;  // areas have a multiple of it
  static constexpr int kSuperblocks = 3;
  static constexpr int kAreas = 2;

  constexpr uint64_t AreaBytes() const {
    return (segments * kSectorBytes + kAreaUnit - 1) / kAreaUnit * kAreaUnit;
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
  constexpr uint64_t SuperblockOffset(int copy) const {
    return copy == 0 ? 0 : copy == 1 ? kFirstArea / 2 : AreaOffset(1) + AreaBytes();
  }
  constexpr uint64_t bytes() const { return SuperblockOffset(2) + kSectorBytes; }
};

}  // namespace quarry

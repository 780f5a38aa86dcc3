// The log's segments: which may be written, which have been, which are lost.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace quarry {

// FREE -> OPEN -> SEALED -> FREE, and back from OPEN where nothing could be written. What could not
// be written further or synced is CONDEMNED: what was committed before is read, and nothing is
// written there again before the next start; so is one of which something cannot be read.
enum class SegmentState : uint8_t { kFree, kOpen, kSealed, kCondemned };

struct SegmentInfo {
  SegmentState state = SegmentState::kFree;
  uint64_t generation = 0;
  uint64_t first_sequence = 0;  // it was opened with
  // Of what lies there, in the index or not, also while it is free: as long as it is not written
  // over, a recovery may find it. ~0: nothing.
  uint64_t oldest_born = ~0ull;
  // Of blocks that are not found because a purge of them may be where it cannot be read.
  uint64_t hidden_bytes = 0;
};

// Not thread-safe.
class SegmentTable {
 public:
  explicit SegmentTable(uint32_t segments) : segments_(segments), free_(segments) {}

  uint32_t size() const { return static_cast<uint32_t>(segments_.size()); }
  SegmentInfo& at(uint32_t segment) { return segments_[segment]; }
  const SegmentInfo& at(uint32_t segment) const { return segments_[segment]; }
  uint32_t free() const { return free_; }
  uint32_t condemned() const { return condemned_; }

  // The free one that was opened longest ago, now OPEN; nothing if there are no more than
  // `reserved`.
  std::optional<uint32_t> Open(uint32_t reserved, uint64_t generation, uint64_t first_sequence);
  // CHECKs that the state may follow.
  void Move(uint32_t segment, SegmentState to);
  // As recovered.
  void Set(uint32_t segment, const SegmentInfo& info);

  // Of all segments but this one.
  uint64_t OldestBornExcept(uint32_t segment) const;

 private:
  void Count(SegmentState state, int sign);

  std::vector<SegmentInfo> segments_;
  uint32_t free_;
  uint32_t condemned_ = 0;
};

}  // namespace quarry

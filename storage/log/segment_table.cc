#include "storage/log/segment_table.h"

#include <algorithm>

#include "proto/check.h"

namespace quarry {
namespace {

constexpr bool MayMove(SegmentState from, SegmentState to) {
  switch (from) {
    case SegmentState::kFree:
      return to == SegmentState::kOpen;
    case SegmentState::kOpen:
      return to != SegmentState::kOpen;
    case SegmentState::kSealed:
      return to == SegmentState::kFree || to == SegmentState::kCondemned;
    case SegmentState::kCondemned:
      return false;
  }
  return false;
}

}  // namespace

void SegmentTable::Count(SegmentState state, int sign) {
  if (state == SegmentState::kFree) free_ += static_cast<uint32_t>(sign);
  if (state == SegmentState::kCondemned) condemned_ += static_cast<uint32_t>(sign);
}

std::optional<uint32_t> SegmentTable::Open(uint32_t reserved, uint64_t generation,
                                           uint64_t first_sequence) {
  if (free_ <= reserved) return std::nullopt;
  uint32_t best = size();
  for (uint32_t i = 0; i < size(); ++i) {
    if (segments_[i].state != SegmentState::kFree) continue;
    if (best == size() || segments_[i].first_sequence < segments_[best].first_sequence) best = i;
  }
  Move(best, SegmentState::kOpen);
  segments_[best].generation = generation;
  segments_[best].first_sequence = first_sequence;
  segments_[best].hidden_bytes = 0;
  return best;
}

void SegmentTable::Move(uint32_t segment, SegmentState to) {
  SegmentState& state = segments_[segment].state;
  QUARRY_CHECK(MayMove(state, to));
  Count(state, -1);
  state = to;
  Count(state, 1);
}

void SegmentTable::Set(uint32_t segment, const SegmentInfo& info) {
  Count(segments_[segment].state, -1);
  segments_[segment] = info;
  Count(info.state, 1);
}

uint64_t SegmentTable::OldestBornExcept(uint32_t segment) const {
  uint64_t oldest = ~0ull;
  for (uint32_t i = 0; i < size(); ++i) {
    if (i != segment) oldest = std::min(oldest, segments_[i].oldest_born);
  }
  return oldest;
}

}  // namespace quarry

#include "gpu/cuda/arena_map.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/check.h"

namespace quarry::cuda {

ArenaMap::ArenaMap(uint64_t budget, uint64_t overhead, uint64_t page)
    : budget_(budget), page_(page), overhead_(overhead) {
  if (budget > 0) free_.emplace(0, budget);
}

uint64_t ArenaMap::Rounded(uint64_t bytes) {
  return std::max<uint64_t>(1, (bytes + kAlignment - 1) / kAlignment) * kAlignment;
}

uint64_t ArenaMap::limit() const {
  return budget_ > overhead_ ? (budget_ - overhead_) / page_ * page_ : 0;
}

void ArenaMap::SetOverhead(uint64_t overhead) { overhead_ = overhead; }

uint64_t ArenaMap::largest_free() const {
  uint64_t largest = 0;
  for (const auto& [offset, end] : free_) {
    const uint64_t usable = std::min(end, limit());
    if (usable > offset) largest = std::max(largest, usable - offset);
  }
  return largest;
}

std::map<uint64_t, uint64_t>::iterator ArenaMap::BestFit(uint64_t size) {
  auto best = free_.end();
  uint64_t best_size = 0;
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const uint64_t end = std::min(it->second, limit());
    const uint64_t has = end > it->first ? end - it->first : 0;
    if (has < size || (best != free_.end() && has >= best_size)) continue;
    best = it;
    best_size = has;
  }
  return best;
}

absl::StatusOr<uint64_t> ArenaMap::Allocate(uint64_t bytes, std::string_view what) {
  // Beyond the budget nothing is rounded: sizes near 2^64 would wrap.
  const bool hopeless = bytes > budget_;
  const uint64_t size = hopeless ? bytes : Rounded(bytes);
  const auto best = hopeless ? free_.end() : BestFit(size);
  if (best == free_.end()) {
    std::string message = absl::StrCat("device memory: ", bytes, " bytes for ", std::string(what),
                                       ", ", used_ + overhead_, " in use");
    if (overhead_ > 0) absl::StrAppend(&message, " (", overhead_, " by CUDA itself)");
    absl::StrAppend(&message, " of a budget of ", budget_);
    if (!hopeless && used_ <= limit() && size <= limit() - used_) {
      absl::StrAppend(&message, ", the largest free piece has ", largest_free());
    }
    return absl::ResourceExhaustedError(message);
  }
  const auto [offset, end] = *best;
  free_.erase(best);
  if (offset + size < end) free_.emplace(offset + size, end);
  used_ += size;
  peak_ = std::max(peak_, used_);
  high_water_ = std::max(high_water_, offset + size);
  return offset;
}

void ArenaMap::Release(uint64_t offset, uint64_t bytes) {
  uint64_t end = offset + Rounded(bytes);
  used_ -= end - offset;
  auto next = free_.lower_bound(offset);
  QUARRY_CHECK(next == free_.end() || next->first >= end);  // released twice
  if (next != free_.end() && next->first == end) {
    end = next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    QUARRY_CHECK(before->second <= offset);
    if (before->second == offset) {
      before->second = end;
      return;
    }
  }
  free_.emplace(offset, end);
}

}  // namespace quarry::cuda

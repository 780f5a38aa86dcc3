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

std::map<uint64_t, uint64_t>::iterator ArenaMap::BestFit(uint64_t size, uint64_t limit) {
  auto best = free_.end();
  uint64_t best_size = 0;
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const uint64_t end = std::min(it->second, limit);
    const uint64_t has = end > it->first ? end - it->first : 0;
    if (has < size || (best != free_.end() && has >= best_size)) continue;
    best = it;
    best_size = has;
  }
  return best;
}

absl::StatusOr<uint64_t> ArenaMap::Allocate(uint64_t bytes, std::string_view what,
                                            uint64_t leave_end) {
  // Beyond the budget nothing is rounded: sizes near 2^64 would wrap.
  const bool hopeless = bytes > budget_;
  const uint64_t size = hopeless ? bytes : Rounded(bytes);
  const uint64_t end = limit() - std::min(limit(), leave_end);
  auto best = free_.end();
  if (!hopeless && !spare_.empty()) best = BestFit(size, std::min(end, *spare_.begin()));
  if (!hopeless && best == free_.end()) best = BestFit(size, end);
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
  const uint64_t offset = best->first;
  Take(best, offset, size);
  return offset;
}

absl::StatusOr<uint64_t> ArenaMap::AllocateSpare(uint64_t bytes, uint64_t leave_free) {
  const uint64_t top = leave_free < limit() ? limit() - leave_free : 0;
  const uint64_t size = bytes <= budget_ ? Rounded(bytes) : bytes;
  if (used_ <= top && size <= top - used_) {
    for (auto it = free_.end(); it != free_.begin();) {
      --it;
      const uint64_t end = std::min(it->second, top) / kAlignment * kAlignment;
      if (end < it->first || end - it->first < size) continue;
      Take(it, end - size, size);
      spare_.insert(end - size);
      spare_bytes_ += size;
      return end - size;
    }
  }
  return absl::ResourceExhaustedError(absl::StrCat("device memory: no ", bytes, " bytes to spare"));
}

void ArenaMap::Take(std::map<uint64_t, uint64_t>::iterator piece, uint64_t offset, uint64_t size) {
  const auto [begin, end] = *piece;
  free_.erase(piece);
  if (begin < offset) free_.emplace(begin, offset);
  if (offset + size < end) free_.emplace(offset + size, end);
  used_ += size;
  peak_ = std::max(peak_, used_);
  high_water_ = std::max(high_water_, offset + size);
}

void ArenaMap::Release(uint64_t offset, uint64_t bytes) {
  uint64_t end = offset + Rounded(bytes);
  used_ -= end - offset;
  if (spare_.erase(offset) > 0) spare_bytes_ -= end - offset;
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

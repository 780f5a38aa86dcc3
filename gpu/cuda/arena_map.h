// Which bytes of a capped range of addresses are handed out: offsets only, no memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string_view>

#include "absl/status/statusor.h"

namespace quarry::cuda {

// Pieces of [0, budget - overhead), at multiples of kAlignment, best fit. A released piece joins
// its free neighbours at once. Among pieces that fit equally the lowest is taken, so the range's
// end, and with it the memory behind it, is touched late. Spare pieces lie at the far end, and what
// is no such piece before them as long as there is room, so that it stays in one piece when they
// go. Used by one thread.
class ArenaMap {
 public:
  static constexpr uint64_t kAlignment = 512;

  // `overhead` bytes of the budget are somebody else's. What is handed out ends at a multiple of
  // `page`, a multiple of kAlignment: memory comes in such pages.
  ArenaMap(uint64_t budget, uint64_t overhead, uint64_t page = kAlignment);

  // The piece's offset. ResourceExhausted names what was asked for, its bytes, what is in use and
  // the budget, and the largest free piece where only that is too small. No bytes take room too.
  // leave_end: bytes before the limit that are not handed out.
  absl::StatusOr<uint64_t> Allocate(uint64_t bytes, std::string_view what, uint64_t leave_end = 0);
  // A spare piece, which ends `leave_free` bytes before the limit or earlier and leaves at least so
  // many bytes free; ResourceExhausted.
  absl::StatusOr<uint64_t> AllocateSpare(uint64_t bytes, uint64_t leave_free);
  // A piece of Allocate or AllocateSpare, with the bytes that it was asked for.
  void Release(uint64_t offset, uint64_t bytes);
  // More of the budget is somebody else's. What is handed out stays so, even beyond the new end.
  void SetOverhead(uint64_t overhead);

  uint64_t budget() const { return budget_; }
  uint64_t overhead() const { return overhead_; }
  uint64_t limit() const;                     // the end of what can be handed out
  uint64_t used() const { return used_; }     // whole multiples of kAlignment
  uint64_t peak() const { return peak_; }
  uint64_t spare() const { return spare_bytes_; }      // of what is used
  uint64_t high_water() const { return high_water_; }  // the highest end of a piece so far
  uint64_t largest_free() const;

 private:
  static uint64_t Rounded(uint64_t bytes);
  // The lowest of the smallest free pieces of at least `size` bytes below `limit`, or the end.
  std::map<uint64_t, uint64_t>::iterator BestFit(uint64_t size, uint64_t limit);
  // Takes [offset, offset + size) out of a free piece.
  void Take(std::map<uint64_t, uint64_t>::iterator piece, uint64_t offset, uint64_t size);

  const uint64_t budget_, page_;
  uint64_t overhead_;
  uint64_t used_ = 0, peak_ = 0, high_water_ = 0, spare_bytes_ = 0;
  // Free pieces of [0, budget), [offset, end); no two of them touch. There are few: a layer's
  // buffers and a sequence's spans, so that a walk over all of them is cheap.
  std::map<uint64_t, uint64_t> free_;
  std::set<uint64_t> spare_;  // offsets of what AllocateSpare handed out
};

}  // namespace quarry::cuda

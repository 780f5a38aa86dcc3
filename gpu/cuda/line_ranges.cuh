// A head's ranges from its slashes.
#pragma once

#include "gpu/cuda/block_ops.cuh"
#include "gpu/cuda/line_args.h"
#include "gpu/cuda/line_counts.cuh"

namespace quarry::cuda {

// RangesOfSlashes (gpu/sparse/sparse_index.h) by a block of threads: two slashes are of one range
// if what lies between them fits the key tiles that the range has anyway; how many that is depends
// on where the range began.
class RangeMaker {
 public:
  // breaks and ranges: [MostRanges]; tiles: [MostRanges + 1]; shared: [threads / 32].
  __device__ RangeMaker(LineBreak* breaks, RelativeRange* ranges, uint32_t* tiles, uint32_t threads,
                        uint32_t* shared)
      : breaks_(breaks), ranges_(ranges), tiles_(tiles), threads_(threads), shared_(shared) {}

  // From the slashes' bits. How many ranges there are.
  __device__ uint32_t Make(const uint32_t* slashes, uint32_t words) {
    FindBreaks(slashes, words);
    // A gap that nothing fills ends a range whatever came before; so what is behind each can be
    // followed by a thread of its own.
    for (uint32_t i = threadIdx.x; i < breaks_count_; i += threads_) {
      if (!AlwaysBreaks(i)) continue;
      uint32_t start = breaks_[i].start;
      for (uint32_t next = i + 1; next < breaks_count_ && !AlwaysBreaks(next); ++next) {
        const LineBreak at = breaks_[next];
        if (at.start - start > kRowTile + Whole(at.before - start)) {
          start = at.start;
        } else {
          breaks_[next].before = kNoBreak;
        }
      }
    }
    __syncthreads();
    // Those that are left: each has the start of its range and the end of the one before.
    uint32_t left = 0;
    for (uint32_t first = 0; first < breaks_count_; first += threads_) {
      const uint32_t i = first + threadIdx.x;
      LineBreak mine = {kNoBreak, 0};
      if (i < breaks_count_) mine = breaks_[i];
      const bool breaks = mine.before != kNoBreak;
      const Folded<uint32_t> place = Fold<Plus>(breaks ? 1u : 0u, threads_, shared_);
      if (breaks) {
        const uint32_t at = left + place.before;
        breaks_[at].start = mine.start;
        if (at > 0) breaks_[at - 1].before = mine.before;  // from here on the range's own end
      }
      left += place.all;
    }
    if (threadIdx.x == 0) breaks_[left - 1].before = last_slash_;
    __syncthreads();
    uint32_t before = 0;
    for (uint32_t first = 0; first < left; first += threads_) {
      const uint32_t i = first + threadIdx.x;
      uint32_t tiles = 0;
      if (i < left) {
        const LineBreak of = breaks_[left - 1 - i];
        const uint32_t whole = Whole(of.before - of.start);
        tiles = (kRowTile + whole) / kKeyTile;
        ranges_[i] = {-static_cast<int32_t>(of.start + whole),
                      static_cast<int32_t>(kRowTile) - static_cast<int32_t>(of.start)};
      }
      const Folded<uint32_t> sum = Fold<Plus>(tiles, threads_, shared_);
      if (i < left) tiles_[i] = before + sum.before;
      before += sum.all;
    }
    if (threadIdx.x == 0) tiles_[left] = before;
    __syncthreads();
    return left;
  }

 private:
  static constexpr uint32_t kNoBreak = ~0u;
  static __device__ uint32_t Whole(uint32_t keys) { return TilesFor(keys) * kKeyTile; }
  __device__ bool AlwaysBreaks(uint32_t i) const {
    const LineBreak at = breaks_[i];
    return i == 0 || (at.before != kNoBreak && at.start - at.before >= kRowTile + kKeyTile);
  }

  // Chosen slashes, distance 0 among them, that are more than a row tile behind the one before; and
  // first distance 0 itself.
  __device__ void FindBreaks(const uint32_t* bits, uint32_t words) {
    const auto word = [bits](uint32_t w) { return w == 0 ? bits[w] | 1 : bits[w]; };
    const Stretch mine = ShareOf(words, threads_);
    // One more than the last slash; 0 if there is none.
    uint32_t last = 0;
    for (uint32_t w = mine.lo; w < mine.hi; ++w) {
      if (word(w) != 0) last = w * 32 + LastBit(word(w)) + 1;
    }
    const Folded<uint32_t> lasts = Fold<Larger>(last, threads_, shared_);
    last_slash_ = lasts.all - 1;
    uint32_t count = 0, place = 0;
    for (int pass = 0; pass < 2; ++pass) {
      uint32_t before = lasts.before;
      for (uint32_t w = mine.lo; w < mine.hi; ++w) {
        if (word(w) == 0) continue;
        const uint32_t start = w * 32 + FirstBit(word(w));
        if (before == 0 || start - (before - 1) > kRowTile) {
          if (pass == 0) {
            ++count;
          } else {
            breaks_[place++] = {before == 0 ? 0 : before - 1, start};
          }
        }
        before = w * 32 + LastBit(word(w)) + 1;
      }
      if (pass == 0) {
        const Folded<uint32_t> places = Fold<Plus>(count, threads_, shared_);
        place = places.before;
        breaks_count_ = places.all;
      }
    }
    __syncthreads();
  }

  LineBreak* const breaks_;
  RelativeRange* const ranges_;
  uint32_t* const tiles_;
  const uint32_t threads_;
  uint32_t* const shared_;
  uint32_t breaks_count_ = 0, last_slash_ = 0;
};

}  // namespace quarry::cuda

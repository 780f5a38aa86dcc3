// Which of a line's sums are the largest: by number, and by the mass that they come to.
#pragma once

#include "gpu/cuda/block_ops.cuh"
#include "gpu/cuda/line_args.h"

namespace quarry::cuda {

struct LineShared {
  union {
    SearchShared<32> search;
    // By mass: numbers and masses in fewer copies.
    struct {
      SearchShared<8> counts;
      uint32_t masses[256 * 8], mass_totals[256];
    } weighted;
  };
  uint32_t folds[32];
  uint64_t wide_folds[32];
};

// Distances by the mass that they have; those that are always in come first.
struct SlashKeys {
  const float* sums;
  __device__ uint32_t operator()(uint32_t s) const {
    return s < kForcedSlashes ? ~0u : BitsOf(sums[s]);
  }
};

// Keys by the mass that they have by the queries of those row tiles in whose ranges they are not.
struct ColumnKeys {
  const float* sums[2];       // by row tile; the second may be null
  const uint32_t* inside[2];  // bits; null: none is
  __device__ bool Outside(int tile, uint32_t j) const {
    return sums[tile] != nullptr &&
           (inside[tile] == nullptr || (inside[tile][j / 32] >> j % 32 & 1) == 0);
  }
  __device__ float Mass(int tile, uint32_t j) const { return Outside(tile, j) ? sums[tile][j] : 0; }
  __device__ uint32_t Units(uint32_t j) const {
    return RoundToWhole(Mass(0, j) * kMassUnits) + RoundToWhole(Mass(1, j) * kMassUnits);
  }
  __device__ uint32_t operator()(uint32_t j) const {
    return j < kForcedColumns ? ~0u : BitsOf(Mass(0, j) + Mass(1, j));
  }
};

// The bits of the `count` largest keys of `tokens`. equals: [WordsOf(tokens)], working memory.
template <typename Keys>
__device__ void SelectLargest(const Keys& keys, uint32_t tokens, uint32_t count, uint32_t threads,
                              LineShared* shared, uint32_t* equals, uint32_t* bits) {
  const uint32_t words = (tokens + 31) / 32;
  const Threshold chosen = FindLargest(keys, tokens, count, threads, &shared->search);
  constexpr uint32_t kAtATime = 4;
  const uint32_t lane = threadIdx.x % 32, warps = threads / 32;
  for (uint32_t word = threadIdx.x / 32; word < words; word += kAtATime * warps) {
    uint32_t key[kAtATime];
#pragma unroll
    for (uint32_t i = 0; i < kAtATime; ++i) {
      const uint32_t at = (word + i * warps) * 32 + lane;
      key[i] = at < tokens ? keys(at) : 0;
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtATime; ++i) {
      const bool exists = (word + i * warps) * 32 + lane < tokens;
      const uint32_t above = Ballot(exists && key[i] > chosen.least);
      const uint32_t equal = Ballot(exists && key[i] == chosen.least);
      if (lane != 0 || word + i * warps >= words) continue;
      bits[word + i * warps] = above;
      equals[word + i * warps] = equal;
    }
  }
  __syncthreads();
  const Stretch mine = ShareOf(words, threads);
  uint32_t sum = 0;
  for (uint32_t w = mine.lo; w < mine.hi; ++w) sum += CountBits(equals[w]);
  uint32_t rank = Fold<Plus>(sum, threads, shared->folds).before;
  for (uint32_t w = mine.lo; w < mine.hi && rank < chosen.ties; ++w) {
    uint32_t equal = equals[w];
    for (; equal != 0 && rank < chosen.ties; ++rank) {
      bits[w] |= 1u << FirstBit(equal);
      equal &= equal - 1;
    }
  }
  __syncthreads();
}

// The lane's part of the sum of totals[from..].
__device__ inline uint32_t CountFrom(const uint32_t* totals, uint32_t from) {
  uint32_t sum = 0;
  for (uint32_t bin = from + threadIdx.x; bin < 256; bin += 32) sum += totals[bin];
  return sum;
}

// How many of the largest keys that are not always in come to `wanted` units, more than 0; if all
// do not, how many have any.
__device__ inline uint32_t CountForMass(const ColumnKeys& keys, uint32_t tokens, uint32_t wanted,
                                        uint32_t threads, LineShared* line_shared) {
  using Shared = SearchShared<8>;
  auto& shared = line_shared->weighted;
  uint32_t prefix = 0, known = 0, count = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    ClearBins<Shared>(threads, shared.counts.counts);
    ClearBins<Shared>(threads, shared.masses);
    __syncthreads();
    ForKeys(keys, kForcedColumns, tokens, threads, [&](uint32_t j, uint32_t key) {
      // Keys without mass are worth no column.
      if (key == 0 || (key & known) != prefix) return;
      AddShared(BinOf<Shared>(shared.counts.counts, key >> shift & 255), 1);
      AddShared(BinOf<Shared>(shared.masses, key >> shift & 255), keys.Units(j));
    });
    __syncthreads();
    JoinCopies<Shared>(threads, shared.counts.counts, shared.counts.totals);
    JoinCopies<Shared>(threads, shared.masses, shared.mass_totals);
    __syncthreads();
    if (threadIdx.x < 32) FindBin<Shared>(shared.mass_totals, wanted, shared.counts.found);
    __syncthreads();
    const uint32_t bin = shared.counts.found[0];
    // Only of all keys together there may be too little.
    const uint32_t from = bin == Shared::kBins ? 0 : bin + 1;
    const uint32_t above = threadIdx.x < 32 ? CountFrom(shared.counts.totals, from) : 0;
    count += Fold<Plus>(above, threads, line_shared->folds).all;
    if (bin == Shared::kBins) return count;
    wanted -= shared.counts.found[1];
    prefix |= bin << shift;
    known |= 255u << shift;
    if (shift == 0) {
      // Equal but for how they were rounded to units.
      const uint32_t equals = shared.counts.totals[bin];
      const uint32_t each = max(1u, shared.mass_totals[bin] / equals);
      return count + min(equals, (wanted + each - 1) / each);
    }
  }
  return count;
}

}  // namespace quarry::cuda

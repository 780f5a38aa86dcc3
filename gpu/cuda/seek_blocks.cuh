// The key blocks that rows ask for: those whose mean a row's query scores nearly as high as the
// best that it sees. Scores are made twice rather than stored.
#pragma once

#include "gpu/cuda/score_steps.cuh"
#include "gpu/cuda/sparse_args.h"

namespace quarry::cuda {

template <int kHeadDim>
struct SeekTile : TensorTile<kHeadDim, 2> {
  using Base = TensorTile<kHeadDim, 2>;
  static_assert(Base::kQueries == kRowTile && Base::kKeys == kKeyTile);
  // Behind queries and two stages of means: which of a tile's blocks are asked for, of two tiles.
  static constexpr int kFound = Base::kQueries * Base::kVectorBytes + 2 * Base::kKvBytes;
  static constexpr int kSharedBytes = kFound + 4 * static_cast<int>(sizeof(uint32_t));
};

// A row tile's queries of one head.
struct SeekQueries {
  const SeekArgs& a;
  uint32_t head, row, rows;  // the row tile's first row, and how many there are

  __device__ bool Has(uint32_t i) const { return i < rows; }
  __device__ size_t Vector(uint32_t i) const { return size_t{row + i} * a.heads + head; }
};

// The row tile's share of the work, a tile of 64 means a step: first all blocks, for what each row
// scores highest, the last one apart if the row tile ends within it; then those that are not always
// in.
struct SeekSteps {
  uint32_t whole, blocks;  // blocks that end in the row tile or before, and that begin there
  uint32_t cut;            // which mean is that of the block that does not end there
  uint32_t sought;         // blocks before the row tile's own
  uint32_t of_whole, first_sought, end;  // steps

  __device__ SeekSteps(const SeekArgs& a, uint32_t t, uint32_t first, uint32_t last)
      : whole(last / kKeyTile),
        blocks((last + kKeyTile - 1) / kKeyTile),
        cut(a.whole_blocks + t),
        sought(first / kKeyTile),
        of_whole((whole + kKeyTile - 1) / kKeyTile),
        first_sought(of_whole + (blocks > whole ? 1 : 0)),
        end(first_sought + (sought + kKeyTile - 1) / kKeyTile) {}
  // A step's means, and the block that the first one is of.
  __device__ uint32_t Mean(uint32_t step) const { return IsCut(step) ? cut : Block(step); }
  __device__ uint32_t Block(uint32_t step) const {
    if (IsCut(step)) return whole;
    return (step < of_whole ? step : step - first_sought) * kKeyTile;
  }
  __device__ uint32_t Count(uint32_t step) const {
    if (IsCut(step)) return 1;
    return min(kKeyTile, (step < of_whole ? whole : sought) - Block(step));
  }

 private:
  __device__ bool IsCut(uint32_t step) const { return step >= of_whole && step < first_sought; }
};

// Grid: row tiles, launched heads.
template <typename T, typename Tile>
__device__ void SeekBlocks(const SeekArgs& a, char* shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16 * Tile::kRowTiles;
  // The longest first.
  const uint32_t t = gridDim.x - 1 - blockIdx.x, head = a.first_head + blockIdx.y;
  const uint32_t first = a.first_token + t * kRowTile;
  const uint32_t last = min(first + kRowTile, a.first_token + a.rows);
  const SeekQueries queries{a, head, t * kRowTile, last - first};
  const SeekSteps steps(a, t, first, last);
  const std::byte* const means = a.means + head / a.group * a.head_stride;
  uint32_t* const weights =
      a.blocks + blockIdx.y * a.block_head_stride + size_t{t} * a.block_stride;
  uint32_t* const found = reinterpret_cast<uint32_t*>(shared + Tile::kFound);
  const auto fetch = [&](uint32_t step, char* stage) {
    FetchVectors<Tile, false>(means + size_t{steps.Mean(step)} * Tile::kVectorBytes, nullptr,
                              steps.Count(step), stage);
  };

  if (threadIdx.x < 4) found[threadIdx.x] = 0;
  float least[Tile::kRowTiles][2];  // first the largest score of this lane's blocks
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) least[m][0] = least[m][1] = -INFINITY;
  const auto seek = [&](uint32_t step, const auto& s) {
    const uint32_t block = steps.Block(step), count = steps.Count(step);
    if (step < steps.first_sought) {
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t token = first + warp_row + 16 * m + 8 * half + lane / 4;
          const uint32_t seen = min(block + count, token / kKeyTile + 1);
#pragma unroll
          for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (block + 8 * n + 2 * (lane % 4) + e < seen) {
                least[m][half] = fmaxf(least[m][half], s[m][n][2 * half + e]);
              }
            }
          }
        }
      }
      if (step + 1 == steps.first_sought) {
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float largest = QuadMax(least[m][half]) * a.scale_log2;
            const bool exists = queries.Has(warp_row + 16 * m + 8 * half + lane / 4);
            least[m][half] = exists ? largest + a.below_log2 : INFINITY;
          }
        }
      }
      __syncthreads();
      return;
    }
    uint32_t asked = 0;  // bit 2 n + e: this lane's rows ask for that block
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m) {
          const bool asks = s[m][n][e] * a.scale_log2 >= least[m][0] ||
                            s[m][n][2 + e] * a.scale_log2 >= least[m][1];
          if (asks) asked |= 1u << (2 * n + e);
        }
      }
    }
    asked = OrOfRows(asked);
    uint32_t* const here = found + step % 2 * 2;
    if (lane < 4) {
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        uint32_t bits = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          bits |= (asked >> (8 * word + 2 * n) & 3) << (8 * n + 2 * lane);
        }
        if (bits != 0) OrShared(here + word, bits);
      }
    }
    // Read by all before this step, and next added to behind the next one's first meeting.
    if (threadIdx.x < 2) found[(step + 1) % 2 * 2 + threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x < count) {
      const bool is_asked = (here[threadIdx.x / 32] >> threadIdx.x % 32 & 1) != 0;
      weights[block + threadIdx.x] = is_asked ? ~0u : 0u;
    }
  };
  ScoreSteps<T, Tile>(queries, a.q, shared, 0, steps.end, fetch, seek);
}

}  // namespace quarry::cuda

// Attention over a SparseIndex by tensor instructions: one block of threads for a row tile of one
// query head, whatever the head's kind. The tiles of keys are those that sparse_index.h lists;
// what says where the next one lies is read while one is in work.
#pragma once

#include "gpu/cuda/sparse_keys.cuh"
#include "gpu/cuda/tensor_tile.cuh"

namespace quarry::cuda {

template <int kHeadDim>
struct SparseTile : TensorTile<kHeadDim, 2> {
  using Base = TensorTile<kHeadDim, 2>;
  static_assert(Base::kQueries == kRowTile && Base::kKeys == kKeyTile);
  // Behind queries, keys and values: the mask of columns of each stage.
  static constexpr int kMasks = Base::kSharedBytes;
  static constexpr int kSharedBytes = Base::kSharedBytes + 2 * sizeof(uint64_t);
};

// A block's queries: a row tile of one head.
struct RowTileQueries {
  const SparseArgs& a;
  uint32_t head, first_token;  // of the row tile

  __device__ bool Has(uint32_t i) const { return first_token + i < a.first_token + a.rows; }
  __device__ size_t Vector(uint32_t i) const {
    return size_t{first_token - a.first_token + i} * a.heads + head;
  }
  __device__ SeenTokens Seen(uint32_t i) const { return {0, first_token + i + 1}; }
};

// Grid: heads * row tiles, by `order`.
template <typename T, typename Tile>
__device__ void AttendRowTile(const SparseArgs& a, char* shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16 * Tile::kRowTiles;
  const uint32_t item = a.order[blockIdx.x];
  const uint32_t head = item / a.row_tiles, row_tile = item % a.row_tiles;
  const uint32_t first = a.first_token + row_tile * kRowTile;
  const TokenRange rows{first, min(first + kRowTile, a.first_token + a.rows)};
  const RowTileQueries group{a, head, first};
  char* const keys = shared + Tile::kQueries * Tile::kVectorBytes;
  uint64_t* const masks = reinterpret_cast<uint64_t*>(shared + Tile::kMasks);

  const uint32_t steps = a.tiles[item];
  const bool dense = steps == TilesOfDense(rows);
  SparseKeys tiles(a, item, head, rows, steps, dense ? 0 : FirstToRead(a, item, head, first));
  // The first so many are of columns.
  const uint32_t column_steps = dense ? 0 : (a.columns_seen[item] + kKeyTile - 1) / kKeyTile;
  const uint32_t column_first = a.column_first[head];
  const size_t mask_first = size_t{a.mask_first[head]} * a.row_tiles +
                            row_tile * (a.mask_first[head + 1] - a.mask_first[head]);
  // Sets off the copies of a step's tile, which is the present one.
  const auto fetch = [&](uint32_t step) {
    const bool columns = step < column_steps;
    const std::byte* k = columns ? a.column_k : a.k + head / a.group * a.head_stride;
    const std::byte* v = columns ? a.column_v : a.v + head / a.group * a.head_stride;
    const size_t at = (size_t{columns ? column_first : 0} + tiles.lo()) * Tile::kVectorBytes;
    FetchVectors<Tile>(k + at, v + at, tiles.hi() - tiles.lo(),
                       keys + step % 2 * 2 * Tile::kKvBytes);
    if (columns && threadIdx.x == 0) {
      CopyEightLater(masks + step % 2, a.column_masks + mask_first + step);
    }
  };

  StoreQueries<T, Tile>(group, a.q, shared);
  fetch(0);
  EndCopyGroup();

  const bool works = group.Has(warp_row);
  const char* const queries = shared + warp_row * Tile::kVectorBytes;
  WarpState<T, Tile> state(lane);
  for (uint32_t step = 0; step < steps; ++step) {
    const uint32_t lo = tiles.lo(), hi = tiles.hi();
    char* const k = keys + step % 2 * 2 * Tile::kKvBytes;
    if (step + 1 < steps) {
      tiles.Advance();
      fetch(step + 1);
    }
    EndCopyGroup();
    WaitForCopies<1>();
    __syncthreads();
    // Columns are before the row tile, and their places no later than they are.
    const uint32_t first_row = first + static_cast<uint32_t>(warp_row);
    if (works && lo < first_row + 16 * Tile::kRowTiles) {
      float s[Tile::kRowTiles][Tile::kKeys / 8][4];
      // Else all offsets are computed once, kept, and push sums out of the registers.
      Forget(state.by_rows.flip);
      Forget(state.by_pairs.flip);
      state.Score(queries, k, s);
      if (step < column_steps) {
        const uint64_t mask = masks[step % 2];
        if (mask != ~uint64_t{0}) state.Mask(mask, lane, s);
      } else if (hi > first_row + 1 || hi - lo < kKeyTile) {
        state.Mask(group, warp_row, lo, hi, lane, s);
      }
      state.Weigh(a.scale_log2, s);
      state.AddValues(k + Tile::kKvBytes, s);
    }
    __syncthreads();  // before the next fetch overwrites this stage
  }
  if (works) state.Finish(group, warp_row, lane, a.o, a.lse);
}

// Compacts K and V of a head's columns. Grid: any, heads.
__device__ inline void CompactColumns(const SparseArgs& a, uint32_t threads) {
  const uint32_t head = blockIdx.y, first = a.column_first[head];
  const uint32_t chunks = a.head_dim / 8;  // of 16 bytes
  const uint32_t count = (a.column_first[head + 1] - first) * chunks;
  const size_t vector = size_t{a.head_dim} * 2;
  const std::byte* const k = a.k + head / a.group * a.head_stride;
  const std::byte* const v = a.v + head / a.group * a.head_stride;
  for (uint32_t i = blockIdx.x * threads + threadIdx.x; i < count; i += gridDim.x * threads) {
    const uint32_t column = first + i / chunks, chunk = i % chunks;
    const size_t from = a.columns[column] * vector + chunk * 16, to = column * vector + chunk * 16;
    *reinterpret_cast<uint4*>(a.column_k + to) = *reinterpret_cast<const uint4*>(k + from);
    *reinterpret_cast<uint4*>(a.column_v + to) = *reinterpret_cast<const uint4*>(v + from);
  }
}

// Finds the columns outside the ranges, eight of a row tile, a byte of masks, a thread. Grid: any,
// heads.
__device__ inline void MaskColumns(const SparseArgs& a, uint32_t threads) {
  constexpr uint32_t kBits = 8, kBytes = kKeyTile / kBits;
  const uint32_t head = blockIdx.y, bytes = (a.mask_first[head + 1] - a.mask_first[head]) * kBytes;
  const uint32_t first = a.column_first[head], last_range = a.range_first[head + 1];
  uint8_t* const masks =
      reinterpret_cast<uint8_t*>(a.column_masks + size_t{a.mask_first[head]} * a.row_tiles);
  for (uint32_t i = blockIdx.x * threads + threadIdx.x; i < bytes * a.row_tiles;
       i += gridDim.x * threads) {
    const uint32_t row_tile = i / bytes, from = i % bytes * kBits;
    const uint32_t seen = a.columns_seen[head * a.row_tiles + row_tile];
    const int row = static_cast<int>(a.first_token + row_tile * kRowTile);
    uint32_t range = a.range_first[head], mask = 0;
    for (uint32_t c = from; c < min(seen, from + kBits); ++c) {
      const int key = static_cast<int>(a.columns[first + c]) - row;
      range = FirstRangeBehind(a.ranges, range, last_range, key);
      const bool inside = range < last_range && a.ranges[range].lo <= key;
      if (!inside) mask |= 1u << (c - from);
    }
    masks[i] = static_cast<uint8_t>(mask);
  }
}

}  // namespace quarry::cuda

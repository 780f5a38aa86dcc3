// Attention over a SparseIndex by tensor instructions: one block of threads for a row tile of one
// query head, whatever the head's kind. The tiles of keys are those that sparse_index.h lists;
// what says where the next one lies is read while one is in work.
#pragma once

#include "gpu/cuda/sparse_args.h"
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

// First of ranges [at, end) that is not all before the row tile's token 0 or `key`, both relative
// to the row tile's first token.
__device__ inline uint32_t FirstRangeBehind(const RelativeRange* ranges, uint32_t at, uint32_t end,
                                            int key) {
  while (at < end) {
    const uint32_t middle = at + (end - at) / 2;
    if (ranges[middle].hi > key) {
      end = middle;
    } else {
      at = middle + 1;
    }
  }
  return at;
}

// The key tiles of a row tile, one after the other: columns, then ranges, rising; or blocks; or,
// dense, all keys. Who counts them knows where they end.
class SparseKeys {
 public:
  __device__ SparseKeys(const SparseArgs& a, uint32_t item, uint32_t head, TokenRange rows)
      : a_(a), first_(rows.lo), end_of_rows_(rows.hi) {
    if (a.tiles[item] == (rows.hi + kKeyTile - 1) / kKeyTile) {
      end_ = rows.hi;
      return;
    }
    blocks_ = a.kind[head] == HeadKind::kBlocks;
    if (blocks_) {
      next_ = a.block_first[item];
    } else {
      next_ = FirstRangeBehind(a.ranges, a.range_first[head], a.range_first[head + 1],
                               -static_cast<int>(first_));
      end_ = a.columns_seen[item];
    }
    ReadAhead();
    if (end_ == 0) Enter();
  }

  // The present tile: keys [lo(), hi()), of the compacted columns or of all tokens.
  __device__ uint32_t lo() const { return lo_; }
  __device__ uint32_t hi() const { return min(lo_ + kKeyTile, end_); }
  // To the next one; there is one.
  __device__ void Advance() {
    lo_ += kKeyTile;
    if (lo_ >= end_) Enter();
  }

 private:
  __device__ void Enter() {
    if (blocks_) {
      lo_ = static_cast<uint32_t>(ahead_.lo) * kKeyTile;
      end_ = min(lo_ + kKeyTile, end_of_rows_);
    } else {
      lo_ = static_cast<uint32_t>(max(0, static_cast<int>(first_) + ahead_.lo));
      end_ = min(static_cast<uint32_t>(static_cast<int>(first_) + ahead_.hi), end_of_rows_);
    }
    ++next_;
    ReadAhead();
  }
  __device__ void ReadAhead() {
    if (blocks_) {
      ahead_.lo = static_cast<int32_t>(a_.blocks[next_]);
    } else {
      ahead_ = a_.ranges[next_];
    }
  }

  const SparseArgs& a_;
  const uint32_t first_, end_of_rows_;
  bool blocks_ = false;
  uint32_t lo_ = 0, end_ = 0;
  uint32_t next_ = 0;    // range or block behind the present one
  RelativeRange ahead_;  // which it is; of a block only lo, its number
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

  SparseKeys tiles(a, item, head, rows);
  const uint32_t steps = a.tiles[item];
  // The first so many are of columns.
  const bool dense = steps == (rows.hi + kKeyTile - 1) / kKeyTile;
  const uint32_t column_steps = dense ? 0 : (a.columns_seen[item] + kKeyTile - 1) / kKeyTile;
  const uint32_t column_first = a.column_first[head];
  const uint32_t mask_first =
      a.mask_first[head] * a.row_tiles + row_tile * (a.mask_first[head + 1] - a.mask_first[head]);
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

// Finds the columns outside the ranges, 64 of a row tile a thread. Grid: any, heads.
__device__ inline void MaskColumns(const SparseArgs& a, uint32_t threads) {
  const uint32_t head = blockIdx.y, tiles = a.mask_first[head + 1] - a.mask_first[head];
  const uint32_t first = a.column_first[head], last_range = a.range_first[head + 1];
  const uint32_t count = tiles * a.row_tiles;
  for (uint32_t i = blockIdx.x * threads + threadIdx.x; i < count; i += gridDim.x * threads) {
    const uint32_t row_tile = i / tiles, from = i % tiles * kKeyTile;
    const uint32_t seen = a.columns_seen[head * a.row_tiles + row_tile];
    const int row = static_cast<int>(a.first_token + row_tile * kRowTile);
    uint32_t range = a.range_first[head];
    uint64_t mask = 0;
    for (uint32_t c = from; c < min(seen, from + kKeyTile); ++c) {
      const int key = static_cast<int>(a.columns[first + c]) - row;
      range = FirstRangeBehind(a.ranges, range, last_range, key);
      const bool inside = range < last_range && a.ranges[range].lo <= key;
      if (!inside) mask |= uint64_t{1} << (c - from);
    }
    a.column_masks[a.mask_first[head] * a.row_tiles + i] = mask;
  }
}

}  // namespace quarry::cuda

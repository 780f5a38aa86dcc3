// How many key tiles a row tile has of a head's ranges and columns, in a time that does not grow
// with them: CountRowTiles (gpu/sparse/sparse_index.h) for one row tile.
#pragma once

#include "gpu/cuda/sparse_keys.cuh"
#include "gpu/sparse/head_cost.h"

namespace quarry::cuda {

// A head's ranges, of which there is at least one, and the key tiles of those before each.
struct HeadRanges {
  const RelativeRange* ranges;
  const uint32_t* tiles;  // [count + 1]
  uint32_t count;
};

__device__ inline uint32_t TilesFor(uint32_t keys) { return (keys + kKeyTile - 1) / kKeyTile; }

// A range's keys of a row tile; it has some.
__device__ inline TokenRange ClipTo(const RelativeRange& range, TokenRange rows) {
  const int first = static_cast<int>(rows.lo);
  return {static_cast<uint32_t>(max(0, first + range.lo)),
          min(rows.hi, static_cast<uint32_t>(first + range.hi))};
}

__device__ inline uint32_t RangeTilesOf(const HeadRanges& head, TokenRange rows) {
  const uint32_t last = head.count - 1;  // reaches the diagonal
  const uint32_t first = FirstRangeBehind(head.ranges, 0, last, -static_cast<int>(rows.lo));
  // Only the first one may begin before token 0, only the last one end behind the rows.
  const TokenRange from = ClipTo(head.ranges[first], rows);
  if (first == last) return TilesFor(from.hi - from.lo);
  const TokenRange to = ClipTo(head.ranges[last], rows);
  return TilesFor(from.hi - from.lo) + head.tiles[last] - head.tiles[first + 1] +
         TilesFor(to.hi - to.lo);
}

// Columns before this token are not in the range that reaches the diagonal.
__device__ inline uint32_t DiagonalOf(const HeadRanges& head, TokenRange rows) {
  return static_cast<uint32_t>(max(0, static_cast<int>(rows.lo) + head.ranges[head.count - 1].lo));
}

// As SparseIsCheaper, where dense is taken where it is cheaper.
__device__ inline bool RunsSparse(uint32_t sparse, uint32_t dense) {
  return kSparseTileEighths * sparse < 8 * uint64_t{dense};
}

}  // namespace quarry::cuda

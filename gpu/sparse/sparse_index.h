// What the heads of a layer attend in a sparse prefill, as flat arrays that fit a device.
//
// Rows are cut into row tiles of 128 from the first one, keys are read 64 at a time. A slash s (the
// distance at which rows attend) touches, for the row tile that begins at token i0, the keys
// [i0 - s, i0 + 128 - s). Before clipping at token 0 the union of a head's slashes is therefore the
// same for every row tile, relative to i0: one list of ranges serves them all, and one list of
// columns, which are absolute. Row i attends key j <= i if j is in its row tile's ranges or is one
// of the columns; a column inside the ranges counts once.
//
// How a kernel runs the row tile [i0, i1), and what cost counts:
// - each range, clipped to [max(0, i0 + lo), min(i0 + hi, i1)), in key tiles of 64 from its start;
// - the columns from a K/V compacted once per head, 64 a tile, of which only the first columns_seen
//   matter: later ones lie in the last range. That range reaches the diagonal, so columns need no
//   causal mask, but those inside other ranges must be masked;
// - blocks b of block patterns: keys [64 b, min(64 b + 64, i1)), one tile each;
// - a dense row tile: keys [0, i1).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "proto/types.h"

namespace quarry {

inline constexpr uint32_t kRowTile = 128, kKeyTile = 64;
// That so many keys fill, the last one perhaps in part.
constexpr uint32_t KeyTilesOf(uint32_t keys) { return (keys + kKeyTile - 1) / kKeyTile; }
// Of one head that is dense, by all row tiles of these rows.
uint64_t DenseTilesOf(TokenRange rows);

// Keys [i0 + lo, i0 + hi) of the row tile that begins at token i0.
struct RelativeRange {
  int32_t lo = 0;
  int32_t hi = 0;
  friend bool operator==(const RelativeRange&, const RelativeRange&) = default;
};

enum class HeadKind : uint32_t { kDense = 0, kRanges = 1, kBlocks = 2 };

// Of consecutive rows of one layer, all query heads. Plain data.
struct SparseIndex {
  uint32_t first_token = 0;  // of the rows, and of row tile 0
  uint32_t rows = 0;
  uint32_t heads = 0;

  std::vector<HeadKind> kind;         // [heads]
  std::vector<uint32_t> range_first;  // [heads + 1], where each head's ranges begin
  std::vector<RelativeRange>
      ranges;  // rising, disjoint, not touching; a head's last one ends at 128
  std::vector<uint32_t> column_first;  // [heads + 1]
  std::vector<uint32_t> columns;       // tokens, rising
  std::vector<uint32_t> block_first;   // [heads * row_tiles + 1]
  std::vector<uint32_t> blocks;        // of 64 keys from token 0, rising within a row tile

  // [heads][row_tiles]: key tiles to run. A row tile is dense exactly where this is
  // DenseTiles(t): a sparse one has fewer.
  std::vector<uint32_t> tiles;
  std::vector<uint32_t> columns_seen;  // [heads][row_tiles], see above

  uint32_t row_tiles() const { return (rows + kRowTile - 1) / kRowTile; }
  TokenRange RowsOf(uint32_t t) const {
    const uint32_t lo = first_token + t * kRowTile, end = first_token + rows;
    return {lo, end - lo > kRowTile ? lo + kRowTile : end};
  }
  size_t At(uint32_t head, uint32_t t) const { return size_t{head} * row_tiles() + t; }
  uint32_t DenseTiles(uint32_t t) const { return KeyTilesOf(RowsOf(t).hi); }
  bool IsDense(uint32_t head, uint32_t t) const { return tiles[At(head, t)] == DenseTiles(t); }

  std::span<const RelativeRange> RangesOf(uint32_t head) const {
    return std::span(ranges).subspan(range_first[head], range_first[head + 1] - range_first[head]);
  }
  std::span<const uint32_t> ColumnsOf(uint32_t head) const {
    return std::span(columns).subspan(column_first[head],
                                      column_first[head + 1] - column_first[head]);
  }
  std::span<const uint32_t> BlocksOf(uint32_t head, uint32_t t) const {
    const uint32_t first = block_first[At(head, t)];
    return std::span(blocks).subspan(first, block_first[At(head, t) + 1] - first);
  }

  // In key tiles of 64 for 128 rows.
  uint64_t HeadCost(uint32_t head) const;
  uint64_t Cost() const;           // of all heads
  uint64_t DenseHeadCost() const;  // of one head, were it dense
};

// What one row tile of a head attends, by the token.
struct RowTileKeys {
  TokenRange rows;
  std::vector<TokenRange> ranges;  // rising, disjoint, not empty
  uint32_t columns = 0;            // the head's first so many, those inside ranges included

  // Key tiles that a kernel runs for it.
  uint32_t tiles() const;
};
// Overwrites `out`. O(ranges or blocks).
void RowTileKeysOf(const SparseIndex& index, uint32_t head, uint32_t t, RowTileKeys* out);

// The parts [first, last) of `columns`' first `seen` that lie outside the ranges, rising.
// O(ranges * log columns).
void ColumnsOutside(std::span<const uint32_t> columns, uint32_t seen,
                    std::span<const TokenRange> ranges, std::vector<TokenRange>* out);

// The ranges of rising, distinct slashes; slash 0, the diagonal, is always in. Ranges begin so that
// they fill whole key tiles, and merge where they touch then: reading costs no tile more.
std::vector<RelativeRange> RangesOfSlashes(std::span<const uint32_t> slashes);

// Clips a head's ranges to a row tile. Overwrites `out`.
void ClipRanges(std::span<const RelativeRange> ranges, TokenRange rows,
                std::vector<TokenRange>* out);

// The key tiles of the ranges, and the columns to be seen, of every row tile of rows
// [first_token, first_token + rows). O(ranges + columns + row tiles).
struct RowTileCounts {
  std::vector<uint32_t> range_tiles, columns_seen;  // [row_tiles]
  // Of ranges and columns of a row tile.
  uint32_t Tiles(size_t t) const { return range_tiles[t] + KeyTilesOf(columns_seen[t]); }
};
RowTileCounts CountRowTiles(std::span<const RelativeRange> ranges,
                            std::span<const uint32_t> columns, TokenRange rows);

}  // namespace quarry

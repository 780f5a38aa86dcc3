// What the kernels that choose columns and slashes are told: of "lines", heads of vertical-slash
// patterns, in three steps. The last queries' attention is summed by key and by distance; of these
// sums, columns and slashes are tried and the best kept; what was kept goes to a plan's lists.
// Plain C++, as sparse_args.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpu/cuda/sparse_args.h"
#include "gpu/sparse/line_rules.h"

namespace quarry::cuda {

inline constexpr uint32_t kNoHead = ~0u;
// Keys that a block of threads scores: a stretch.
inline constexpr uint32_t kStretchKeys = 16 * kKeyTile;
// Heads of one KV head that a block of threads scores.
inline constexpr uint32_t kLinesTogether = 2;

// What is asked of a head.
struct Line {
  uint32_t head;  // kNoHead: only a place, next to a head whose KV head no other line has
  uint32_t columns, slashes;  // by number
  double mass;                // by mass, in (0, 1]; 0: by number
  double most_share;          // by mass: of the dense tiles
};

// The last queries, which are at the end of all tokens.
struct LastQueryArgs {
  const float* q;      // [queries][heads][head_dim]
  const std::byte* k;  // as DeviceKv
  size_t head_stride;  // bytes
  uint32_t heads, group, head_dim, queries, tokens;
  float scale_log2;  // as in SparseArgs
  DType dtype;       // of k

  // Those at 2 i and 2 i + 1 share a KV head.
  const Line* lines;
  uint32_t line_count;  // even
  uint32_t split;       // queries of the first of the row tiles that they lie in; perhaps all

  // Of each stretch of keys the largest score times log2(e), and the sum of 2^(score - largest).
  float* parts;   // [lines][stretches][kLastQueries][2]
  float* shifts;  // [lines][kLastQueries]: log2 of the softmax's denominator
  // Of the softmax: by key of the first `split` queries; of the others, written only if there are
  // some; by distance.
  float* sums;     // [lines][3][width]
  uint32_t width;  // at least tokens
};
constexpr uint32_t StretchesOf(uint32_t tokens) {
  return (tokens + kStretchKeys - 1) / kStretchKeys;
}

// Masses are summed in whole units, so that no order shows: all of them are at most kLastQueries,
// 2^31 units.
inline constexpr float kMassUnits = 1 << 25;

// The largest numbers that lists of ranges need room for: ranges lie at least 129 keys apart.
constexpr uint32_t MostRanges(uint32_t tokens) { return tokens / (kRowTile + 1) + 2; }
constexpr uint32_t WordsOf(uint32_t tokens) { return (tokens + 31) / 32; }

// Of the bits of a try [kTryBits][WordsOf]: those of its columns, and how many columns are in words
// before; the rest is working memory.
inline constexpr uint32_t kTryBits = 4, kTryColumns = 3, kTryBefore = 2;

// Two of a head's chosen slashes that are too far apart for one range: the farther one, and the
// nearer one before it.
struct LineBreak {
  uint32_t before, start;
};

// What a try of a line has come to.
struct LineTry {
  uint32_t ranges, columns;              // how many
  uint64_t tiles, eighths, dense_tiles;  // as HeadCost
  uint32_t captured, mass;               // units: of what is attended and of all
  uint32_t is_complete;  // else the ranges alone have too many tiles, and only these are known
};

struct ChooseLinesArgs {
  const Line* lines;
  const float* sums;  // as LastQueryArgs
  uint32_t line_count, width, tokens;
  TokenRange prefill;
  TokenRange last_tiles[2];  // row tiles that the last queries lie in; the second may be empty
  uint32_t tries;            // places for them: of a line by mass all are, of others the first

  LineTry* results;  // [lines][tries]
  // Of each try, one behind the other.
  RelativeRange* ranges;  // [MostRanges], as SparseIndex's
  uint32_t* range_tiles;  // [MostRanges + 1]: key tiles of the ranges before each
  uint32_t* bits;         // [kTryBits][WordsOf]
  LineBreak* breaks;  // [MostRanges], working memory
};

// What is kept of lines, one's behind the other's, as a try has it.
struct KeptLines {
  LineTry* results;  // is_complete: the head is sparse
  RelativeRange* ranges;
  uint32_t* range_tiles;
  uint32_t* columns;         // bits
  uint32_t* columns_before;  // in words before
};

// The best try of each line.
struct KeepLinesArgs {
  ChooseLinesArgs tried;
  uint64_t choosing_eighths;  // what choosing is taken to cost a head
  KeptLines kept;             // written
};

// A plan's lists, as a SparseIndex has them, and what else kernels ask of them.
struct PlanArrays {
  HeadKind* kind;          // [heads]
  uint32_t* range_first;   // [heads + 1]
  uint32_t* column_first;  // [heads + 1]
  uint32_t* mask_first;    // [heads + 1]: tiles of columns, as SparseArgs
  uint32_t* blocks;        // [heads]: of block-sparse patterns, how many
  uint32_t* block_place;   // [heads]: how many heads of block patterns come before
  RelativeRange* ranges;
  // Of each head, from range_first[head] + head on: as LineLists.
  uint32_t* range_tiles;
  uint32_t* columns;
};

// From what was kept to the plan.
struct EmitLinesArgs {
  const Line* lines;
  uint32_t line_count, tokens;
  KeptLines kept;
  PlanArrays plan;  // written where the lines' heads have their lists
};

}  // namespace quarry::cuda

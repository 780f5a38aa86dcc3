// The inner loops of attention over keys and values, one table per instruction set. Plain data
// only: the level files include this and intrinsics, nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proto/coded_tile.h"
#include "proto/head_dim.h"

namespace quarry::kernels {

// Element types of K and V; the values of DType.
inline constexpr uint8_t kBf16 = 1, kFp16 = 2, kFp32 = 3;

// Scores of a tile: out[i * ld_out + t] = q_i . k_t * scale, clamped to finite floats.
struct ScoreTile {
  const float* q;          // [queries][head_dim]
  const uint16_t* q_bf16;  // the same queries, if they are exactly bf16; else null
  uint32_t queries;
  uint32_t head_dim;  // IsHeadDim
  const void* k;      // [tokens][head_dim] of dtype
  uint32_t tokens;
  uint8_t dtype;
  float scale;
  float* out;
  size_t ld_out;     // in floats
  const void* next;  // where the keys go on after this tile, for prefetching; may be null
};

// acc[i * head_dim + d] += sum over t of p[i * ld_p + t] * v[row(t) * head_dim + d], with
// row(t) = rows ? rows[t] : t.
struct AccumulateTile {
  const float* p;
  size_t ld_p;
  uint32_t queries;
  uint32_t head_dim;  // a multiple of 16, however large
  const void* v;
  const uint32_t* rows;
  uint32_t tokens;
  uint8_t dtype;
  float* acc;
  const void* next;  // as in ScoreTile
};

// Keys and values of tokens [first, first + tokens), both [tokens][head_dim]; or both coded strips
// (storage/CODECS.md).
struct AttendSegment {
  const void* k;
  const void* v;
  uint32_t first;
  uint32_t tokens;
};

// Attention of each query over its tokens [lo, hi) of some segments in token order, in one pass
// over keys and values for all queries.
struct AttendRun {
  const float* q;  // [queries][head_dim]
  uint32_t queries;
  uint32_t head_dim;  // as in ScoreTile
  uint8_t dtype;      // of keys and values; attend_coded: their codec, of coded::
  uint8_t q_parts;    // bf16 numbers that sum up to any element of q exactly: 1, 2 or 3
  float scale;
  const AttendSegment* segments;
  size_t segment_count;
  const uint32_t* lo;  // [queries]
  const uint32_t* hi;
  float* max;     // [queries], -infinity where the range has no token of the segments
  float* sum;     // [queries] of e^(score - max)
  float* acc;     // [queries][head_dim], sum of e^(score - max) * value
  void* scratch;  // of attend_scratch_bytes, 64-byte aligned
};

// Sums of weighted coordinates of coded keys. A block holds kCodeBlockKeys keys in four vectors of
// 64 bytes, byte j of lane t (4 bytes) belonging to key t: vectors v = 0 and 1 hold coordinates
// 8 v + j and 8 v + 4 + j in the low and high 4 bits, vectors 2 and 3 coordinates
// 16 + 16 (v - 2) + 4 s + j in bits 2 s and 2 s + 1.
inline constexpr uint32_t kCodeCoordinates = 48, kCodeBlockKeys = 16;
struct CodeTile {
  const uint8_t* codes;   // [][256]
  const uint32_t* which;  // [blocks] of them to take; null: the first ones
  uint32_t blocks;
  const int8_t* weights;  // [queries][kCodeCoordinates]
  uint32_t queries;
  int32_t* out;           // out[i * ld_out + key], keys of what is taken one behind another
  size_t ld_out;
};

// Scores beyond kMostScore become it, and what is no number has none (-infinity): budgets compare
// and subtract them.
inline constexpr float kMostScore = 1e30f;

// Scores of nodes, groups of keys: the log of the mean of e^score over a node's keys, whose scores are
// taken as normal around their centre's. A block is kCodeBlockKeys nodes: their centroids are twelve
// vectors of 64 bytes, byte j of lane t (4 bytes) of vector v being coordinate 4 v + j of node t,
// plus 128. out[i * ld_out + n] = scale[i] * sum + offset[i]
//                                 + 0.5 * min(variance[n] * breadth[i], kMostNodeVariance).
inline constexpr uint32_t kCentroidBlockBytes = kCodeCoordinates * kCodeBlockKeys;
// Beyond it the tail of a normal distribution says nothing about 16 or 256 keys.
inline constexpr float kMostNodeVariance = 6;
struct NodeTile {
  const uint8_t* centroids;  // [][kCentroidBlockBytes]
  const float* variance;     // [][kCodeBlockKeys]
  const uint32_t* which;     // as in CodeTile
  uint32_t blocks;
  const int8_t* weights;     // [queries][kCodeCoordinates]
  const float* scale;        // [queries], as the next two
  const float* offset;
  const float* breadth;
  uint32_t queries;
  float* out;  // nodes of what is taken one behind another
  size_t ld_out;
  float* centre;  // as out, but without the spread; may be null
};

// Scores of coded keys around the centres of their blocks: out[i * ld_out + key] =
// (scale[i] * sum + offset[i]) * key_scale[key] + centre[i * ld_centre + block taken].
struct CodedKeyTile {
  const uint8_t* codes;       // as in CodeTile
  const uint16_t* key_scale;  // bf16 [][kCodeBlockKeys]
  const uint32_t* which;      // as in CodeTile
  uint32_t blocks;
  const int8_t* weights;
  const float* scale;  // [queries]
  const float* offset;
  uint32_t queries;
  const float* centre;
  size_t ld_centre;
  float* out;
  size_t ld_out;
};

// Rows of coded keys. Eight consecutive coordinates are a group of 8 * bits consecutive bits, low
// first; 64 coordinates, a part, begin at a byte of their own and fill at most 64 bytes. Coordinate
// c is (the 8 bytes from[c & ~7 .. c | 7] of its part, which follow one another) >> shift[c] &
// mask[c]; coordinates behind the last have weight 0 and mask 0. A line behind the last row is
// readable. out[i * ld_out + r] = (scale[i] * (the sum of weights by codes) + offset[i]) *
// row_scale[which[r]].
struct KeyRowTile {
  const uint8_t* rows;
  size_t stride;              // in bytes
  const uint16_t* row_scale;  // bf16
  const uint32_t* which;      // [count] rows to take
  uint32_t count;
  uint32_t parts;             // at most kMaxHeadDim / 64
  const uint16_t* part;       // [parts] where each begins in a row
  const uint8_t* from;        // [parts * 64]
  const uint8_t* shift;
  const uint8_t* mask;
  const int8_t* weights;      // [queries][parts * 64]
  const float* scale;         // [queries]
  const float* offset;
  uint32_t queries;
  float* out;
  size_t ld_out;
};

// acc[i * dims + d] += sum over r of
//     weights[i * ld_weights + r] * row_scale[which[r]] * (code(which[r], d) - 7.5).
// Of each kValueRowGroup dimensions the first half are the low, the others the high 4 bits of as
// many bytes.
inline constexpr uint32_t kValueRowGroup = 32;
struct ValueRowTile {
  const uint8_t* rows;
  size_t stride;          // in bytes
  const uint16_t* row_scale;  // bf16
  const uint32_t* which;  // [count] rows to take
  uint32_t count;
  uint32_t dims;          // a multiple of kValueRowGroup
  const float* weights;
  size_t ld_weights;
  uint32_t queries;
  float* acc;
};

// Lengths of rows of numbers: squares[r] is the sum of (x[r * width + c] * weight[c])^2 over c,
// most[r] the largest of them.
struct LengthTile {
  const float* x;       // [rows][width]
  uint32_t rows;
  uint32_t width;
  const float* weight;  // [width]
  float* squares;       // [rows]
  float* most;          // [rows]
};

// Levels of uniform quantisers: out[r * ld_out + c] is
//     x[r * ld_x + c] * inverse_step[c] * factor[r] + half[c],
// rounded down to a whole number of [0, 2 half[c]); 0 for what is no number.
struct LevelTile {
  const float* x;
  size_t ld_x;  // in floats
  uint32_t rows;
  uint32_t width;
  const float* inverse_step;  // [width]
  const float* half;          // [width] at most 128
  const float* factor;        // [rows]; null: 1
  uint8_t* out;
  size_t ld_out;
};

inline constexpr uint32_t kHistogramBins = 256;

struct Table {
  const char* name;
  size_t (*attend_scratch_bytes)(const AttendRun&);
  void (*attend)(const AttendRun&);  // overwrites max, sum and acc
  // The same over strips whose scales are ones that CheckCodedStrip accepts.
  size_t (*attend_coded_scratch_bytes)(const AttendRun&);
  void (*attend_coded)(const AttendRun&);
  void (*score)(const ScoreTile&);
  void (*accumulate)(const AccumulateTile&);
  float (*max)(const float* x, size_t n);             // -infinity for n = 0
  float (*exp_sum)(float* x, size_t n, float shift);  // x = e^(x - shift) in place; their sum
  void (*scale)(float* x, size_t n, float factor);
  void (*sum_codes)(const CodeTile&);
  void (*score_nodes)(const NodeTile&);
  void (*score_codes)(const CodedKeyTile&);
  // Writes which of the blocks taken have a key whose score for some query i is at least least[i],
  // before scores are bounded or after, and returns how many; the tile's `out` is not used. found:
  // [blocks + 1].
  uint32_t (*find_codes)(const CodedKeyTile&, const float* least, uint32_t* found);
  // Writes, rising, which i < n have x[r * ld + i] >= least[r] for some row r, and returns how many.
  // out: [n + 16].
  size_t (*select)(const float* x, size_t ld, uint32_t rows, size_t n, const float* least,
                   uint32_t* out);
  // out[g]: the sum of e^(x - shift) over the g-th kCodeBlockKeys of x.
  void (*exp_groups)(const float* x, size_t groups, float shift, float* out);
  // Adds to counts[b], b < kHistogramBins, how many of x lie b to b + 1 steps of 1 / per_unit below
  // top: those above it in the first, those far below and -infinity in the last.
  void (*histogram)(const float* x, size_t n, float top, float per_unit, uint32_t* counts);
  void (*score_key_rows)(const KeyRowTile&);
  void (*add_value_rows)(const ValueRowTile&);
  void (*measure_rows)(const LengthTile&);
  void (*quantise)(const LevelTile&);
};

// Each defined in its own file, compiled for that instruction set alone.
const Table& ScalarTable();
const Table& Avx2Table();
const Table& Avx512Table();
const Table& AmxTable();

}  // namespace quarry::kernels

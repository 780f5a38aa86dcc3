// What the AMX kernels share: tiles of bf16 parts, and the scores of 64 tokens and 16 queries.
//
// A number is the sum of bf16 parts, whose products are exact: fp32 has three, fp16 two. Sums are
// fp32. Tile registers: 0-3 hold sums, 4-7 operands.
#pragma once

#include <immintrin.h>

#include "cpu_index/vector_avx512.h"

namespace quarry::kernels {
namespace {

constexpr uint32_t kTileTokens = 64;
constexpr uint32_t kBlockQueries = 16;
constexpr uint32_t kChunkDims = 32;
constexpr uint32_t kMaxChunks = kMaxHeadDim / kChunkDims;
constexpr uint32_t kMaxQueryParts = 3;
constexpr size_t kTileBytes = 1024;  // 16 rows of 64 bytes

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline uint32_t ChunksOf(uint32_t head_dim) { return (head_dim + kChunkDims - 1) / kChunkDims; }
inline uint32_t KvParts(uint8_t dtype) { return dtype == kFp16 ? 2 : 1; }

// The dimensions of chunk c that there are: 32, or the last 16.
inline __mmask32 ChunkMask(uint32_t head_dim, uint32_t c) {
  return head_dim - c * kChunkDims >= kChunkDims ? 0xffffffffu : 0xffffu;
}

// [x.bf16, y.bf16]: 32 floats in order, rounded.
inline __m512i PackBf16(__m512 x, __m512 y) { return (__m512i)_mm512_cvtne2ps_pbh(y, x); }
inline __m512 WidenLow(__m512i x) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16));
}
inline __m512 WidenHigh(__m512i x) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16));
}

// out[j] has element j of every row.
inline void Transpose16(const __m512i* rows, __m512i* out) {
  __m512i pairs[16], quads[16];
  for (int t = 0; t < 16; t += 2) {
    pairs[t] = _mm512_unpacklo_epi32(rows[t], rows[t + 1]);
    pairs[t + 1] = _mm512_unpackhi_epi32(rows[t], rows[t + 1]);
  }
  for (int t = 0; t < 16; t += 4) {
    for (int j = 0; j < 2; ++j) {
      quads[t + 2 * j] = _mm512_unpacklo_epi64(pairs[t + j], pairs[t + 2 + j]);
      quads[t + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[t + j], pairs[t + 2 + j]);
    }
  }
  for (int j = 0; j < 4; ++j) {  // quads[4 g + j] has, in lane l, element 4 l + j of rows 4 g ..
    const __m512i x0 = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
    const __m512i x1 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512i y0 = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
    const __m512i y1 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
    out[j] = _mm512_shuffle_i32x4(x0, x1, 0x88);
    out[4 + j] = _mm512_shuffle_i32x4(y0, y1, 0x88);
    out[8 + j] = _mm512_shuffle_i32x4(x0, x1, 0xdd);
    out[12 + j] = _mm512_shuffle_i32x4(y0, y1, 0xdd);
  }
}

// Queries [first, first + 16) as right operands, one tile per [chunk][part]: rows are pairs of
// dimensions, 32-bit columns are queries. Missing queries are 0.
inline void PackQueries(const float* q, uint32_t queries, uint32_t head_dim, uint32_t q_parts,
                        uint32_t first, char* out) {
  for (uint32_t c = 0; c < ChunksOf(head_dim); ++c) {
    const bool whole = ChunkMask(head_dim, c) == 0xffffffffu;
    __m512i rows[kMaxQueryParts][16];
    for (uint32_t i = 0; i < kBlockQueries; ++i) {
      const bool there = first + i < queries;
      const float* at = q + size_t{there ? first + i : first} * head_dim + c * kChunkDims;
      __m512 x = _mm512_maskz_loadu_ps(there ? 0xffff : 0, at);
      __m512 y = _mm512_maskz_loadu_ps(there && whole ? 0xffff : 0, whole ? at + 16 : at);
      for (uint32_t p = 0; p < q_parts; ++p) {
        rows[p][i] = PackBf16(x, y);
        x = _mm512_sub_ps(x, WidenLow(rows[p][i]));
        y = _mm512_sub_ps(y, WidenHigh(rows[p][i]));
      }
    }
    for (uint32_t p = 0; p < q_parts; ++p) {
      __m512i columns[16];
      Transpose16(rows[p], columns);
      char* tile = out + (size_t{c} * q_parts + p) * kTileBytes;
      for (int j = 0; j < 16; ++j) _mm512_store_si512(tile + j * 64, columns[j]);
    }
  }
}

// 32 numbers of a row as bf16 parts; the second only for fp16.
template <uint8_t kDtype>
inline void SplitParts(__m512i x, __m512i* parts) {
  if constexpr (kDtype == kBf16) {
    parts[0] = x;
  } else {
    const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
    const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
    parts[0] = PackBf16(low, high);
    parts[1] =
        PackBf16(_mm512_sub_ps(low, WidenLow(parts[0])), _mm512_sub_ps(high, WidenHigh(parts[0])));
  }
}

// The keys of some groups of 16 tokens for tile loads: rows `stride` bytes apart; chunks of
// dimensions, groups of 16 tokens and parts by their own steps.
struct TileKeys {
  const char* at;
  size_t stride, chunk_step, group_step, part_step;
};

// Bytes to stage the keys of some groups of 16 tokens.
inline size_t StagedKeyBytes(uint32_t head_dim, uint8_t dtype, uint32_t groups) {
  return size_t{KvParts(dtype)} * ChunksOf(head_dim) * groups * kTileBytes;
}

// Where all rows are whole chunks of bf16, tiles are loaded from the keys as they lie. Else they
// are staged; tokens past the end and dimensions past head_dim are 0.
template <uint8_t kDtype, uint32_t kGroupsOf16>
TileKeys KeysOf(const uint16_t* k, uint32_t head_dim, uint32_t tokens, char* staging) {
  constexpr uint32_t kAll = kGroupsOf16 * 16;
  if (kDtype == kBf16 && tokens == kAll && head_dim % kChunkDims == 0) {
    return {reinterpret_cast<const char*>(k), size_t{head_dim} * 2, 64, size_t{head_dim} * 32, 0};
  }
  constexpr uint32_t kParts = kDtype == kFp16 ? 2 : 1;
  const uint32_t chunks = ChunksOf(head_dim);
  const TileKeys keys = {staging, 64, kTileBytes, chunks * kTileBytes,
                         kGroupsOf16 * chunks * kTileBytes};
  for (uint32_t t = 0; t < kAll; ++t) {
    const bool there = t < tokens;
    const uint16_t* row = k + size_t{there ? t : 0} * head_dim;
    char* at = staging + t / 16 * keys.group_step + t % 16 * 64;
    for (uint32_t c = 0; c < chunks; ++c) {
      __m512i parts[2];
      SplitParts<kDtype>(
          _mm512_maskz_loadu_epi16(there ? ChunkMask(head_dim, c) : 0, row + c * kChunkDims),
          parts);
      for (uint32_t p = 0; p < kParts; ++p) {
        _mm512_store_si512(at + p * keys.part_step + c * keys.chunk_step, parts[p]);
      }
    }
  }
  return keys;
}

// Memory that is wanted soon, fetched a few lines at a time beside the arithmetic, as evenly in
// time as can be: few fetches can be under way, so those that come in bursts wait for each other
// and the arithmetic for them, and memory that idles meanwhile never makes up for it. Two streams
// (which may be halves of one) of `lines` lines each are spread over `units` of work.
class Fetcher {
 public:
  Fetcher(const void* first, const void* second, size_t lines, size_t units)
      : at_{reinterpret_cast<uintptr_t>(first), reinterpret_cast<uintptr_t>(second)},
        pace_(static_cast<uint32_t>((lines * kOne + units - 1) / units)) {}

  // After kUnits of work. Inlined as RowStream::FetchAhead.
  template <uint32_t kUnits>
  [[gnu::always_inline]] void Step() {
    due_ += kUnits * pace_;
    for (; due_ >= kOne; due_ -= kOne) {
      for (uintptr_t& at : at_) {
        __builtin_prefetch(reinterpret_cast<const char*>(at));
        at += 64;
      }
    }
  }

 private:
  static constexpr uint32_t kOne = 256;  // a line
  uintptr_t at_[2];
  const uint32_t pace_;  // per unit
  uint32_t due_ = 0;
};

constexpr uint32_t kScoreWork = 4;  // units per chunk

// One chunk and part of the keys with kParts parts of the queries, for four groups of 16 tokens.
template <int kParts>
inline void AddScores(const TileKeys& keys, const char* k, const char* q, Fetcher* fetcher) {
  _tile_loadd(5, q, 64);
  if constexpr (kParts > 1) _tile_loadd(6, q + kTileBytes, 64);
  if constexpr (kParts > 2) _tile_loadd(7, q + 2 * kTileBytes, 64);
#define QUARRY_ADD_GROUP(group)                             \
  fetcher->Step<1>();                                       \
  _tile_loadd(4, k + (group)*keys.group_step, keys.stride); \
  _tile_dpbf16ps(group, 4, 5);                              \
  if constexpr (kParts > 1) _tile_dpbf16ps(group, 4, 6);    \
  if constexpr (kParts > 2) _tile_dpbf16ps(group, 4, 7)
  QUARRY_ADD_GROUP(0);
  QUARRY_ADD_GROUP(1);
  QUARRY_ADD_GROUP(2);
  QUARRY_ADD_GROUP(3);
#undef QUARRY_ADD_GROUP
}

// Products of a tile's keys with a block of packed queries: out [64 tokens][16 queries].
inline void ScoreTokens(uint32_t chunks, uint32_t q_parts, const TileKeys& keys,
                        const char* queries, float* out, Fetcher* fetcher) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (uint32_t c = 0; c < chunks; ++c) {
    const char* k = keys.at + c * keys.chunk_step;
    const char* q = queries + size_t{c} * q_parts * kTileBytes;
    if (q_parts == 1) {
      AddScores<1>(keys, k, q, fetcher);
    } else if (q_parts == 2) {
      AddScores<2>(keys, k, q, fetcher);
    } else {
      AddScores<3>(keys, k, q, fetcher);
    }
  }
  _tile_stored(0, out, 64);
  _tile_stored(1, out + 256, 64);
  _tile_stored(2, out + 512, 64);
  _tile_stored(3, out + 768, 64);
}

}  // namespace
}  // namespace quarry::kernels

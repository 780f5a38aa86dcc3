// The state of queries that are attended together with AMX: up to 16 of them, and their softmax.
//
// A tile of scores has a row per token and a column per query. Where a block has only 8 queries,
// the tiles of two groups of 16 tokens are folded into one, side by side, so that no lane is idle:
// register r then holds, in lane fold * 8 + query, the score of token 16 * fold + r.
#pragma once

#include <limits>

#include "cpu_index/tiles_amx.h"

namespace quarry::kernels {
namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();

// Tokens attended at a time: few, so that their keys and values, the next ones and the block's
// state stay in the first cache level (48 KiB). With 64, 16 queries reached 0.78 of the read
// bandwidth instead of 0.86.
constexpr uint32_t kAttendTileTokens = 32;
constexpr uint32_t kRows = 16;  // of a tile

// Units of work for Fetcher, near the share of the time that each takes.
constexpr uint32_t kKeyTileWork = 4;       // a tile of keys
constexpr uint32_t kRegisterPairWork = 4;  // two registers of scores to weights
constexpr uint32_t kStagePairWork = 1;     // a chunk of two tokens' values
constexpr uint32_t kThirdOfAddWork = 2;    // a third of a chunk's products with values

struct Shape {
  uint32_t chunks;    // of 32 dimensions
  uint32_t q_parts;   // 1, 2 or 3
  uint32_t kv_parts;  // 1 or 2
  uint32_t columns;   // queries of a block: 8 or 16
  uint32_t blocks;
};

inline Shape ShapeOf(const AttendRun& a) {
  const uint32_t columns = a.queries <= 8 ? 8 : 16;
  return {ChunksOf(a.head_dim), a.q_parts, KvParts(a.dtype), columns,
          (a.queries + columns - 1) / columns};
}

// Units of work of one tile.
inline size_t WorkOf(const Shape& s) {
  const size_t score = 2 * s.chunks * s.kv_parts * kKeyTileWork;
  const size_t weigh = s.columns * kRegisterPairWork;
  const size_t add = 3 * s.chunks * s.kv_parts * kThirdOfAddWork;
  return s.blocks * (score + weigh + add) + s.chunks * kAttendTileTokens / 2 * kStagePairWork;
}

// Registers 0 and 1 hold scores, 2 and 3 outputs, 4 and 5 keys or values, 6 queries, 7 weights.
inline TileConfig AttendConfig(const Shape& s) {
  TileConfig config;
  for (int i = 0; i < 2; ++i) config.row_bytes[i] = static_cast<uint16_t>(s.columns * 4);
  config.row_bytes[6] = static_cast<uint16_t>(s.columns * 4);
  config.rows[2] = config.rows[3] = config.rows[7] = static_cast<uint8_t>(s.columns);
  return config;
}

// The running state of one block of queries, a lane each (and fold: sums are the fold's own),
// followed by its weights [high, low], its packed queries [chunk][part] and its output
// [chunk][even, odd], a tile each.
struct Block {
  __m512 max, sum;
  __m512i lo, hi;           // of the queries' ranges
  uint32_t min_lo, max_lo;  // over the queries
  uint32_t min_hi, max_hi;
  bool wanted;  // the current tile has tokens of some query

  char* weights() { return reinterpret_cast<char*>(this + 1); }
  char* q() { return weights() + 2 * kTileBytes; }
  float* o(const Shape& s, uint32_t tile) {
    return reinterpret_cast<float*>(q() + (size_t{s.chunks} * s.q_parts + tile) * kTileBytes);
  }
  bool Wants(uint32_t first, uint32_t tokens) const {
    return max_hi > first && min_lo < first + tokens;
  }
};
static_assert(sizeof(Block) % 64 == 0);

inline size_t BlockBytes(const Shape& s) {
  return sizeof(Block) + (2 + size_t{s.chunks} * (s.q_parts + 2)) * kTileBytes;
}

inline void InitBlock(const AttendRun& a, const Shape& s, uint32_t first, Block* block) {
  block->max = _mm512_set1_ps(kEmpty);
  block->sum = _mm512_setzero_ps();
  alignas(64) uint32_t lo[16], hi[16];
  block->min_lo = block->min_hi = ~0u;
  block->max_lo = block->max_hi = 0;
  for (uint32_t i = 0; i < 16; ++i) {
    // Lanes without a query repeat the first one's range; their scores are 0.
    const uint32_t column = i % s.columns;
    const uint32_t query = first + column < a.queries ? first + column : first;
    lo[i] = a.lo[query];
    hi[i] = a.hi[query] > lo[i] ? a.hi[query] : lo[i];
    block->max_lo = lo[i] > block->max_lo ? lo[i] : block->max_lo;
    block->min_hi = hi[i] < block->min_hi ? hi[i] : block->min_hi;
    if (lo[i] == hi[i]) continue;  // wants nothing
    block->min_lo = lo[i] < block->min_lo ? lo[i] : block->min_lo;
    block->max_hi = hi[i] > block->max_hi ? hi[i] : block->max_hi;
  }
  block->lo = _mm512_load_si512(lo);
  block->hi = _mm512_load_si512(hi);
  PackQueries(a.q, a.queries, a.head_dim, s.q_parts, first, block->q());
  for (uint32_t i = 0; i < s.chunks * 2 * 16; ++i) {
    _mm512_store_ps(block->o(s, 0) + i * 16, _mm512_setzero_ps());
  }
}

// What all folds have together, in every fold.
template <uint32_t kColumns>
inline __m512 MaxOfFolds(__m512 x) {
  return kColumns == 16 ? x : _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
}
inline __m512 SumOfFolds(const Shape& s, __m512 x) {
  return s.columns == 16 ? x : _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
}

// The block's state to the caller, dimensions in order.
void StoreBlock(const AttendRun& a, const Shape& s, uint32_t first, Block* block) {
  const uint32_t count = a.queries - first < s.columns ? a.queries - first : s.columns;
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  _mm512_mask_storeu_ps(a.max + first, mask, block->max);
  _mm512_mask_storeu_ps(a.sum + first, mask, SumOfFolds(s, block->sum));
  for (uint32_t i = 0; i < count; ++i) {
    float* out = a.acc + size_t{first + i} * a.head_dim;
    for (uint32_t c = 0; c < s.chunks; ++c) {
      const __m512 even = _mm512_load_ps(block->o(s, 2 * c) + i * 16);
      const __m512 odd = _mm512_load_ps(block->o(s, 2 * c + 1) + i * 16);
      const __m512 low = _mm512_shuffle_f32x4(even, odd, 0x44);
      _mm512_storeu_ps(out + c * kChunkDims, _mm512_shuffle_f32x4(low, low, 0xd8));
      if (a.head_dim - c * kChunkDims < kChunkDims) break;
      const __m512 high = _mm512_shuffle_f32x4(even, odd, 0xee);
      _mm512_storeu_ps(out + c * kChunkDims + 16, _mm512_shuffle_f32x4(high, high, 0xd8));
    }
  }
}

// Scales the outputs of the queries in `changed`.
void Rescale(const Shape& s, __m512 factor, __mmask16 changed, Block* block) {
  alignas(64) float factors[16];
  _mm512_store_ps(factors, factor);
  for (uint32_t m = changed; m != 0; m &= m - 1) {
    const int row = __builtin_ctz(m);
    const __m512 f = _mm512_set1_ps(factors[row]);
    for (uint32_t t = 0; t < s.chunks * 2; ++t) {
      float* o = block->o(s, t) + row * 16;
      _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), f));
    }
  }
}

// Raises the maximum to `max` and scales what was summed before; returns what is to be subtracted
// from the scores.
template <uint32_t kColumns>
__m512 RaiseTo(const Shape& s, __m512 max, Block* block) {
  const __m512 empty = _mm512_set1_ps(kEmpty);
  max = MaxOfFolds<kColumns>(max);
  const __mmask16 raised = _mm512_cmp_ps_mask(max, block->max, _CMP_GT_OQ);
  const __mmask16 some = _mm512_cmp_ps_mask(max, empty, _CMP_NEQ_OQ);
  const __m512 shift = _mm512_maskz_mov_ps(some, max);  // -infinity minus itself is not a number
  if (raised != 0) {
    const __m512 factor = Exp<Vector>(_mm512_sub_ps(block->max, shift));  // 0 at first
    block->sum = _mm512_mask_mul_ps(block->sum, raised, block->sum, factor);
    const __mmask16 had = _mm512_cmp_ps_mask(block->max, empty, _CMP_NEQ_OQ);
    Rescale(s, factor, raised & had & static_cast<__mmask16>((1u << kColumns) - 1), block);
    block->max = max;
  }
  return shift;
}

// Scales the scores of tokens [first, first + tokens), masks those outside the ranges, raises the
// maximum and returns what is to be subtracted from the scores.
template <uint32_t kColumns>
__m512 RaiseMax(const AttendRun& a, const Shape& s, uint32_t first, uint32_t tokens, Block* block,
                float* scores) {
  constexpr uint32_t kRegisters = kAttendTileTokens * kColumns / 16;
  const __m512 scale = _mm512_set1_ps(a.scale);
  const uint32_t end = first + tokens;
  const bool all = tokens == kAttendTileTokens && block->max_lo <= first && block->min_hi >= end;
  __m512 max = block->max;
  if (all) {
#pragma GCC unroll 4
    for (uint32_t r = 0; r < kRegisters; ++r) {
      const __m512 x = Vector::Clamp(_mm512_mul_ps(_mm512_load_ps(scores + r * 16), scale));
      _mm512_store_ps(scores + r * 16, x);
      max = _mm512_max_ps(max, x);
    }
  } else {
    const __mmask16 first_fold = static_cast<__mmask16>((1u << kColumns) - 1);
    const __m512i second = _mm512_set1_epi32(static_cast<int>(first + kRegisters));
    const __m512i hi = _mm512_min_epu32(block->hi, _mm512_set1_epi32(static_cast<int>(end)));
    for (uint32_t r = 0; r < kRegisters; ++r) {
      const __m512i token = _mm512_add_epi32(
          _mm512_mask_mov_epi32(second, first_fold, _mm512_set1_epi32(static_cast<int>(first))),
          _mm512_set1_epi32(static_cast<int>(r)));
      const __mmask16 in =
          _mm512_cmple_epu32_mask(block->lo, token) & _mm512_cmplt_epu32_mask(token, hi);
      const __m512 x = Vector::Clamp(_mm512_mul_ps(_mm512_load_ps(scores + r * 16), scale));
      const __m512 masked = _mm512_mask_mov_ps(_mm512_set1_ps(kEmpty), in, x);
      _mm512_store_ps(scores + r * 16, masked);
      max = _mm512_max_ps(max, masked);
    }
  }
  return RaiseTo<kColumns>(s, max, block);
}

// Weights of 16 registers of scores, summed; pairs of tokens as bf16 parts, rounded to nearest:
// relative error 2^-18.
inline void WeighRows(const float* scores, __m512 shift, __m512* sum, __m512i* high, __m512i* low,
                      Fetcher* fetcher) {
  const __m512i high_bits = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i half = _mm512_set1_epi32(0x8000);
#pragma GCC unroll 8
  for (uint32_t i = 0; i < kRows / 2; ++i) {
    fetcher->Step<kRegisterPairWork>();
    __m512i top[2], rest[2];
#pragma GCC unroll 2
    for (uint32_t j = 0; j < 2; ++j) {
      const __m512 score = _mm512_load_ps(scores + (2 * i + j) * 16);
      const __m512 p = Exp<Vector>(_mm512_sub_ps(score, shift));
      *sum = _mm512_add_ps(*sum, p);
      top[j] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(p), half), high_bits);
      const __m512 left = _mm512_sub_ps(p, _mm512_castsi512_ps(top[j]));
      rest[j] = _mm512_add_epi32(_mm512_castps_si512(left), half);
    }
    high[i] = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(top[0], 16), top[1]);
    low[i] = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rest[0], 16), rest[1]);
  }
}

// Scores to weights, summed, and packed as left operands: a row per query.
template <uint32_t kColumns>
void WeighTile(const float* scores, __m512 shift, Block* block, Fetcher* fetcher) {
  char* high = block->weights();
  char* low = high + kTileBytes;
  __m512 sum = block->sum;
  __m512i packed[2][16], rows[16];
  if constexpr (kColumns == 8) {
    // One transposition for both parts: row fold * 8 + query has [high, low] of the fold's tokens.
    WeighRows(scores, shift, &sum, packed[0], packed[0] + 8, fetcher);
    Transpose16(packed[0], rows);
    for (uint32_t q = 0; q < 8; ++q) {
      _mm512_store_si512(high + q * 64, _mm512_shuffle_i64x2(rows[q], rows[8 + q], 0x44));
      _mm512_store_si512(low + q * 64, _mm512_shuffle_i64x2(rows[q], rows[8 + q], 0xee));
    }
  } else {
    for (uint32_t i = 0; i < 2; ++i) {
      WeighRows(scores + i * 256, shift, &sum, packed[0] + 8 * i, packed[1] + 8 * i, fetcher);
    }
    for (uint32_t part = 0; part < 2; ++part) {
      Transpose16(packed[part], rows);
      for (uint32_t q = 0; q < 16; ++q) {
        _mm512_store_si512(high + part * kTileBytes + q * 64, rows[q]);
      }
    }
  }
  block->sum = sum;
}

}  // namespace
}  // namespace quarry::kernels

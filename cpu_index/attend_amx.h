// Attention over whole segments with AMX, in one pass over bf16 or fp16 keys and values.
//
// Tokens are taken in tiles of 64. Values are staged with pairs of tokens interleaved, in a buffer
// that the first cache level holds; then, per block of 16 queries:
//   scores  S[token][query] = K[token][dim] . Q[dim][query]: a register of S is one token's score
//           for every query, so maxima, exponentials and sums need no step across lanes;
//   weights P[query][token] are transposed once, as left operand of
//   output  O[query][dim] += P[query][token] . V[token][dim], kept in memory between tiles.
// A weight is two bf16 parts (relative error 2^-18).
#pragma once

#include <limits>

#include "cpu_index/tiles_amx.h"

namespace quarry::kernels {
namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();

struct Shape {
  uint32_t chunks;    // of 32 dimensions
  uint32_t q_parts;   // 1, 2 or 3
  uint32_t kv_parts;  // 1 or 2
  uint32_t blocks;    // of 16 queries
};

inline Shape ShapeOf(const AttendRun& a) {
  return {ChunksOf(a.head_dim), a.q_parts, KvParts(a.dtype),
          (a.queries + kBlockQueries - 1) / kBlockQueries};
}

// The running state of one block of queries, a lane each, followed by its packed queries
// [chunk][part] and its output [chunk][even, odd], a tile each.
struct Block {
  __m512 max, sum;
  __m512i lo, hi;           // of the queries' ranges
  uint32_t min_lo, max_lo;  // over the queries
  uint32_t min_hi, max_hi;

  char* q() { return reinterpret_cast<char*>(this + 1); }
  float* o(const Shape& s, uint32_t tile) {
    return reinterpret_cast<float*>(q() + (size_t{s.chunks} * s.q_parts + tile) * kTileBytes);
  }
};
static_assert(sizeof(Block) % 64 == 0);

inline size_t BlockBytes(const Shape& s) {
  return sizeof(Block) + size_t{s.chunks} * (s.q_parts + 2) * kTileBytes;
}

// What the blocks share, behind them.
struct Staging {
  char* k;        // for KeysOf
  char* v;        // [kv_part][2 groups of 32 tokens][chunk][even, odd], a tile each
  float* scores;  // [64 tokens][16 queries]
  char* weights;  // [2 groups of 32 tokens][high, low], a tile each

  Staging(const AttendRun& a, char* at)
      : k(at),
        v(k + StagedKeyBytes(a.head_dim, a.dtype)),
        scores(reinterpret_cast<float*>(v + StagedKeyBytes(a.head_dim, a.dtype))),
        weights(reinterpret_cast<char*>(scores) + 4 * kTileBytes) {}
  static size_t Bytes(const AttendRun& a) {
    return 2 * StagedKeyBytes(a.head_dim, a.dtype) + 8 * kTileBytes;
  }
};

inline void InitBlock(const AttendRun& a, const Shape& s, uint32_t first, Block* block) {
  block->max = _mm512_set1_ps(kEmpty);
  block->sum = _mm512_setzero_ps();
  alignas(64) uint32_t lo[16], hi[16];
  block->min_lo = block->min_hi = ~0u;
  block->max_lo = block->max_hi = 0;
  for (uint32_t i = 0; i < kBlockQueries; ++i) {
    // Lanes without a query repeat the first one's range; their scores are 0.
    const uint32_t query = first + i < a.queries ? first + i : first;
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

// One pair of tokens into row `at` of the tiles. Interleaving within 128-bit lanes puts dims 0-3,
// 8-11, .. of a chunk into the first tile and dims 4-7, 12-15, .. into the second one; StoreBlock
// puts them back into order.
template <uint8_t kDtype>
inline void StagePair(__m512i even, __m512i odd, uint32_t chunks, char* at) {
  __m512i x[2], y[2];
  SplitParts<kDtype>(even, x);
  SplitParts<kDtype>(odd, y);
  for (uint32_t p = 0; p < (kDtype == kFp16 ? 2 : 1); ++p) {
    char* tile = at + size_t{p} * 4 * chunks * kTileBytes;
    _mm512_store_si512(tile, _mm512_unpacklo_epi16(x[p], y[p]));
    _mm512_store_si512(tile + kTileBytes, _mm512_unpackhi_epi16(x[p], y[p]));
  }
}

// Values of `tokens` tokens, rounded up to 32 with zeros: row r of a tile has tokens 2r and 2r + 1.
template <uint8_t kDtype>
void StageSomeValues(const uint16_t* v, uint32_t head_dim, uint32_t tokens, char* out) {
  const uint32_t chunks = ChunksOf(head_dim), padded = (tokens + 31) / 32 * 32;
  for (uint32_t t = 0; t < padded; t += 2) {
    const bool even_there = t < tokens, odd_there = t + 1 < tokens;
    const uint16_t* even = v + size_t{even_there ? t : 0} * head_dim;
    const uint16_t* odd = v + size_t{odd_there ? t + 1 : 0} * head_dim;
    char* at = out + t / 32 * 2 * chunks * kTileBytes + t % 32 / 2 * 64;
    for (uint32_t c = 0; c < chunks; ++c) {
      const __mmask32 mask = ChunkMask(head_dim, c);
      StagePair<kDtype>(_mm512_maskz_loadu_epi16(even_there ? mask : 0, even + c * kChunkDims),
                        _mm512_maskz_loadu_epi16(odd_there ? mask : 0, odd + c * kChunkDims),
                        chunks, at + 2 * c * kTileBytes);
    }
  }
}

// All 64 tokens of a tile, without masks.
template <uint8_t kDtype, uint32_t kHeadDim>
void StageAllValues(const uint16_t* v, char* out, Fetcher* fetcher) {
  constexpr uint32_t kChunks = kHeadDim / kChunkDims;
  for (uint32_t t = 0; t < kTileTokens; t += 2) {
    fetcher->Step<2>();
    char* at = out + t / 32 * 2 * kChunks * kTileBytes + t % 32 / 2 * 64;
#pragma GCC unroll 16
    for (uint32_t c = 0; c < kChunks; ++c) {
      const uint16_t* even = v + t * kHeadDim + c * kChunkDims;
      StagePair<kDtype>(_mm512_loadu_si512(even), _mm512_loadu_si512(even + kHeadDim), kChunks,
                        at + 2 * c * kTileBytes);
    }
  }
}

template <uint8_t kDtype>
void StageValues(const uint16_t* v, uint32_t head_dim, uint32_t tokens, char* out,
                 Fetcher* fetcher) {
  WithHeadDim(head_dim, [&]<uint32_t kHeadDim>() {
    if (kHeadDim != 0 && tokens == kTileTokens) {
      StageAllValues<kDtype, kHeadDim>(v, out, fetcher);
    } else {
      StageSomeValues<kDtype>(v, head_dim, tokens, out);
    }
  });
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

// Scales the scores of tokens [first, first + tokens), masks those outside the ranges, raises the
// maximum and returns what is to be subtracted from the scores.
__m512 RaiseMax(const AttendRun& a, const Shape& s, uint32_t first, uint32_t tokens, Block* block,
                float* scores, Fetcher* fetcher) {
  const __m512 scale = _mm512_set1_ps(a.scale);
  const bool all = block->max_lo <= first && block->min_hi >= first + tokens;
  __m512 max = block->max;
  if (all) {
    for (uint32_t t = 0; t < tokens; ++t) {
      const __m512 x = Vector::Clamp(_mm512_mul_ps(_mm512_load_ps(scores + t * 16), scale));
      _mm512_store_ps(scores + t * 16, x);
      max = _mm512_max_ps(max, x);
      fetcher->Step<1>();
    }
  } else {
    for (uint32_t t = 0; t < tokens; ++t) {
      const __m512i token = _mm512_set1_epi32(static_cast<int>(first + t));
      const __mmask16 in =
          _mm512_cmple_epu32_mask(block->lo, token) & _mm512_cmplt_epu32_mask(token, block->hi);
      const __m512 x = Vector::Clamp(_mm512_mul_ps(_mm512_load_ps(scores + t * 16), scale));
      const __m512 masked = _mm512_mask_mov_ps(_mm512_set1_ps(kEmpty), in, x);
      _mm512_store_ps(scores + t * 16, masked);
      max = _mm512_max_ps(max, masked);
    }
  }
  const __mmask16 raised = _mm512_cmp_ps_mask(max, block->max, _CMP_GT_OQ);
  const __mmask16 some = _mm512_cmp_ps_mask(max, _mm512_set1_ps(kEmpty), _CMP_NEQ_OQ);
  const __m512 shift = _mm512_maskz_mov_ps(some, max);  // -infinity minus itself is not a number
  if (raised != 0) {
    const __m512 factor = Exp<Vector>(_mm512_sub_ps(block->max, shift));  // 0 at first
    block->sum = _mm512_mask_mul_ps(block->sum, raised, block->sum, factor);
    const __mmask16 had = _mm512_cmp_ps_mask(block->max, _mm512_set1_ps(kEmpty), _CMP_NEQ_OQ);
    Rescale(s, factor, raised & had, block);
    block->max = max;
  }
  return shift;
}

// Scores to weights, summed, and packed as left operands. Tokens from `tokens` on weigh 0.
void WeighTile(uint32_t tokens, __m512 shift, Block* block, const Staging& staging,
               Fetcher* fetcher) {
  const __m512i high_bits = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i half = _mm512_set1_epi32(0x8000);
  __m512 sum = block->sum;
  for (uint32_t first = 0; first < tokens; first += 32) {
    __m512i high[16], low[16];
    for (uint32_t i = 0; i < 16; ++i) {
      __m512 p[2];
      __m512i top[2], rest[2];  // both parts rounded to nearest
      for (uint32_t j = 0; j < 2; ++j) {
        const uint32_t t = first + 2 * i + j;
        fetcher->Step<1>();
        p[j] = _mm512_setzero_ps();
        if (t < tokens) {
          p[j] = Exp<Vector>(_mm512_sub_ps(_mm512_load_ps(staging.scores + t * 16), shift));
        }
        sum = _mm512_add_ps(sum, p[j]);
        top[j] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(p[j]), half), high_bits);
        const __m512 left = _mm512_sub_ps(p[j], _mm512_castsi512_ps(top[j]));
        rest[j] = _mm512_add_epi32(_mm512_castps_si512(left), half);
      }
      high[i] = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(top[0], 16), top[1]);
      low[i] = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rest[0], 16), rest[1]);
    }
    __m512i rows[16];
    char* out = staging.weights + first / 32 * 2 * kTileBytes;
    Transpose16(high, rows);
    for (int r = 0; r < 16; ++r) _mm512_store_si512(out + r * 64, rows[r]);
    Transpose16(low, rows);
    for (int r = 0; r < 16; ++r) _mm512_store_si512(out + kTileBytes + r * 64, rows[r]);
  }
  block->sum = sum;
}

// O += P . V for one tile of 64 (kGroups = 2) or at most 32 tokens (1).
template <int kGroups>
void AddValues(const Shape& s, Block* block, const Staging& staging) {
  _tile_loadd(4, staging.weights, 64);
  _tile_loadd(5, staging.weights + kTileBytes, 64);
  if constexpr (kGroups > 1) {
    _tile_loadd(6, staging.weights + 2 * kTileBytes, 64);
    _tile_loadd(7, staging.weights + 3 * kTileBytes, 64);
  }
  for (uint32_t c = 0; c < s.chunks; ++c) {
    float* even = block->o(s, 2 * c);
    float* odd = block->o(s, 2 * c + 1);
    _tile_loadd(0, even, 64);
    _tile_loadd(1, odd, 64);
    for (uint32_t p = 0; p < s.kv_parts; ++p) {
      const char* v = staging.v + (size_t{p} * 4 * s.chunks + 2 * c) * kTileBytes;
      _tile_loadd(2, v, 64);
      _tile_loadd(3, v + kTileBytes, 64);
      _tile_dpbf16ps(0, 4, 2);
      _tile_dpbf16ps(1, 4, 3);
      _tile_dpbf16ps(0, 5, 2);
      _tile_dpbf16ps(1, 5, 3);
      if constexpr (kGroups > 1) {
        _tile_loadd(2, v + 2 * s.chunks * kTileBytes, 64);
        _tile_loadd(3, v + (2 * s.chunks + 1) * kTileBytes, 64);
        _tile_dpbf16ps(0, 6, 2);
        _tile_dpbf16ps(1, 6, 3);
        _tile_dpbf16ps(0, 7, 2);
        _tile_dpbf16ps(1, 7, 3);
      }
    }
    _tile_stored(0, even, 64);
    _tile_stored(1, odd, 64);
  }
}

// The block's state to the caller, dimensions in order.
void StoreBlock(const AttendRun& a, const Shape& s, uint32_t first, Block* block) {
  const uint32_t count = a.queries - first < kBlockQueries ? a.queries - first : kBlockQueries;
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  _mm512_mask_storeu_ps(a.max + first, mask, block->max);
  _mm512_mask_storeu_ps(a.sum + first, mask, block->sum);
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

struct Tile {
  const uint16_t* k = nullptr;
  const uint16_t* v = nullptr;
  uint32_t first = 0, tokens = 0;
};

// Walks over the tiles of the tokens that some query wants.
class Tiles {
 public:
  Tiles(const AttendRun& a, uint32_t lo, uint32_t hi) : a_(a), lo_(lo), hi_(hi) {}

  bool Next(Tile* tile) {
    for (; segment_ < a_.segment_count; ++segment_, at_ = 0) {
      const AttendSegment& s = a_.segments[segment_];
      const uint32_t end = s.first + s.tokens < hi_ ? s.first + s.tokens : hi_;
      if (at_ == 0) at_ = s.first > lo_ ? s.first : lo_;
      if (at_ >= end || at_ < s.first) continue;
      const size_t offset = size_t{at_ - s.first} * a_.head_dim;
      tile->k = static_cast<const uint16_t*>(s.k) + offset;
      tile->v = static_cast<const uint16_t*>(s.v) + offset;
      tile->first = at_;
      tile->tokens = end - at_ < kTileTokens ? end - at_ : kTileTokens;
      at_ += tile->tokens;
      return true;
    }
    return false;
  }

 private:
  const AttendRun& a_;
  const uint32_t lo_, hi_;
  size_t segment_ = 0;
  uint32_t at_ = 0;  // 0: at the segment's start
};

template <uint8_t kDtype>
void AttendTile(const AttendRun& a, const Shape& s, const Tile& tile, const Staging& staging,
                char* blocks, Fetcher* fetcher) {
  const TileKeys keys = KeysOf<kDtype>(tile.k, a.head_dim, tile.tokens, staging.k);
  bool staged = false;
  for (uint32_t b = 0; b < s.blocks; ++b) {
    Block* block = reinterpret_cast<Block*>(blocks + b * BlockBytes(s));
    if (block->max_hi <= tile.first || block->min_lo >= tile.first + tile.tokens) continue;
    ScoreTokens(s.chunks, s.q_parts, s.kv_parts, keys, block->q(), staging.scores, fetcher);
    // Here, so that it runs beside the tiles' products.
    if (!staged) StageValues<kDtype>(tile.v, a.head_dim, tile.tokens, staging.v, fetcher);
    staged = true;
    const __m512 shift = RaiseMax(a, s, tile.first, tile.tokens, block, staging.scores, fetcher);
    WeighTile(tile.tokens, shift, block, staging, fetcher);
    if (tile.tokens > 32) {
      AddValues<2>(s, block, staging);
    } else {
      AddValues<1>(s, block, staging);
    }
  }
}

template <uint8_t kDtype>
void AttendWithTiles(const AttendRun& a) {
  const Shape s = ShapeOf(a);
  char* blocks = static_cast<char*>(a.scratch);
  const auto block_at = [&](uint32_t b) {
    return reinterpret_cast<Block*>(blocks + b * BlockBytes(s));
  };
  uint32_t lo = ~0u, hi = 0;
  for (uint32_t b = 0; b < s.blocks; ++b) {
    Block* block = block_at(b);
    InitBlock(a, s, b * kBlockQueries, block);
    lo = block->min_lo < lo ? block->min_lo : lo;
    hi = block->max_hi > hi ? block->max_hi : hi;
  }
  const Staging staging(a, blocks + s.blocks * BlockBytes(s));
  const TileConfig config;
  _tile_loadconfig(&config);
  Tiles tiles(a, lo, hi);
  Tile tile, next;
  for (bool more = tiles.Next(&tile); more; tile = next) {
    more = tiles.Next(&next);
    Fetcher fetcher{{reinterpret_cast<uintptr_t>(next.k), reinterpret_cast<uintptr_t>(next.v)},
                    more ? size_t{next.tokens} * a.head_dim * 2 : 0};
    AttendTile<kDtype>(a, s, tile, staging, blocks, &fetcher);
  }
  _tile_release();
  for (uint32_t b = 0; b < s.blocks; ++b) StoreBlock(a, s, b * kBlockQueries, block_at(b));
}

inline size_t TileScratchBytes(const AttendRun& a) {
  const Shape s = ShapeOf(a);
  return s.blocks * BlockBytes(s) + Staging::Bytes(a);
}

}  // namespace
}  // namespace quarry::kernels

// AMX tiles for scores of many queries with bf16 keys; all else as AVX-512.
//
// A tile of 16 keys is the left operand as it lies in memory; the queries are the right one,
// packed once per call as pairs of dimensions. Scores come out token by token, 16 queries each.
// Keys are staged through registers into a small buffer: tile loads straight from DRAM are slow.
#include "cpu_index/vector_avx512.h"

#include <cstring>

namespace quarry::kernels {
namespace {

constexpr uint32_t kTileRows = 16;
constexpr uint32_t kPairDims = 32;      // dimensions of one tile product
constexpr uint32_t kMaxChunks = 16;     // head_dim 512
constexpr uint32_t kQueriesPerPass = 16;
// Below this many queries the vector dot product is faster than packing tiles.
constexpr uint32_t kMinQueries = 12;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void ConfigureTiles() {
  TileConfig config;
  for (int tile = 0; tile < 3; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = kTileRows;
  }
  _tile_loadconfig(&config);
}

// Queries [first, first + 16) as tiles of pairs: out[chunk][pair][query][2]; missing ones are 0.
void PackQueries(const ScoreTile& a, uint32_t first, uint16_t* out) {
  const uint32_t chunks = (a.head_dim + kPairDims - 1) / kPairDims;
  std::memset(out, 0, size_t{chunks} * 1024);
  for (uint32_t i = 0; i < kQueriesPerPass && first + i < a.queries; ++i) {
    const uint16_t* q = a.q_bf16 + size_t{first + i} * a.head_dim;
    for (uint32_t d = 0; d < a.head_dim; d += 2) {
      uint16_t* pair = out + (d / kPairDims) * 512 + (d % kPairDims) / 2 * 32 + i * 2;
      pair[0] = q[d];
      pair[1] = q[d + 1];
    }
  }
}

// 16 tokens as [chunk][token][32 dims]; tokens past the end and dimensions past head_dim are 0.
void StageKeys(const ScoreTile& a, uint32_t first, uint16_t* out) {
  const uint16_t* k = static_cast<const uint16_t*>(a.k);
  for (uint32_t t = 0; t < kTileRows; ++t) {
    const bool there = first + t < a.tokens;
    const uint16_t* row = k + size_t{there ? first + t : 0} * a.head_dim;
    for (uint32_t d = 0; d < a.head_dim; d += kPairDims) {
      __mmask32 mask = a.head_dim - d >= kPairDims ? 0xffffffffu : 0xffffu;
      if (!there) mask = 0;
      __builtin_prefetch(reinterpret_cast<const char*>(row + d) + 4 * kPrefetchBytes);
      _mm512_store_si512(out + (d / kPairDims) * 512 + t * 32,
                         _mm512_maskz_loadu_epi16(mask, row + d));
    }
  }
}

// out[token][query] of 16 by 16, into rows of a.out.
void StoreScores(const ScoreTile& a, const float* tile, uint32_t first_token,
                 uint32_t first_query) {
  __m512 rows[16];
  for (int t = 0; t < 16; ++t) rows[t] = _mm512_load_ps(tile + t * 16);
  // Transpose 16 by 16: pairs, quads, then 128-bit lanes.
  __m512 pairs[16], quads[16];
  for (int t = 0; t < 16; t += 2) {
    pairs[t] = _mm512_unpacklo_ps(rows[t], rows[t + 1]);
    pairs[t + 1] = _mm512_unpackhi_ps(rows[t], rows[t + 1]);
  }
  for (int t = 0; t < 16; t += 4) {
    for (int j = 0; j < 2; ++j) {
      __m512d a0 = _mm512_castps_pd(pairs[t + j]), b0 = _mm512_castps_pd(pairs[t + 2 + j]);
      quads[t + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a0, b0));
      quads[t + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a0, b0));
    }
  }
  const __m512 scale = _mm512_set1_ps(a.scale);
  const uint32_t tokens = a.tokens - first_token < 16 ? a.tokens - first_token : 16;
  const __mmask16 mask = static_cast<__mmask16>((1u << tokens) - 1);
  for (int j = 0; j < 4; ++j) {  // quads[4 * g + j] has, in lane l, query 4 * l + j of tokens 4g..
    __m512 x0 = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);
    __m512 x1 = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
    __m512 y0 = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
    __m512 y1 = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
    const __m512 by_query[4] = {
        _mm512_shuffle_f32x4(x0, x1, 0x88), _mm512_shuffle_f32x4(y0, y1, 0x88),
        _mm512_shuffle_f32x4(x0, x1, 0xdd), _mm512_shuffle_f32x4(y0, y1, 0xdd)};
    for (uint32_t l = 0; l < 4; ++l) {
      uint32_t query = first_query + 4 * l + j;
      if (query >= a.queries) continue;
      _mm512_mask_storeu_ps(a.out + query * a.ld_out + first_token, mask,
                            Vector::Clamp(_mm512_mul_ps(by_query[l], scale)));
    }
  }
}

void ScoreAmx(const ScoreTile& a) {
  if (a.dtype != kBf16 || a.q_bf16 == nullptr || a.queries < kMinQueries) return ScoreAvx512(a);
  alignas(64) uint16_t queries[kMaxChunks * 512];
  alignas(64) uint16_t keys[kMaxChunks * 512];
  alignas(64) float tile[256];
  const uint32_t chunks = (a.head_dim + kPairDims - 1) / kPairDims;
  ConfigureTiles();
  for (uint32_t q0 = 0; q0 < a.queries; q0 += kQueriesPerPass) {
    PackQueries(a, q0, queries);
    for (uint32_t t0 = 0; t0 < a.tokens; t0 += kTileRows) {
      StageKeys(a, t0, keys);
      _tile_zero(0);
      for (uint32_t c = 0; c < chunks; ++c) {
        _tile_loadd(1, keys + c * 512, 64);
        _tile_loadd(2, queries + c * 512, 64);
        _tile_dpbf16ps(0, 1, 2);
      }
      _tile_stored(0, tile, 64);
      StoreScores(a, tile, t0, q0);
    }
  }
  _tile_release();
}

}  // namespace

const Table& AmxTable() {
  static constexpr Table kTable = {"amx",       ScoreAmx,       Accumulate<Vector>,
                                   Max<Vector>, ExpSum<Vector>, Scale<Vector>};
  return kTable;
}

}  // namespace quarry::kernels

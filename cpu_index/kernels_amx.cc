// AMX tiles for bf16 keys and values; all else as AVX-512.
//
// Scores: a tile of 16 keys is the left operand as it lies in memory, the queries are the right
// one, packed once per call. Accumulation: the weights are the left operand, the values the right
// one with pairs of tokens interleaved. What is not bf16 is split into bf16 parts whose products
// are exact: fp32 queries into three, weights into two (relative error 2^-17).
// Keys are staged through registers into a small buffer: tile loads of scattered lines are slow.
#include "cpu_index/vector_avx512.h"

#include <cstring>

namespace quarry::kernels {
namespace {

constexpr uint32_t kRows = 16;          // of a tile
constexpr uint32_t kPair = 32;          // bf16 values in a tile's row
constexpr uint32_t kTileElements = kRows * kPair;
constexpr uint32_t kMaxChunks = 16;     // head_dim 512 in steps of 32
constexpr uint32_t kMaxQueryParts = 3;
// Below this many queries the vector products are faster than packing tiles: with 4 queries they
// scan at 0.58 of the read bandwidth against 0.55, with 8 at 0.37 against 0.52.
constexpr uint32_t kMinQueries = 6;
constexpr uint32_t kMaxTokens = 256;    // of an accumulation; more are done in turn

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-5 have `left` rows, tiles 6 and 7 all sixteen.
void ConfigureTiles(uint32_t left) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? left : kRows);
  }
  _tile_loadconfig(&config);
}

// out[j] has element j of every row.
void Transpose16(const __m512* rows, __m512* out) {
  __m512 pairs[16], quads[16];
  for (int t = 0; t < 16; t += 2) {
    pairs[t] = _mm512_unpacklo_ps(rows[t], rows[t + 1]);
    pairs[t + 1] = _mm512_unpackhi_ps(rows[t], rows[t + 1]);
  }
  for (int t = 0; t < 16; t += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(pairs[t + j]), b = _mm512_castps_pd(pairs[t + 2 + j]);
      quads[t + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      quads[t + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {  // quads[4 g + j] has, in lane l, element 4 l + j of rows 4 g ..
    const __m512 x0 = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);
    const __m512 x1 = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512 y0 = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
    const __m512 y1 = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
    out[j] = _mm512_shuffle_f32x4(x0, x1, 0x88);
    out[4 + j] = _mm512_shuffle_f32x4(y0, y1, 0x88);
    out[8 + j] = _mm512_shuffle_f32x4(x0, x1, 0xdd);
    out[12 + j] = _mm512_shuffle_f32x4(y0, y1, 0xdd);
  }
}

__m512 WidenBf16(__m256bh x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16));
}

// ---- Scores.

// Packs queries [first, first + 16) for one product per part and chunk of 32 dimensions:
// out[part][chunk][pair of dims][query][2]. Missing queries are 0.
uint32_t PackQueries(const ScoreTile& a, uint32_t first, uint16_t* out) {
  const uint32_t chunks = (a.head_dim + kPair - 1) / kPair;
  const uint32_t parts = a.q_bf16 != nullptr ? 1 : kMaxQueryParts;
  for (uint32_t c = 0; c < chunks; ++c) {
    __m512 rows[kMaxQueryParts][16];
    for (uint32_t i = 0; i < kRows; ++i) {
      for (uint32_t p = 0; p < parts; ++p) rows[p][i] = _mm512_setzero_ps();
      if (first + i >= a.queries) continue;
      const size_t at = size_t{first + i} * a.head_dim + c * kPair;
      const bool whole = a.head_dim - c * kPair >= kPair;
      if (a.q_bf16 != nullptr) {
        rows[0][i] = _mm512_castsi512_ps(
            _mm512_maskz_loadu_epi16(whole ? 0xffffffffu : 0xffffu, a.q_bf16 + at));
        continue;
      }
      __m512 low = _mm512_loadu_ps(a.q + at);
      __m512 high = whole ? _mm512_loadu_ps(a.q + at + 16) : _mm512_setzero_ps();
      for (uint32_t p = 0; p < parts; ++p) {
        const __m256bh low_part = _mm512_cvtneps_pbh(low), high_part = _mm512_cvtneps_pbh(high);
        rows[p][i] = _mm512_castsi512_ps(_mm512_inserti64x4(
            _mm512_castsi256_si512((__m256i)low_part), (__m256i)high_part, 1));
        low = _mm512_sub_ps(low, WidenBf16(low_part));
        high = _mm512_sub_ps(high, WidenBf16(high_part));
      }
    }
    for (uint32_t p = 0; p < parts; ++p) {
      __m512 columns[16];
      Transpose16(rows[p], columns);
      uint16_t* tile = out + (size_t{p} * chunks + c) * kTileElements;
      for (int j = 0; j < 16; ++j) _mm512_store_ps(tile + j * kPair, columns[j]);
    }
  }
  return parts;
}

// 16 keys as [chunk][token][32 dims]; tokens past the end and dimensions past head_dim are 0.
void StageKeys(const ScoreTile& a, uint32_t first, uint16_t* out) {
  const uint16_t* k = static_cast<const uint16_t*>(a.k);
  for (uint32_t t = 0; t < kRows; ++t) {
    const bool there = first + t < a.tokens;
    const uint16_t* row = k + size_t{there ? first + t : 0} * a.head_dim;
    for (uint32_t d = 0; d < a.head_dim; d += kPair) {
      __mmask32 mask = a.head_dim - d >= kPair ? 0xffffffffu : 0xffffu;
      if (!there) mask = 0;
      _mm512_store_si512(out + (d / kPair) * kTileElements + t * kPair,
                         _mm512_maskz_loadu_epi16(mask, row + d));
    }
  }
}

// tile[token][query] into the rows of a.out.
void StoreScores(const ScoreTile& a, const float* tile, uint32_t first_token,
                 uint32_t first_query) {
  __m512 rows[16], columns[16];
  for (int t = 0; t < 16; ++t) rows[t] = _mm512_load_ps(tile + t * 16);
  Transpose16(rows, columns);
  const __m512 scale = _mm512_set1_ps(a.scale);
  const uint32_t tokens = a.tokens - first_token < 16 ? a.tokens - first_token : 16;
  const __mmask16 mask = static_cast<__mmask16>((1u << tokens) - 1);
  const uint32_t queries = a.queries - first_query < 16 ? a.queries - first_query : 16;
  for (uint32_t i = 0; i < queries; ++i) {
    _mm512_mask_storeu_ps(a.out + (first_query + i) * a.ld_out + first_token, mask,
                          Vector::Clamp(_mm512_mul_ps(columns[i], scale)));
  }
}

void ScoreAmx(const ScoreTile& a) {
  if (a.dtype != kBf16 || a.queries < kMinQueries) return ScoreAvx512(a);
  alignas(64) uint16_t queries[kMaxQueryParts * kMaxChunks * kTileElements];
  alignas(64) uint16_t keys[kMaxChunks * kTileElements];
  alignas(64) float tile[256];
  const uint32_t chunks = (a.head_dim + kPair - 1) / kPair;
  const RowStream stream{static_cast<const char*>(a.k), size_t{a.tokens} * a.head_dim * 2,
                         static_cast<const char*>(a.next)};
  ConfigureTiles(kRows);
  for (uint32_t q0 = 0; q0 < a.queries; q0 += kRows) {
    const uint32_t parts = PackQueries(a, q0, queries);
    for (uint32_t t0 = 0; t0 < a.tokens; t0 += kRows) {
      if (q0 == 0) {
        const uint32_t rows = a.tokens - t0 < kRows ? a.tokens - t0 : kRows;
        stream.FetchAhead(size_t{t0} * a.head_dim * 2, size_t{rows} * a.head_dim * 2);
      }
      StageKeys(a, t0, keys);
      _tile_zero(0);
      for (uint32_t c = 0; c < chunks; ++c) {
        _tile_loadd(1, keys + c * kTileElements, 64);
        for (uint32_t p = 0; p < parts; ++p) {
          _tile_loadd(6, queries + (size_t{p} * chunks + c) * kTileElements, 64);
          _tile_dpbf16ps(0, 1, 6);
        }
      }
      _tile_stored(0, tile, 64);
      StoreScores(a, tile, t0, q0);
    }
  }
  _tile_release();
}

// ---- Accumulation.

// Values of up to 256 tokens with pairs of tokens interleaved:
// out[chunk of 32 tokens][group of 16 dims][pair][dim][2]. Tokens past the end are 0.
void StageValues(const AccumulateTile& a, uint32_t first, uint32_t tokens, uint16_t* out) {
  const uint32_t groups = a.head_dim / 16;
  alignas(64) static constexpr uint16_t kLow[32] = {
      0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const uint16_t* v = static_cast<const uint16_t*>(a.v) + size_t{first} * a.head_dim;
  const RowStream stream{static_cast<const char*>(a.v), size_t{a.tokens} * a.head_dim * 2,
                         static_cast<const char*>(a.next)};
  for (uint32_t t = 0; t < tokens; t += 2) {
    const uint16_t* even = v + size_t{t} * a.head_dim;
    const bool odd_there = t + 1 < tokens;
    const uint16_t* odd = even + (odd_there ? a.head_dim : 0);
    uint16_t* at = out + (t / kPair) * size_t{groups} * kTileElements + (t % kPair) / 2 * kPair;
    stream.FetchAhead(size_t{first + t} * a.head_dim * 2,
                      size_t{odd_there ? 2u : 1u} * a.head_dim * 2);
    for (uint32_t d = 0; d < a.head_dim; d += kPair) {
      const bool whole = a.head_dim - d >= kPair;
      const __mmask32 mask = whole ? 0xffffffffu : 0xffffu;
      const __m512i x = _mm512_maskz_loadu_epi16(mask, even + d);
      const __m512i y = _mm512_maskz_loadu_epi16(odd_there ? mask : 0, odd + d);
      _mm512_store_si512(at + (d / 16) * kTileElements, _mm512_permutex2var_epi16(x, low, y));
      if (whole) {
        _mm512_store_si512(at + (d / 16 + 1) * kTileElements,
                           _mm512_permutex2var_epi16(x, high, y));
      }
    }
  }
  const uint32_t padded = (tokens + kPair - 1) / kPair * kPair;
  for (uint32_t t = (tokens + 1) / 2 * 2; t < padded; t += 2) {
    uint16_t* at = out + (t / kPair) * size_t{groups} * kTileElements + (t % kPair) / 2 * kPair;
    for (uint32_t g = 0; g < groups; ++g) {
      _mm512_store_si512(at + g * kTileElements, _mm512_setzero_si512());
    }
  }
}

// Weights of queries [first, first + count): out[chunk of 32 tokens][high, low][query][32 tokens].
void PackWeights(const AccumulateTile& a, uint32_t first_query, uint32_t count, uint32_t first,
                 uint32_t tokens, uint16_t* out) {
  for (uint32_t t = 0; t < tokens; t += kPair) {
    const uint32_t left = tokens - t;
    const __mmask16 first_mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __mmask16 second_mask =
        left >= 32 ? 0xffff : left > 16 ? static_cast<__mmask16>((1u << (left - 16)) - 1) : 0;
    uint16_t* tiles = out + (t / kPair) * 2 * kTileElements;
    for (uint32_t i = 0; i < count; ++i) {
      const float* p = a.p + (first_query + i) * a.ld_p + first + t;
      const __m512 x = _mm512_maskz_loadu_ps(first_mask, p);
      const __m512 y = _mm512_maskz_loadu_ps(second_mask, p + 16);
      const __m256bh x_high = _mm512_cvtneps_pbh(x), y_high = _mm512_cvtneps_pbh(y);
      const __m256bh x_low = _mm512_cvtneps_pbh(_mm512_sub_ps(x, WidenBf16(x_high)));
      const __m256bh y_low = _mm512_cvtneps_pbh(_mm512_sub_ps(y, WidenBf16(y_high)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(tiles + i * kPair), (__m256i)x_high);
      _mm256_store_si256(reinterpret_cast<__m256i*>(tiles + i * kPair + 16), (__m256i)y_high);
      tiles += kTileElements;
      _mm256_store_si256(reinterpret_cast<__m256i*>(tiles + i * kPair), (__m256i)x_low);
      _mm256_store_si256(reinterpret_cast<__m256i*>(tiles + i * kPair + 16), (__m256i)y_low);
      tiles -= kTileElements;
    }
  }
}

// Adds up to four groups of 16 dims, kept in tiles 0-3 over all tokens.
template <int kGroups>
void AddGroups(const AccumulateTile& a, float* acc, const uint16_t* weights,
               const uint16_t* values, uint32_t chunks) {
  const size_t stride = size_t{a.head_dim} * sizeof(float);
  const size_t chunk_elements = size_t{a.head_dim / 16} * kTileElements;
  _tile_loadd(0, acc, stride);
  if constexpr (kGroups > 1) _tile_loadd(1, acc + 16, stride);
  if constexpr (kGroups > 2) _tile_loadd(2, acc + 32, stride);
  if constexpr (kGroups > 3) _tile_loadd(3, acc + 48, stride);
  for (uint32_t c = 0; c < chunks; ++c) {
    const uint16_t* v = values + c * chunk_elements;
    _tile_loadd(4, weights + c * 2 * kTileElements, 64);
    _tile_loadd(5, weights + (c * 2 + 1) * kTileElements, 64);
    _tile_loadd(6, v, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(0, 5, 6);
    if constexpr (kGroups > 1) {
      _tile_loadd(7, v + kTileElements, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(1, 5, 7);
    }
    if constexpr (kGroups > 2) {
      _tile_loadd(6, v + 2 * kTileElements, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kGroups > 3) {
      _tile_loadd(7, v + 3 * kTileElements, 64);
      _tile_dpbf16ps(3, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, acc, stride);
  if constexpr (kGroups > 1) _tile_stored(1, acc + 16, stride);
  if constexpr (kGroups > 2) _tile_stored(2, acc + 32, stride);
  if constexpr (kGroups > 3) _tile_stored(3, acc + 48, stride);
}

void AccumulateAmx(const AccumulateTile& a) {
  if (a.dtype != kBf16 || a.rows != nullptr || a.queries < kMinQueries || a.head_dim > 256) {
    return Accumulate<Vector>(a);
  }
  alignas(64) uint16_t values[kMaxTokens * 256];
  alignas(64) uint16_t weights[kMaxTokens / kPair * 2 * kTileElements];
  for (uint32_t first = 0; first < a.tokens; first += kMaxTokens) {
    const uint32_t tokens = a.tokens - first < kMaxTokens ? a.tokens - first : kMaxTokens;
    const uint32_t chunks = (tokens + kPair - 1) / kPair;
    StageValues(a, first, tokens, values);
    for (uint32_t q0 = 0; q0 < a.queries; q0 += kRows) {
      const uint32_t count = a.queries - q0 < kRows ? a.queries - q0 : kRows;
      ConfigureTiles(count);
      PackWeights(a, q0, count, first, tokens, weights);
      for (uint32_t g = 0; g < a.head_dim / 16; g += 4) {
        float* acc = a.acc + size_t{q0} * a.head_dim + g * 16;
        const uint16_t* v = values + size_t{g} * kTileElements;
        switch (a.head_dim / 16 - g) {
          case 1: AddGroups<1>(a, acc, weights, v, chunks); break;
          case 2: AddGroups<2>(a, acc, weights, v, chunks); break;
          case 3: AddGroups<3>(a, acc, weights, v, chunks); break;
          default: AddGroups<4>(a, acc, weights, v, chunks); break;
        }
      }
    }
  }
  _tile_release();
}

}  // namespace

const Table& AmxTable() {
  static constexpr Table kTable = {"amx",       ScoreAmx,       AccumulateAmx,
                                   Max<Vector>, ExpSum<Vector>, Scale<Vector>};
  return kTable;
}

}  // namespace quarry::kernels

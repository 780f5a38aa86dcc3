// Rows of coded keys and values with AVX-512 VBMI and VNNI: 16 queries, or 16 dimensions, a
// register.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu_index/kernels.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

// Rows that are fetched ahead: about the latency of DRAM.
constexpr uint32_t kRowsAhead = 12;
constexpr uint32_t kMostParts = 8;  // of 64 coordinates

inline __attribute__((always_inline)) void PrefetchRow(const uint8_t* row, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(row) + at, _MM_HINT_T0);
  }
}

// The codes of one row, a byte each.
void UnpackKeyRow(const KeyRowTile& tile, const uint8_t* row, uint8_t* codes) {
  for (uint32_t p = 0; p < tile.parts; ++p) {
    const __m512i packed = _mm512_loadu_si512(row + tile.part[p]);
    const __m512i bytes = _mm512_permutexvar_epi8(_mm512_loadu_si512(tile.from + 64 * p), packed);
    const __m512i fields =
        _mm512_multishift_epi64_epi8(_mm512_loadu_si512(tile.shift + 64 * p), bytes);
    _mm512_storeu_si512(codes + 64 * p,
                        _mm512_and_si512(fields, _mm512_loadu_si512(tile.mask + 64 * p)));
  }
}

// [parts * 16] registers of four coordinates' weights for each of 16 queries; 0 for those that
// there are not.
void LayWeights(const KeyRowTile& tile, uint32_t first, int32_t (*out)[16]) {
  for (uint32_t c = 0; c < tile.parts * 16; ++c) {
    for (uint32_t i = 0; i < 16; ++i) {
      out[c][i] = 0;
      if (first + i >= tile.queries) continue;
      std::memcpy(&out[c][i], tile.weights + size_t{first + i} * tile.parts * 64 + 4 * c, 4);
    }
  }
}

// Sums of up to 16 queries, a lane each.
__m512i KeyRowSums(const uint8_t* codes, uint32_t fours, const int32_t (*weights)[16]) {
  __m512i sum[4] = {};
  for (uint32_t c = 0; c < fours; c += 4) {
    for (uint32_t j = 0; j < 4; ++j) {
      int32_t four;
      std::memcpy(&four, codes + 4 * (c + j), sizeof(four));
      sum[j] = _mm512_dpbusd_epi32(sum[j], _mm512_set1_epi32(four),
                                   _mm512_loadu_si512(weights[c + j]));
    }
  }
  return _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3]));
}

void ScoreKeyRowsAvx512(const KeyRowTile& tile) {
  alignas(64) int32_t weights[kMostParts * 16][16];
  alignas(64) uint8_t codes[kMostParts * 64];
  const uint32_t last = tile.count - 1;
  for (uint32_t first = 0; first < tile.queries; first += 16) {
    LayWeights(tile, first, weights);
    const uint32_t queries = tile.queries - first < 16 ? tile.queries - first : 16;
    for (uint32_t r = 0; r < tile.count; ++r) {
      const uint32_t ahead = r + kRowsAhead < last ? r + kRowsAhead : last;
      PrefetchRow(tile.rows + tile.which[ahead] * tile.stride, tile.stride);
      UnpackKeyRow(tile, tile.rows + tile.which[r] * tile.stride, codes);
      alignas(64) int32_t sums[16];
      _mm512_store_si512(sums, KeyRowSums(codes, tile.parts * 16, weights));
      for (uint32_t i = 0; i < queries; ++i) tile.out[(first + i) * tile.ld_out + r] = sums[i];
    }
  }
}

// kQueries queries and 64 dimensions (fewer at the end) of all rows.
template <uint32_t kQueries>
void AddValueRowsPart(const ValueRowTile& tile, uint32_t query, uint32_t dim) {
  const __m512 level =
      _mm512_setr_ps(-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -0.5f, 0.5f, 1.5f, 2.5f, 3.5f,
                     4.5f, 5.5f, 6.5f, 7.5f);
  const uint32_t groups = tile.dims - dim >= 64 ? 2 : 1;
  __m512 acc[kQueries][4];
  for (uint32_t i = 0; i < kQueries; ++i) {
    for (uint32_t j = 0; j < 2 * groups; ++j) {
      acc[i][j] = _mm512_loadu_ps(tile.acc + size_t{query + i} * tile.dims + dim + 16 * j);
    }
  }
  for (uint32_t r = 0; r < tile.count; ++r) {
    const uint32_t ahead = r + kRowsAhead < tile.count ? r + kRowsAhead : tile.count - 1;
    const uint8_t* const row = tile.rows + tile.which[r] * tile.stride + dim / 2;
    if (dim == 0) PrefetchRow(tile.rows + tile.which[ahead] * tile.stride, tile.stride);
    for (uint32_t g = 0; g < groups; ++g) {
      const __m512i two = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 16 * g)));
      // A permutation looks at the low 4 bits of each lane alone.
      const __m512 low = _mm512_permutexvar_ps(two, level);
      const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(two, 4), level);
      for (uint32_t i = 0; i < kQueries; ++i) {
        const __m512 w = _mm512_set1_ps(tile.weights[(query + i) * tile.ld_weights + r]);
        acc[i][2 * g] = _mm512_fmadd_ps(w, low, acc[i][2 * g]);
        acc[i][2 * g + 1] = _mm512_fmadd_ps(w, high, acc[i][2 * g + 1]);
      }
    }
  }
  for (uint32_t i = 0; i < kQueries; ++i) {
    for (uint32_t j = 0; j < 2 * groups; ++j) {
      _mm512_storeu_ps(tile.acc + size_t{query + i} * tile.dims + dim + 16 * j, acc[i][j]);
    }
  }
}

void AddValueRowsAvx512(const ValueRowTile& tile) {
  constexpr uint32_t kTileRows = 128;  // stay in the first cache from one part to the next
  for (uint32_t first = 0; first < tile.count; first += kTileRows) {
    ValueRowTile some = tile;
    some.which += first;
    some.weights += first;
    some.count = tile.count - first < kTileRows ? tile.count - first : kTileRows;
    for (uint32_t dim = 0; dim < tile.dims; dim += 64) {
      uint32_t query = 0;
      for (; query + 4 <= tile.queries; query += 4) AddValueRowsPart<4>(some, query, dim);
      for (; query < tile.queries; ++query) AddValueRowsPart<1>(some, query, dim);
    }
  }
}

}  // namespace
}  // namespace quarry::kernels

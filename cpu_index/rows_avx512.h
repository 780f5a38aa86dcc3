// Rows of coded keys and values, and how they are coded, with AVX-512 VBMI and VNNI: 64 coordinates,
// or 16 dimensions, a register.
#pragma once

#include <immintrin.h>

#include "cpu_index/kernels.h"
#include "cpu_index/rows_vector.h"
#include "cpu_index/vector_avx512.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

// One part of a row's codes, a byte each.
inline __m512i UnpackKeyRow(const KeyRowTile& tile, const uint8_t* row, uint32_t p) {
  const __m512i packed = _mm512_loadu_si512(row + tile.part[p]);
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_loadu_si512(tile.from + 64 * p), packed);
  const __m512i fields =
      _mm512_multishift_epi64_epi8(_mm512_loadu_si512(tile.shift + 64 * p), bytes);
  return _mm512_and_si512(fields, _mm512_loadu_si512(tile.mask + 64 * p));
}

// Of kQueries queries and one row: sums of codes by weights, in 16 parts.
template <uint32_t kQueries>
void SumKeyRow(const KeyRowTile& tile, const uint8_t* row, const int8_t* weights, __m512* sums) {
  __m512i of_query[kQueries] = {};
  for (uint32_t p = 0; p < tile.parts; ++p) {
    const __m512i codes = UnpackKeyRow(tile, row, p);
    for (uint32_t i = 0; i < kQueries; ++i) {
      of_query[i] = _mm512_dpbusd_epi32(of_query[i], codes,
                                        _mm512_loadu_si512(weights + 64 * (i * tile.parts + p)));
    }
  }
  for (uint32_t i = 0; i < kQueries; ++i) sums[i] = _mm512_cvtepi32_ps(of_query[i]);
}

void ScoreKeyRowsAvx512(const KeyRowTile& tile) {
  ScoreKeyRows<Vector>(
      tile, [&]<uint32_t kQueries>(const uint8_t* row, const int8_t* weights, __m512* sums) {
        SumKeyRow<kQueries>(tile, row, weights, sums);
      });
}

// kQueries queries and 64 dimensions (fewer at the end) of all rows. listed: rows of tile.which,
// those of the tile and what is added next.
template <uint32_t kQueries>
void AddValueRowsPart(const ValueRowTile& tile, uint32_t query, uint32_t dim, uint32_t listed) {
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
    const uint8_t* const row = tile.rows + tile.which[r] * tile.stride + dim / 2;
    if (dim == 0) PrefetchValueRow(tile, r + kRowsAhead < listed ? r + kRowsAhead : listed - 1);
    const __m512 row_scale = _mm512_castsi512_ps(
        _mm512_set1_epi32(static_cast<int>(uint32_t{tile.row_scale[tile.which[r]]} << 16)));
    for (uint32_t g = 0; g < groups; ++g) {
      const __m512i two = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 16 * g)));
      // A permutation looks at the low 4 bits of each lane alone.
      const __m512 low = _mm512_permutexvar_ps(two, level);
      const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(two, 4), level);
      for (uint32_t i = 0; i < kQueries; ++i) {
        const __m512 w = _mm512_mul_ps(
            row_scale, _mm512_set1_ps(tile.weights[(query + i) * tile.ld_weights + r]));
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
  AddValueRows(tile, 64,
               []<uint32_t kQueries>(const ValueRowTile& some, uint32_t query, uint32_t dim,
                                     uint32_t listed) {
                 AddValueRowsPart<kQueries>(some, query, dim, listed);
               });
}

// The lanes of 16 that lie before `end`.
inline __mmask16 LanesUntil(uint32_t first, uint32_t end) {
  return end - first < 16 ? static_cast<__mmask16>((1u << (end - first)) - 1) : __mmask16{0xffff};
}

void MeasureRowsAvx512(const LengthTile& tile) {
  for (uint32_t r = 0; r < tile.rows; ++r) {
    const float* const x = tile.x + size_t{r} * tile.width;
    __m512 sum = _mm512_setzero_ps(), most = _mm512_setzero_ps();
    for (uint32_t c = 0; c < tile.width; c += 16) {
      const __mmask16 lanes = LanesUntil(c, tile.width);
      const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + c),
                                     _mm512_maskz_loadu_ps(lanes, tile.weight + c));
      sum = _mm512_fmadd_ps(y, y, sum);
      most = _mm512_max_ps(_mm512_mul_ps(y, y), most);
    }
    tile.squares[r] = _mm512_reduce_add_ps(sum);
    tile.most[r] = _mm512_reduce_max_ps(most);
  }
}

void QuantiseAvx512(const LevelTile& tile) {
  for (uint32_t c = 0; c < tile.width; c += 16) {
    const __mmask16 lanes = LanesUntil(c, tile.width);
    const __m512 inverse = _mm512_maskz_loadu_ps(lanes, tile.inverse_step + c);
    const __m512 half = _mm512_maskz_loadu_ps(lanes, tile.half + c);
    const __m512 least = _mm512_sub_ps(_mm512_setzero_ps(), half);
    const __m512 most = _mm512_sub_ps(half, _mm512_set1_ps(0.5f));
    for (uint32_t r = 0; r < tile.rows; ++r) {
      __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, tile.x + r * tile.ld_x + c), inverse);
      if (tile.factor != nullptr) y = _mm512_mul_ps(y, _mm512_set1_ps(tile.factor[r]));
      // What is no number is below everything: of such a pair the second is taken.
      y = _mm512_min_ps(_mm512_max_ps(y, least), most);
      _mm512_mask_cvtepi32_storeu_epi8(tile.out + r * tile.ld_out + c, lanes,
                                       _mm512_cvttps_epi32(_mm512_add_ps(y, half)));
    }
  }
}

}  // namespace
}  // namespace quarry::kernels

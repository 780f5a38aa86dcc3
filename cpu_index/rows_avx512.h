// Rows of coded keys and values, and how they are coded, with AVX-512 VBMI and VNNI: 64 coordinates,
// or 16 dimensions, a register.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "cpu_index/kernels.h"
#include "cpu_index/vector_avx512.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

// Rows that are fetched ahead: about the latency of DRAM.
constexpr uint32_t kRowsAhead = 16;

// Inlined by force: GCC drops calls to a function that only prefetches.
inline __attribute__((always_inline)) void PrefetchRow(const uint8_t* row, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(row) + at, _MM_HINT_T0);
  }
  _mm_prefetch(reinterpret_cast<const char*>(row) + bytes - 1, _MM_HINT_T0);
}

// One part of a row's codes, a byte each.
inline __m512i UnpackKeyRow(const KeyRowTile& tile, const uint8_t* row, uint32_t p) {
  const __m512i packed = _mm512_loadu_si512(row + tile.part[p]);
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_loadu_si512(tile.from + 64 * p), packed);
  const __m512i fields =
      _mm512_multishift_epi64_epi8(_mm512_loadu_si512(tile.shift + 64 * p), bytes);
  return _mm512_and_si512(fields, _mm512_loadu_si512(tile.mask + 64 * p));
}

// kQueries queries and as many rows as make up to 16 scores; rows past `end` are the last one.
template <uint32_t kQueries>
void ScoreSomeRows(const KeyRowTile& tile, uint32_t query, uint32_t first, uint32_t end) {
  constexpr uint32_t kRows = 16 / kQueries;
  const int8_t* const weights = tile.weights + size_t{query} * tile.parts * 64;
  __m512 sum[16] = {};
  uint32_t row_scale[16] = {};
  for (uint32_t r = 0; r < kRows; ++r) {
    const uint32_t at = tile.which[first + r < end ? first + r : end - 1];
    const uint8_t* const row = tile.rows + at * tile.stride;
    for (uint32_t i = 0; i < kQueries; ++i)
      row_scale[i * kRows + r] = uint32_t{tile.row_scale[at]} << 16;
    __m512i of_query[kQueries] = {};
    for (uint32_t p = 0; p < tile.parts; ++p) {
      const __m512i codes = UnpackKeyRow(tile, row, p);
      for (uint32_t i = 0; i < kQueries; ++i) {
        of_query[i] = _mm512_dpbusd_epi32(of_query[i], codes,
                                          _mm512_loadu_si512(weights + 64 * (i * tile.parts + p)));
      }
    }
    for (uint32_t i = 0; i < kQueries; ++i) sum[i * kRows + r] = _mm512_cvtepi32_ps(of_query[i]);
  }
  float scale[16] = {}, offset[16] = {};
  for (uint32_t lane = 0; lane < kQueries * kRows; ++lane) {
    scale[lane] = tile.scale[query + lane / kRows];
    offset[lane] = tile.offset[query + lane / kRows];
  }
  alignas(64) float out[16];
  _mm512_store_ps(out, _mm512_mul_ps(_mm512_fmadd_ps(Vector::SumEach(sum), _mm512_loadu_ps(scale),
                                                     _mm512_loadu_ps(offset)),
                                     _mm512_castsi512_ps(_mm512_loadu_si512(row_scale))));
  const uint32_t count = end - first < kRows ? end - first : kRows;
  for (uint32_t i = 0; i < kQueries; ++i) {
    for (uint32_t r = 0; r < count; ++r) {
      tile.out[(query + i) * tile.ld_out + first + r] = out[i * kRows + r];
    }
  }
}

// f(a number of queries as a constant, the first of them): up to four at a time.
void ForQueries(uint32_t queries, auto&& f) {
  uint32_t query = 0;
  for (; queries - query > 4; query += 4) f(std::integral_constant<uint32_t, 4>(), query);
  switch (queries - query) {
    case 1:
      return f(std::integral_constant<uint32_t, 1>(), query);
    case 2:
      return f(std::integral_constant<uint32_t, 2>(), query);
    case 3:
      return f(std::integral_constant<uint32_t, 3>(), query);
    case 4:
      return f(std::integral_constant<uint32_t, 4>(), query);
  }
}

// Of the tile's rows from the first-th on. Inlined by force, as PrefetchRow.
inline __attribute__((always_inline)) void PrefetchKeyRows(const KeyRowTile& tile, uint32_t first) {
  const uint32_t end = tile.count < first + kRowsAhead ? tile.count : first + kRowsAhead;
  for (uint32_t r = first; r < end; ++r) {
    PrefetchRow(tile.rows + tile.which[r] * tile.stride, tile.stride);
  }
}

void ScoreKeyRowsAvx512(const KeyRowTile& tile) {
  PrefetchKeyRows(tile, 0);
  for (uint32_t lo = 0; lo < tile.count; lo += kRowsAhead) {
    PrefetchKeyRows(tile, lo + kRowsAhead);
    const uint32_t hi = tile.count - lo < kRowsAhead ? tile.count : lo + kRowsAhead;
    ForQueries(tile.queries, [&](auto some, uint32_t query) {
      for (uint32_t r = lo; r < hi; r += 16 / some) ScoreSomeRows<some>(tile, query, r, hi);
    });
  }
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
    const uint32_t ahead = r + kRowsAhead < listed ? r + kRowsAhead : listed - 1;
    const uint8_t* const row = tile.rows + tile.which[r] * tile.stride + dim / 2;
    if (dim == 0) {
      PrefetchRow(tile.rows + tile.which[ahead] * tile.stride, tile.stride);
      _mm_prefetch(reinterpret_cast<const char*>(tile.row_scale + tile.which[ahead]), _MM_HINT_T0);
    }
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
  constexpr uint32_t kTileRows = 128;  // stay in the first cache from one part to the next
  for (uint32_t first = 0; first < tile.count; first += kTileRows) {
    ValueRowTile some = tile;
    some.which += first;
    some.weights += first;
    some.count = tile.count - first < kTileRows ? tile.count - first : kTileRows;
    for (uint32_t dim = 0; dim < tile.dims; dim += 64) {
      ForQueries(tile.queries, [&](auto queries, uint32_t query) {
        AddValueRowsPart<queries>(some, query, dim, tile.count - first);
      });
    }
  }
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

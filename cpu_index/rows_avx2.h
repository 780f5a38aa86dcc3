// Rows of coded keys and values with AVX2: 16 coordinates, or 8 dimensions, a register.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu_index/kernels.h"
#include "cpu_index/rows_vector.h"
#include "cpu_index/vector_avx2.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

// Where 16 coordinates, two groups of 8, are in a row and how each comes into 16 bits of its own:
// of the two bytes that it lies in, multiplied so that it begins in the upper one.
struct KeyFields {
  uint32_t from[2];  // in bytes
  alignas(32) uint8_t bytes[32];
  alignas(32) uint16_t factor[16];
  alignas(32) uint16_t mask[16];

  KeyFields() = default;
  KeyFields(const KeyRowTile& tile, uint32_t first) {
    for (uint32_t j = 0; j < 16; ++j) {
      const uint32_t c = first + j, group = c & ~7u;
      if (j % 8 == 0) from[j / 8] = tile.part[c / 64] + (tile.mask[c] == 0 ? 0 : tile.from[group]);
      const uint8_t byte = tile.shift[c] / 8;
      bytes[2 * j] = byte;
      bytes[2 * j + 1] = static_cast<uint8_t>(byte + 1);
      factor[j] = static_cast<uint16_t>(1u << (8 - tile.shift[c] % 8));
      mask[j] = tile.mask[c];
    }
  }

  __m256i Unpack(const uint8_t* row) const {
    const auto eight = [row](uint32_t at) {
      return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + at));
    };
    const __m256i packed = _mm256_set_m128i(eight(from[1]), eight(from[0]));
    const __m256i pairs = _mm256_shuffle_epi8(packed, Load(bytes));
    const __m256i fields = _mm256_srli_epi16(_mm256_mullo_epi16(pairs, Load(factor)), 8);
    return _mm256_and_si256(fields, Load(mask));
  }

 private:
  static __m256i Load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
};

void ScoreKeyRowsAvx2(const KeyRowTile& tile) {
  const uint32_t registers = tile.parts * 4;
  KeyFields fields[kMaxHeadDim / 16];
  for (uint32_t f = 0; f < registers; ++f) fields[f] = KeyFields(tile, 16 * f);
  ScoreKeyRows<Vector>(
      tile, [&]<uint32_t kQueries>(const uint8_t* row, const int8_t* weights, __m256* sums) {
        __m256i of_query[kQueries] = {};
        for (uint32_t f = 0; f < registers; ++f) {
          const __m256i codes = fields[f].Unpack(row);
          for (uint32_t i = 0; i < kQueries; ++i) {
            const __m256i by = _mm256_cvtepi8_epi16(_mm_loadu_si128(
                reinterpret_cast<const __m128i*>(weights + 16 * (i * registers + f))));
            of_query[i] = _mm256_add_epi32(of_query[i], _mm256_madd_epi16(codes, by));
          }
        }
        for (uint32_t i = 0; i < kQueries; ++i) sums[i] = _mm256_cvtepi32_ps(of_query[i]);
      });
}

// kQueries queries and 16 dimensions of all rows.
template <uint32_t kQueries>
void AddValueRowsPart(const ValueRowTile& tile, uint32_t query, uint32_t dim, uint32_t listed) {
  const __m256 middle = _mm256_set1_ps(7.5f);
  const __m128i shift = _mm_cvtsi32_si128(dim % kValueRowGroup == 0 ? 0 : 4);
  const size_t at = dim / kValueRowGroup * (kValueRowGroup / 2);
  __m256 acc[kQueries][2];
  for (uint32_t i = 0; i < kQueries; ++i) {
    float* const from = tile.acc + size_t{query + i} * tile.dims + dim;
    for (int j = 0; j < 2; ++j) acc[i][j] = _mm256_loadu_ps(from + 8 * j);
  }
  for (uint32_t r = 0; r < tile.count; ++r) {
    const uint8_t* const row = tile.rows + tile.which[r] * tile.stride + at;
    if (dim == 0) PrefetchValueRow(tile, r + kRowsAhead < listed ? r + kRowsAhead : listed - 1);
    const __m128i codes =
        _mm_and_si128(_mm_srl_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)), shift),
                      _mm_set1_epi8(15));
    const __m256 value[2] = {
        _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)), middle),
        _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8))), middle)};
    const __m256 row_scale = _mm256_castsi256_ps(
        _mm256_set1_epi32(static_cast<int>(uint32_t{tile.row_scale[tile.which[r]]} << 16)));
    for (uint32_t i = 0; i < kQueries; ++i) {
      const __m256 w =
          _mm256_mul_ps(row_scale, _mm256_set1_ps(tile.weights[(query + i) * tile.ld_weights + r]));
      for (int j = 0; j < 2; ++j) acc[i][j] = _mm256_fmadd_ps(w, value[j], acc[i][j]);
    }
  }
  for (uint32_t i = 0; i < kQueries; ++i) {
    float* const to = tile.acc + size_t{query + i} * tile.dims + dim;
    for (int j = 0; j < 2; ++j) _mm256_storeu_ps(to + 8 * j, acc[i][j]);
  }
}

void AddValueRowsAvx2(const ValueRowTile& tile) {
  AddValueRows(tile, 16,
               []<uint32_t kQueries>(const ValueRowTile& some, uint32_t query, uint32_t dim,
                                     uint32_t listed) {
                 AddValueRowsPart<kQueries>(some, query, dim, listed);
               });
}

// All ones in the lanes of 8 that lie before `end`.
inline __m256i LanesUntil(uint32_t first, uint32_t end) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(end - first)), lane);
}

void MeasureRowsAvx2(const LengthTile& tile) {
  for (uint32_t r = 0; r < tile.rows; ++r) {
    const float* const x = tile.x + size_t{r} * tile.width;
    __m256 sum = _mm256_setzero_ps(), most = _mm256_setzero_ps();
    for (uint32_t c = 0; c < tile.width; c += 8) {
      const __m256i lanes = LanesUntil(c, tile.width);
      const __m256 y = _mm256_mul_ps(_mm256_maskload_ps(x + c, lanes),
                                     _mm256_maskload_ps(tile.weight + c, lanes));
      sum = _mm256_fmadd_ps(y, y, sum);
      most = _mm256_max_ps(_mm256_mul_ps(y, y), most);
    }
    float sums[8], largest[8];
    _mm256_storeu_ps(sums, sum);
    _mm256_storeu_ps(largest, most);
    for (int j = 1; j < 8; ++j) {
      sums[0] += sums[j];
      largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
    }
    tile.squares[r] = sums[0];
    tile.most[r] = largest[0];
  }
}

void QuantiseAvx2(const LevelTile& tile) {
  for (uint32_t c = 0; c < tile.width; c += 8) {
    const __m256i lanes = LanesUntil(c, tile.width);
    const __m256 inverse = _mm256_maskload_ps(tile.inverse_step + c, lanes);
    const __m256 half = _mm256_maskload_ps(tile.half + c, lanes);
    const __m256 least = _mm256_sub_ps(_mm256_setzero_ps(), half);
    const __m256 most = _mm256_sub_ps(half, _mm256_set1_ps(0.5f));
    const size_t some = tile.width - c < 8 ? tile.width - c : 8;
    for (uint32_t r = 0; r < tile.rows; ++r) {
      __m256 y = _mm256_mul_ps(_mm256_maskload_ps(tile.x + r * tile.ld_x + c, lanes), inverse);
      if (tile.factor != nullptr) y = _mm256_mul_ps(y, _mm256_set1_ps(tile.factor[r]));
      // What is no number is below everything: of such a pair the second is taken.
      y = _mm256_min_ps(_mm256_max_ps(y, least), most);
      const __m256i level = _mm256_cvttps_epi32(_mm256_add_ps(y, half));
      const __m128i words =
          _mm_packs_epi32(_mm256_castsi256_si128(level), _mm256_extracti128_si256(level, 1));
      const __m128i bytes = _mm_packus_epi16(words, words);
      std::memcpy(tile.out + r * tile.ld_out + c, &bytes, some);
    }
  }
}

}  // namespace
}  // namespace quarry::kernels

// Sums and scores of coded keys with AVX-512 VNNI: 16 keys a register, 4 coordinates an instruction.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu_index/codes_vector.h"
#include "cpu_index/kernels.h"
#include "cpu_index/vector_avx512.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

// The coordinates of a block, 4 per register as unsigned bytes, a key in each 32-bit lane.
struct UnpackedCodes {
  __m512i part[kCodeCoordinates / 4];

  explicit UnpackedCodes(const uint8_t* block) {
    const __m512i nibble = _mm512_set1_epi8(15), pair = _mm512_set1_epi8(3);
    for (int v = 0; v < 2; ++v) {
      const __m512i bytes = _mm512_loadu_si512(block + 64 * v);
      part[2 * v] = _mm512_and_si512(bytes, nibble);
      part[2 * v + 1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
    }
    for (int v = 0; v < 2; ++v) {
      const __m512i bytes = _mm512_loadu_si512(block + 128 + 64 * v);
      for (int s = 0; s < 4; ++s) {
        part[4 + 4 * v + s] =
            _mm512_and_si512(_mm512_srl_epi16(bytes, _mm_cvtsi32_si128(2 * s)), pair);
      }
    }
  }
};

// [16 keys] of one query.
__m512i WeightedSum(const __m512i* part, const int8_t* weights) {
  __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
  for (uint32_t p = 0; p < kCodeCoordinates / 4; p += 2) {
    int32_t four[2];
    std::memcpy(four, weights + 4 * p, sizeof(four));
    even = _mm512_dpbusd_epi32(even, part[p], _mm512_set1_epi32(four[0]));
    odd = _mm512_dpbusd_epi32(odd, part[p + 1], _mm512_set1_epi32(four[1]));
  }
  return _mm512_add_epi32(even, odd);
}

void SumCodesAvx512(const CodeTile& tile) {
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    PrefetchBlock<kCodeBlockBytes>(tile.codes + BlockAt(tile, b + kBlocksAhead) * kCodeBlockBytes);
    const UnpackedCodes codes(tile.codes + BlockAt(tile, b) * kCodeBlockBytes);
    for (uint32_t i = 0; i < tile.queries; ++i) {
      _mm512_storeu_si512(tile.out + i * tile.ld_out + size_t{b} * kCodeBlockKeys,
                          WeightedSum(codes.part, tile.weights + size_t{i} * kCodeCoordinates));
    }
  }
}

// What is no number becomes -infinity: the second operand is taken then.
inline __m512 BoundedScores(__m512 x) {
  return _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-__builtin_inff())),
                       _mm512_set1_ps(kMostScore));
}

// Of the tile's b-th block, whose codes and scales are given.
inline __m512 CodedKeyScores(const CodedKeyTile& tile, const UnpackedCodes& codes, __m512 key_scale,
                             uint32_t b, uint32_t query) {
  const __m512 sum = _mm512_cvtepi32_ps(
      WeightedSum(codes.part, tile.weights + size_t{query} * kCodeCoordinates));
  const __m512 above = _mm512_fmadd_ps(sum, _mm512_set1_ps(tile.scale[query]),
                                       _mm512_set1_ps(tile.offset[query]));
  return BoundedScores(_mm512_fmadd_ps(
      above, key_scale, _mm512_set1_ps(tile.centre[query * tile.ld_centre + b])));
}

void ScoreCodesAvx512(const CodedKeyTile& tile) {
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    PrefetchCodedKeys(tile, BlockAt(tile, b + kBlocksAhead));
    const size_t at = BlockAt(tile, b);
    const UnpackedCodes codes(tile.codes + at * kCodeBlockBytes);
    const __m512 key_scale = Vector::LoadBf16(tile.key_scale + at * kCodeBlockKeys);
    for (uint32_t i = 0; i < tile.queries; ++i) {
      _mm512_storeu_ps(tile.out + i * tile.ld_out + size_t{b} * kCodeBlockKeys,
                       CodedKeyScores(tile, codes, key_scale, b, i));
    }
  }
}

// Two blocks of 16 keys of one query: what they have in common is loaded once.
struct TwoSums {
  __m512i first, second;
};
inline TwoSums WeightedSums(const __m512i* first, const __m512i* second, const int8_t* weights) {
  TwoSums even = {_mm512_setzero_si512(), _mm512_setzero_si512()}, odd = even;
  for (uint32_t p = 0; p < kCodeCoordinates / 4; p += 2) {
    int32_t four[2];
    std::memcpy(four, weights + 4 * p, sizeof(four));
    const __m512i a = _mm512_set1_epi32(four[0]), b = _mm512_set1_epi32(four[1]);
    even.first = _mm512_dpbusd_epi32(even.first, first[p], a);
    even.second = _mm512_dpbusd_epi32(even.second, second[p], a);
    odd.first = _mm512_dpbusd_epi32(odd.first, first[p + 1], b);
    odd.second = _mm512_dpbusd_epi32(odd.second, second[p + 1], b);
  }
  return {_mm512_add_epi32(even.first, odd.first), _mm512_add_epi32(even.second, odd.second)};
}

uint32_t FindCodesAvx512(const CodedKeyTile& tile, const float* least, uint32_t* found) {
  uint32_t count = 0;
  for (uint32_t b = 0; b < tile.blocks; b += 2) {
    const uint32_t next = b + 1 < tile.blocks ? b + 1 : b;
    PrefetchCodedKeys(tile, BlockAt(tile, b + kBlocksAhead));
    PrefetchCodedKeys(tile, BlockAt(tile, b + kBlocksAhead + 1));
    const size_t at[2] = {BlockAt(tile, b), BlockAt(tile, next)};
    const UnpackedCodes first(tile.codes + at[0] * kCodeBlockBytes);
    const UnpackedCodes second(tile.codes + at[1] * kCodeBlockBytes);
    const __m512 first_scale = Vector::LoadBf16(tile.key_scale + at[0] * kCodeBlockKeys);
    const __m512 second_scale = Vector::LoadBf16(tile.key_scale + at[1] * kCodeBlockKeys);
    uint32_t hits[2] = {0, 0};
    for (uint32_t i = 0; i < tile.queries; ++i) {
      const TwoSums sums =
          WeightedSums(first.part, second.part, tile.weights + size_t{i} * kCodeCoordinates);
      const __m512 scale = _mm512_set1_ps(tile.scale[i]), offset = _mm512_set1_ps(tile.offset[i]);
      const float* const centre = tile.centre + i * tile.ld_centre;
      const auto hit = [&](__m512i sum, __m512 key_scale, float of_block) {
        const __m512 above = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, offset);
        const __m512 score = _mm512_fmadd_ps(above, key_scale, _mm512_set1_ps(of_block));
        return _mm512_cmp_ps_mask(score, _mm512_set1_ps(least[i]), _CMP_GE_OQ);
      };
      hits[0] |= hit(sums.first, first_scale, centre[b]);
      hits[1] |= hit(sums.second, second_scale, centre[next]);
    }
    found[count] = b;
    count += hits[0] != 0 ? 1 : 0;
    found[count] = b + 1;
    count += hits[1] != 0 && next != b ? 1 : 0;
  }
  return count;
}

void ScoreNodesAvx512(const NodeTile& tile) {
  constexpr uint32_t kVectors = kCodeCoordinates / 4;
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    PrefetchNodes(tile, BlockAt(tile, b + kBlocksAhead));
    const size_t at = BlockAt(tile, b);
    const uint8_t* const block = tile.centroids + at * kCentroidBlockBytes;
    const __m512 variance = _mm512_loadu_ps(tile.variance + at * kCodeBlockKeys);
    __m512i part[kVectors];
    for (uint32_t v = 0; v < kVectors; ++v) part[v] = _mm512_loadu_si512(block + 64 * v);
    for (uint32_t i = 0; i < tile.queries; ++i) {
      const __m512 sum = _mm512_cvtepi32_ps(
          WeightedSum(part, tile.weights + size_t{i} * kCodeCoordinates));
      const __m512 spread = _mm512_min_ps(_mm512_mul_ps(variance, _mm512_set1_ps(tile.breadth[i])),
                                          _mm512_set1_ps(kMostNodeVariance));
      const __m512 centre = _mm512_fmadd_ps(sum, _mm512_set1_ps(tile.scale[i]),
                                            _mm512_set1_ps(tile.offset[i]));
      const size_t to = i * tile.ld_out + size_t{b} * kCodeBlockKeys;
      _mm512_storeu_ps(tile.out + to,
                       BoundedScores(_mm512_fmadd_ps(spread, _mm512_set1_ps(0.5f), centre)));
      if (tile.centre == nullptr) continue;
      // Where there is no node there is no centre either.
      const __m512 none = _mm512_set1_ps(-__builtin_inff());
      const __mmask16 there = _mm512_cmp_ps_mask(spread, none, _CMP_GT_OQ);
      _mm512_storeu_ps(tile.centre + to, BoundedScores(_mm512_mask_mov_ps(none, there, centre)));
    }
  }
}

size_t SelectAvx512(const float* x, size_t ld, uint32_t rows, size_t n, const float* least,
                    uint32_t* out) {
  size_t count = 0;
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 there = n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : 0xffff;
    __mmask16 taken = 0;
    for (uint32_t r = 0; r < rows; ++r) {
      const __m512 scores = _mm512_maskz_loadu_ps(there, x + r * ld + i);
      taken |= _mm512_mask_cmp_ps_mask(there, scores, _mm512_set1_ps(least[r]), _CMP_GE_OQ);
    }
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(taken, at));
    count += static_cast<size_t>(__builtin_popcount(taken));
    at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
  }
  return count;
}

void HistogramAvx512(const float* x, size_t n, float top, float per_unit, uint32_t* counts) {
  const __m512 from = _mm512_set1_ps(top), step = _mm512_set1_ps(per_unit);
  const __m512 last = _mm512_set1_ps(kHistogramBins - 1);
  CountBins(x, n, counts, [&](const float* values) {
    // What is no number goes last: the second operand is taken then.
    const __m512 depth = _mm512_max_ps(
        _mm512_min_ps(_mm512_mul_ps(_mm512_sub_ps(from, _mm512_loadu_ps(values)), step), last),
        _mm512_setzero_ps());
    return _mm512_cvttps_epi32(depth);
  });
}

}  // namespace
}  // namespace quarry::kernels

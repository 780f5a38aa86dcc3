// Sums and scores of coded keys with AVX2: 8 keys a register, 4 coordinates an instruction.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu_index/codes_vector.h"
#include "cpu_index/kernels.h"
#include "cpu_index/vector_avx2.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

constexpr int kHalves = 2;  // of a block's keys, a register each

inline __m256i LoadBytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// The weights of four coordinates of a query, for every key.
inline __m256i FourWeights(const int8_t* weights) {
  int32_t four;
  std::memcpy(&four, weights, sizeof(four));
  return _mm256_set1_epi32(four);
}

// Of a block of 16 keys and kQueries queries.
template <uint32_t kQueries>
struct BlockSums {
  __m256i of[kQueries][kHalves];

  // Sums of codes, which are below 16. In 16 bits: of 48 products of at most 128 by 15 for 16 of
  // the coordinates and by 3 for the others a lane has half.
  static BlockSums OfCodes(const uint8_t* block, const int8_t* weights) {
    BlockSums sums = {};
    const __m256i nibble = _mm256_set1_epi8(15), pair = _mm256_set1_epi8(3);
    const auto add = [&](const __m256i* bytes, int shift, __m256i mask, uint32_t part) {
      for (int h = 0; h < kHalves; ++h) {
        const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(bytes[h], shift), mask);
        for (uint32_t i = 0; i < kQueries; ++i) {
          sums.of[i][h] = _mm256_add_epi16(
              sums.of[i][h],
              _mm256_maddubs_epi16(codes, FourWeights(weights + i * kCodeCoordinates + 4 * part)));
        }
      }
    };
    for (uint32_t v = 0; v < 4; ++v) {
      const __m256i bytes[kHalves] = {LoadBytes(block + 64 * v), LoadBytes(block + 64 * v + 32)};
      if (v < 2) {
        add(bytes, 0, nibble, 2 * v);
        add(bytes, 4, nibble, 2 * v + 1);
      } else {
        add(bytes, 0, pair, 4 * v - 4);
        add(bytes, 2, pair, 4 * v - 3);
        add(bytes, 4, pair, 4 * v - 2);
        add(bytes, 6, pair, 4 * v - 1);
      }
    }
    for (uint32_t i = 0; i < kQueries; ++i) {
      for (int h = 0; h < kHalves; ++h) {
        sums.of[i][h] = _mm256_madd_epi16(sums.of[i][h], _mm256_set1_epi16(1));
      }
    }
    return sums;
  }

  // Sums of centroids, bytes: 4 bits at a time, lest two products leave 16 bits.
  static BlockSums OfCentroids(const uint8_t* block, const int8_t* weights) {
    BlockSums sums = {};
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
    for (uint32_t part = 0; part < kCodeCoordinates / 4; ++part) {
      for (int h = 0; h < kHalves; ++h) {
        const __m256i bytes = LoadBytes(block + 64 * part + 32 * h);
        const __m256i low = _mm256_and_si256(bytes, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        for (uint32_t i = 0; i < kQueries; ++i) {
          const __m256i four = FourWeights(weights + i * kCodeCoordinates + 4 * part);
          sums.of[i][h] = _mm256_add_epi32(
              sums.of[i][h],
              _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(low, four), ones),
                               _mm256_madd_epi16(_mm256_maddubs_epi16(high, four), sixteens)));
        }
      }
    }
    return sums;
  }
};

void SumCodesAvx2(const CodeTile& tile) {
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    PrefetchBlock<kCodeBlockBytes>(tile.codes + BlockAt(tile, b + kBlocksAhead) * kCodeBlockBytes);
    const uint8_t* const block = tile.codes + BlockAt(tile, b) * kCodeBlockBytes;
    ForQueries(tile.queries, [&](auto queries, uint32_t query) {
      const auto sums =
          BlockSums<queries>::OfCodes(block, tile.weights + size_t{query} * kCodeCoordinates);
      for (uint32_t i = 0; i < queries; ++i) {
        int32_t* const out = tile.out + (query + i) * tile.ld_out + size_t{b} * kCodeBlockKeys;
        for (int h = 0; h < kHalves; ++h) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * h), sums.of[i][h]);
        }
      }
    });
  }
}

// What is no number becomes -infinity: the second operand is taken then.
inline __m256 BoundedScores(__m256 x) {
  return _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-__builtin_inff())),
                       _mm256_set1_ps(kMostScore));
}

// use(query, half of the block, scores): of all keys of the tile's b-th block.
void WithCodedKeyScores(const CodedKeyTile& tile, uint32_t b, auto&& use) {
  const size_t at = BlockAt(tile, b);
  const uint8_t* const block = tile.codes + at * kCodeBlockBytes;
  const uint16_t* const scales = tile.key_scale + at * kCodeBlockKeys;
  const __m256 key_scale[kHalves] = {Vector::LoadBf16(scales), Vector::LoadBf16(scales + 8)};
  ForQueries(tile.queries, [&](auto queries, uint32_t query) {
    const auto sums =
        BlockSums<queries>::OfCodes(block, tile.weights + size_t{query} * kCodeCoordinates);
    for (uint32_t i = 0; i < queries; ++i) {
      const __m256 scale = _mm256_set1_ps(tile.scale[query + i]);
      const __m256 offset = _mm256_set1_ps(tile.offset[query + i]);
      const __m256 centre = _mm256_set1_ps(tile.centre[(query + i) * tile.ld_centre + b]);
      for (int h = 0; h < kHalves; ++h) {
        const __m256 above = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.of[i][h]), scale, offset);
        use(query + i, h, _mm256_fmadd_ps(above, key_scale[h], centre));
      }
    }
  });
}

void ScoreCodesAvx2(const CodedKeyTile& tile) {
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    PrefetchCodedKeys(tile, BlockAt(tile, b + kBlocksAhead));
    WithCodedKeyScores(tile, b, [&](uint32_t query, int half, __m256 scores) {
      float* const out = tile.out + query * tile.ld_out + size_t{b} * kCodeBlockKeys;
      _mm256_storeu_ps(out + 8 * half, BoundedScores(scores));
    });
  }
}

uint32_t FindCodesAvx2(const CodedKeyTile& tile, const float* least, uint32_t* found) {
  uint32_t count = 0;
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    PrefetchCodedKeys(tile, BlockAt(tile, b + kBlocksAhead));
    __m256 hits = _mm256_setzero_ps();
    WithCodedKeyScores(tile, b, [&](uint32_t query, int, __m256 scores) {
      hits = _mm256_or_ps(hits, _mm256_cmp_ps(scores, _mm256_set1_ps(least[query]), _CMP_GE_OQ));
    });
    found[count] = b;
    count += _mm256_movemask_ps(hits) != 0 ? 1 : 0;
  }
  return count;
}

void ScoreNodesAvx2(const NodeTile& tile) {
  const __m256 none = _mm256_set1_ps(-__builtin_inff()), half = _mm256_set1_ps(0.5f);
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    PrefetchNodes(tile, BlockAt(tile, b + kBlocksAhead));
    const size_t at = BlockAt(tile, b);
    ForQueries(tile.queries, [&](auto queries, uint32_t query) {
      const auto sums =
          BlockSums<queries>::OfCentroids(tile.centroids + at * kCentroidBlockBytes,
                                          tile.weights + size_t{query} * kCodeCoordinates);
      for (uint32_t i = query; i < query + queries; ++i) {
        for (int h = 0; h < kHalves; ++h) {
          const __m256 variance = _mm256_loadu_ps(tile.variance + at * kCodeBlockKeys + 8 * h);
          const __m256 spread =
              _mm256_min_ps(_mm256_mul_ps(variance, _mm256_set1_ps(tile.breadth[i])),
                            _mm256_set1_ps(kMostNodeVariance));
          const __m256 centre =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.of[i - query][h]),
                              _mm256_set1_ps(tile.scale[i]), _mm256_set1_ps(tile.offset[i]));
          const size_t to = i * tile.ld_out + size_t{b} * kCodeBlockKeys + 8 * h;
          _mm256_storeu_ps(tile.out + to, BoundedScores(_mm256_fmadd_ps(spread, half, centre)));
          if (tile.centre == nullptr) continue;
          // Where there is no node there is no centre either.
          const __m256 there = _mm256_cmp_ps(spread, none, _CMP_GT_OQ);
          _mm256_storeu_ps(tile.centre + to, BoundedScores(_mm256_blendv_ps(none, centre, there)));
        }
      }
    });
  }
}

size_t SelectAvx2(const float* x, size_t ld, uint32_t rows, size_t n, const float* least,
                  uint32_t* out) {
  size_t count = 0;
  for (size_t i = 0; i < n; i += 8) {
    const size_t some = n - i < 8 ? n - i : 8;
    __m256 taken = _mm256_setzero_ps();
    for (uint32_t r = 0; r < rows; ++r) {
      float tail[8] = {};
      const float* from = x + r * ld + i;
      if (some < 8) from = static_cast<const float*>(std::memcpy(tail, from, some * sizeof(float)));
      taken = _mm256_or_ps(
          taken, _mm256_cmp_ps(_mm256_loadu_ps(from), _mm256_set1_ps(least[r]), _CMP_GE_OQ));
    }
    auto bits = static_cast<uint32_t>(_mm256_movemask_ps(taken)) & ((1u << some) - 1);
    for (; bits != 0; bits &= bits - 1) {
      out[count++] = static_cast<uint32_t>(i) + static_cast<uint32_t>(__builtin_ctz(bits));
    }
  }
  return count;
}

void HistogramAvx2(const float* x, size_t n, float top, float per_unit, uint32_t* counts) {
  const __m256 from = _mm256_set1_ps(top), step = _mm256_set1_ps(per_unit);
  const __m256 last = _mm256_set1_ps(kHistogramBins - 1);
  CountBins(x, n, counts, [&](const float* values) {
    // What is no number goes last: the second operand is taken then.
    const __m256 depth = _mm256_max_ps(
        _mm256_min_ps(_mm256_mul_ps(_mm256_sub_ps(from, _mm256_loadu_ps(values)), step), last),
        _mm256_setzero_ps());
    return _mm256_cvttps_epi32(depth);
  });
}

}  // namespace
}  // namespace quarry::kernels

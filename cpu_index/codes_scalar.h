// Sums of coded keys without vector instructions.
#pragma once

#include "cpu_index/kernels.h"

namespace quarry::kernels {
namespace {

void SumCodesScalar(const CodeTile& tile) {
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    const uint32_t at = tile.which == nullptr ? b : tile.which[b];
    const uint8_t* const block = tile.codes + size_t{at} * kCodeBlockKeys * 16;
    for (uint32_t t = 0; t < kCodeBlockKeys; ++t) {
      uint8_t code[kCodeCoordinates];
      for (uint32_t v = 0; v < 2; ++v) {
        for (uint32_t j = 0; j < 4; ++j) {
          const uint8_t fine = block[64 * v + 4 * t + j], coarse = block[128 + 64 * v + 4 * t + j];
          code[8 * v + j] = fine & 15;
          code[8 * v + 4 + j] = fine >> 4;
          for (uint32_t s = 0; s < 4; ++s) code[16 + 16 * v + 4 * s + j] = coarse >> 2 * s & 3;
        }
      }
      for (uint32_t i = 0; i < tile.queries; ++i) {
        const int8_t* const weights = tile.weights + size_t{i} * kCodeCoordinates;
        int32_t sum = 0;
        for (uint32_t c = 0; c < kCodeCoordinates; ++c) sum += weights[c] * code[c];
        tile.out[i * tile.ld_out + size_t{b} * kCodeBlockKeys + t] = sum;
      }
    }
  }
}

// What is no number becomes -infinity.
float BoundedScore(float x) {
  if (!(x > -__builtin_inff())) return -__builtin_inff();
  return x < kMostScore ? x : kMostScore;
}

float FromBf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float out;
  __builtin_memcpy(&out, &wide, sizeof(out));
  return out;
}

// Of the tile's b-th block and one query.
void ScoreCodeBlock(const CodedKeyTile& tile, uint32_t b, uint32_t query, float* out) {
  const uint32_t at = tile.which == nullptr ? b : tile.which[b];
  int32_t sums[kCodeBlockKeys];
  SumCodesScalar({tile.codes, &at, 1, tile.weights + size_t{query} * kCodeCoordinates, 1, sums,
                  kCodeBlockKeys});
  for (uint32_t t = 0; t < kCodeBlockKeys; ++t) {
    const float scale = FromBf16(tile.key_scale[size_t{at} * kCodeBlockKeys + t]);
    const float above = tile.scale[query] * static_cast<float>(sums[t]) + tile.offset[query];
    out[t] = BoundedScore(above * scale + tile.centre[query * tile.ld_centre + b]);
  }
}

void ScoreCodesScalar(const CodedKeyTile& tile) {
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    for (uint32_t i = 0; i < tile.queries; ++i) {
      ScoreCodeBlock(tile, b, i, tile.out + i * tile.ld_out + size_t{b} * kCodeBlockKeys);
    }
  }
}

uint32_t FindCodesScalar(const CodedKeyTile& tile, const float* least, uint32_t* found) {
  uint32_t count = 0;
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    bool hit = false;
    for (uint32_t i = 0; i < tile.queries && !hit; ++i) {
      float scores[kCodeBlockKeys];
      ScoreCodeBlock(tile, b, i, scores);
      for (float score : scores) hit |= score >= least[i];
    }
    if (hit) found[count++] = b;
  }
  return count;
}

void ScoreNodesScalar(const NodeTile& tile) {
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    const size_t at = tile.which == nullptr ? b : tile.which[b];
    const uint8_t* const block = tile.centroids + at * kCentroidBlockBytes;
    const float* const variance = tile.variance + at * kCodeBlockKeys;
    for (uint32_t i = 0; i < tile.queries; ++i) {
      const int8_t* const weights = tile.weights + size_t{i} * kCodeCoordinates;
      for (uint32_t t = 0; t < kCodeBlockKeys; ++t) {
        int32_t sum = 0;
        for (uint32_t c = 0; c < kCodeCoordinates; ++c) {
          sum += weights[c] * block[c / 4 * 64 + t * 4 + c % 4];
        }
        const float wide = variance[t] * tile.breadth[i];
        const float spread = wide < kMostNodeVariance ? wide : kMostNodeVariance;
        const float centre = tile.scale[i] * static_cast<float>(sum) + tile.offset[i];
        const size_t to = i * tile.ld_out + size_t{b} * kCodeBlockKeys + t;
        tile.out[to] = BoundedScore(centre + 0.5f * spread);
        // Where there is no node there is no centre either.
        if (tile.centre != nullptr) {
          tile.centre[to] = BoundedScore(spread > -__builtin_inff() ? centre : spread);
        }
      }
    }
  }
}

size_t SelectScalar(const float* x, size_t ld, uint32_t rows, size_t n, const float* least,
                    uint32_t* out) {
  size_t count = 0;
  for (size_t i = 0; i < n; ++i) {
    bool taken = false;
    for (uint32_t r = 0; r < rows; ++r) taken |= x[r * ld + i] >= least[r];
    out[count] = static_cast<uint32_t>(i);
    count += taken ? 1 : 0;
  }
  return count;
}

void ExpGroupsScalar(const float* x, size_t groups, float shift, float* out) {
  for (size_t g = 0; g < groups; ++g) {
    float sum = 0;
    for (uint32_t t = 0; t < kCodeBlockKeys; ++t) {
      sum += __builtin_expf(x[g * kCodeBlockKeys + t] - shift);
    }
    out[g] = sum;
  }
}

void HistogramScalar(const float* x, size_t n, float top, float per_unit, uint32_t* counts) {
  constexpr float kLast = kHistogramBins - 1;
  for (size_t i = 0; i < n; ++i) {
    const float depth = (top - x[i]) * per_unit;
    // What is no number goes last.
    ++counts[static_cast<uint32_t>(depth < kLast ? (depth > 0 ? depth : 0) : kLast)];
  }
}

}  // namespace
}  // namespace quarry::kernels

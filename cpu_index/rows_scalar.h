// Rows of coded keys and values, and how they are coded, without vector instructions.
#pragma once

#include <cstring>

#include "cpu_index/codes_scalar.h"
#include "cpu_index/kernels.h"

namespace quarry::kernels {
namespace {

void ScoreKeyRowsScalar(const KeyRowTile& tile) {
  for (uint32_t r = 0; r < tile.count; ++r) {
    const uint8_t* const row = tile.rows + tile.which[r] * tile.stride;
    uint8_t code[kMaxHeadDim] = {};
    for (uint32_t c = 0; c < tile.parts * 64; c += 8) {
      if (tile.mask[c] == 0) continue;
      uint64_t packed;
      std::memcpy(&packed, row + tile.part[c / 64] + tile.from[c], sizeof(packed));
      for (uint32_t j = c; j < c + 8; ++j) {
        code[j] = static_cast<uint8_t>(packed >> tile.shift[j] & tile.mask[j]);
      }
    }
    const float row_scale = FromBf16(tile.row_scale[tile.which[r]]);
    for (uint32_t i = 0; i < tile.queries; ++i) {
      const int8_t* const weights = tile.weights + size_t{i} * tile.parts * 64;
      int32_t sum = 0;
      for (uint32_t c = 0; c < tile.parts * 64; ++c) sum += weights[c] * code[c];
      tile.out[i * tile.ld_out + r] =
          (tile.scale[i] * static_cast<float>(sum) + tile.offset[i]) * row_scale;
    }
  }
}

void AddValueRowsScalar(const ValueRowTile& tile) {
  constexpr uint32_t kHalf = kValueRowGroup / 2;
  for (uint32_t r = 0; r < tile.count; ++r) {
    const uint8_t* const row = tile.rows + tile.which[r] * tile.stride;
    const float row_scale = FromBf16(tile.row_scale[tile.which[r]]);
    for (uint32_t i = 0; i < tile.queries; ++i) {
      const float w = tile.weights[i * tile.ld_weights + r] * row_scale;
      if (w == 0) continue;
      float* const acc = tile.acc + size_t{i} * tile.dims;
      for (uint32_t g = 0; g < tile.dims / kValueRowGroup; ++g) {
        for (uint32_t j = 0; j < kHalf; ++j) {
          const uint8_t two = row[g * kHalf + j];
          acc[g * kValueRowGroup + j] += w * (static_cast<float>(two & 15) - 7.5f);
          acc[g * kValueRowGroup + kHalf + j] += w * (static_cast<float>(two >> 4) - 7.5f);
        }
      }
    }
  }
}

void MeasureRowsScalar(const LengthTile& tile) {
  constexpr uint32_t kChains = 16;  // that a compiler can keep in vectors
  for (uint32_t r = 0; r < tile.rows; ++r) {
    const float* const x = tile.x + size_t{r} * tile.width;
    float sum[kChains] = {}, most[kChains] = {};
    for (uint32_t lo = 0; lo < tile.width; lo += kChains) {
      const uint32_t n = tile.width - lo < kChains ? tile.width - lo : kChains;
      for (uint32_t j = 0; j < n; ++j) {
        const float y = x[lo + j] * tile.weight[lo + j];
        sum[j] += y * y;
        most[j] = y * y > most[j] ? y * y : most[j];
      }
    }
    for (uint32_t j = 1; j < kChains; ++j) {
      sum[0] += sum[j];
      most[0] = most[j] > most[0] ? most[j] : most[0];
    }
    tile.squares[r] = sum[0];
    tile.most[r] = most[0];
  }
}

void QuantiseScalar(const LevelTile& tile) {
  for (uint32_t r = 0; r < tile.rows; ++r) {
    const float* const x = tile.x + r * tile.ld_x;
    const float factor = tile.factor != nullptr ? tile.factor[r] : 1;
    uint8_t* const out = tile.out + r * tile.ld_out;
    for (uint32_t c = 0; c < tile.width; ++c) {
      // Shifted above zero before it is rounded towards it.
      const float half = tile.half[c], y = x[c] * tile.inverse_step[c] * factor;
      const float least = y > -half ? y : -half;
      const float held = least < half - 0.5f ? least : half - 0.5f;
      out[c] = static_cast<uint8_t>(static_cast<int32_t>(held + half));
    }
  }
}

}  // namespace
}  // namespace quarry::kernels

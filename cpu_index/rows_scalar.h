// Rows of coded keys and values without vector instructions.
#pragma once

#include <cstring>

#include "cpu_index/codes_scalar.h"
#include "cpu_index/kernels.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

void ScoreKeyRowsScalar(const KeyRowTile& tile) {
  constexpr uint32_t kMostCodes = 512;
  for (uint32_t r = 0; r < tile.count; ++r) {
    const uint8_t* const row = tile.rows + tile.which[r] * tile.stride;
    uint8_t code[kMostCodes] = {};
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

}  // namespace
}  // namespace quarry::kernels

// Rows of coded keys and values without vector instructions.
#pragma once

#include <cstring>

#include "cpu_index/kernels.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

void ScoreKeyRowsScalar(const KeyRowTile& tile) {
  for (uint32_t r = 0; r < tile.count; ++r) {
    const uint8_t* const row = tile.rows + tile.which[r] * tile.stride;
    for (uint32_t i = 0; i < tile.queries; ++i) tile.out[i * tile.ld_out + r] = 0;
    for (uint32_t group = 0; group < tile.parts * 8; ++group) {
      const size_t c = size_t{group} * 8;
      if (tile.mask[c] == 0) continue;
      uint64_t packed;
      std::memcpy(&packed, row + tile.part[c / 64] + tile.from[c], sizeof(packed));
      uint8_t code[8];
      for (uint32_t j = 0; j < 8; ++j) {
        code[j] = static_cast<uint8_t>(packed >> tile.shift[c + j] & tile.mask[c + j]);
      }
      for (uint32_t i = 0; i < tile.queries; ++i) {
        const int8_t* const weights = tile.weights + size_t{i} * tile.parts * 64 + c;
        int32_t sum = 0;
        for (uint32_t j = 0; j < 8; ++j) sum += weights[j] * code[j];
        tile.out[i * tile.ld_out + r] += sum;
      }
    }
  }
}

void AddValueRowsScalar(const ValueRowTile& tile) {
  constexpr uint32_t kHalf = kValueRowGroup / 2;
  for (uint32_t r = 0; r < tile.count; ++r) {
    const uint8_t* const row = tile.rows + tile.which[r] * tile.stride;
    for (uint32_t i = 0; i < tile.queries; ++i) {
      const float w = tile.weights[i * tile.ld_weights + r];
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

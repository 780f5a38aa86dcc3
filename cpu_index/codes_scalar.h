// Sums of coded keys without vector instructions.
#pragma once

#include "cpu_index/kernels.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

void SumCodesScalar(const CodeTile& tile) {
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    const uint8_t* const block = tile.codes + size_t{b} * kCodeBlockKeys * 16;
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

}  // namespace
}  // namespace quarry::kernels

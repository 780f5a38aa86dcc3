// Sums of coded keys without vector instructions.
#pragma once

#include "cpu_index/kernels.h"

// Compiled anew for every level: nothing here may be shared between object files.
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

uint64_t FindCodesScalar(const CodeTile& tile, const int32_t* least) {
  uint64_t found = 0;
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    for (uint32_t i = 0; i < tile.queries; ++i) {
      int32_t sums[kCodeBlockKeys];
      CodeTile one = tile;
      const uint32_t at = tile.which == nullptr ? b : tile.which[b];
      one.which = &at;
      one.blocks = 1;
      one.weights = tile.weights + size_t{i} * kCodeCoordinates;
      one.queries = 1;
      one.out = sums;
      SumCodesScalar(one);
      for (int32_t sum : sums) found |= uint64_t{sum >= least[i * tile.ld_out + b]} << b;
    }
  }
  return found;
}

void SumCentroidsScalar(const CentroidTile& tile) {
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    const uint32_t at = tile.which == nullptr ? b : tile.which[b];
    const uint8_t* const block = tile.centroids + size_t{at} * kCentroidBlockBytes;
    for (uint32_t i = 0; i < tile.queries; ++i) {
      const int8_t* const weights = tile.weights + size_t{i} * kCodeCoordinates;
      for (uint32_t t = 0; t < kCodeBlockKeys; ++t) {
        int32_t sum = 0;
        for (uint32_t c = 0; c < kCodeCoordinates; ++c) {
          sum += weights[c] * block[c / 4 * 64 + t * 4 + c % 4];
        }
        tile.out[i * tile.ld_out + size_t{b} * kCodeBlockKeys + t] = sum;
      }
    }
  }
}

}  // namespace
}  // namespace quarry::kernels

// Sums of coded keys with AVX-512 VNNI: 16 keys a register, 4 coordinates an instruction.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu_index/kernels.h"

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

// About the latency of DRAM at its bandwidth.
constexpr uint32_t kBlocksAhead = 8;

// Of the b-th block that the tile takes; of the last one for those behind it.
template <typename Tile>
size_t BlockAt(const Tile& tile, uint32_t b) {
  b = b < tile.blocks ? b : tile.blocks - 1;
  return tile.which == nullptr ? b : tile.which[b];
}

template <size_t kBytes>
void PrefetchBlock(const uint8_t* block) {
  for (size_t line = 0; line < kBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(block) + line, _MM_HINT_T0);
  }
}

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

constexpr size_t kCodeBlockBytes = 256;

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

uint64_t FindCodesAvx512(const CodeTile& tile, const int32_t* least) {
  uint64_t found = 0;
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    // Tiles follow one another, so what lies behind this one is wanted next.
    const size_t ahead = tile.which == nullptr ? b + kBlocksAhead : BlockAt(tile, b + kBlocksAhead);
    PrefetchBlock<kCodeBlockBytes>(tile.codes + ahead * kCodeBlockBytes);
    const UnpackedCodes codes(tile.codes + BlockAt(tile, b) * kCodeBlockBytes);
    uint32_t hits = 0;
    for (uint32_t i = 0; i < tile.queries; ++i) {
      hits |= _mm512_cmpge_epi32_mask(
          WeightedSum(codes.part, tile.weights + size_t{i} * kCodeCoordinates),
          _mm512_set1_epi32(least[i * tile.ld_out + b]));
    }
    found |= uint64_t{hits != 0} << b;
  }
  return found;
}

void SumCentroidsAvx512(const CentroidTile& tile) {
  constexpr uint32_t kVectors = kCodeCoordinates / 4;
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    const uint8_t* const block = tile.centroids + BlockAt(tile, b) * kCentroidBlockBytes;
    PrefetchBlock<kCentroidBlockBytes>(tile.centroids + BlockAt(tile, b + kBlocksAhead) *
                                                            kCentroidBlockBytes);
    __m512i part[kVectors];
    for (uint32_t v = 0; v < kVectors; ++v) part[v] = _mm512_loadu_si512(block + 64 * v);
    for (uint32_t i = 0; i < tile.queries; ++i) {
      _mm512_storeu_si512(tile.out + i * tile.ld_out + size_t{b} * kCodeBlockKeys,
                          WeightedSum(part, tile.weights + size_t{i} * kCodeCoordinates));
    }
  }
}

}  // namespace
}  // namespace quarry::kernels

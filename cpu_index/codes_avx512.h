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

void SumCodesAvx512(const CodeTile& tile) {
  constexpr size_t kBlockBytes = 256;
  // Eight blocks ahead: 2 KiB, about the latency of DRAM at its bandwidth.
  constexpr size_t kAhead = 8 * kBlockBytes;
  for (uint32_t b = 0; b < tile.blocks; ++b) {
    const uint8_t* const block = tile.codes + b * kBlockBytes;
    for (size_t line = 0; line < kBlockBytes; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(block) + kAhead + line, _MM_HINT_T0);
    }
    const UnpackedCodes codes(block);
    for (uint32_t i = 0; i < tile.queries; ++i) {
      const int8_t* const weights = tile.weights + size_t{i} * kCodeCoordinates;
      __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
      for (uint32_t p = 0; p < kCodeCoordinates / 4; p += 2) {
        int32_t four[2];
        std::memcpy(four, weights + 4 * p, sizeof(four));
        even = _mm512_dpbusd_epi32(even, codes.part[p], _mm512_set1_epi32(four[0]));
        odd = _mm512_dpbusd_epi32(odd, codes.part[p + 1], _mm512_set1_epi32(four[1]));
      }
      _mm512_storeu_si512(tile.out + i * tile.ld_out + size_t{b} * kCodeBlockKeys,
                          _mm512_add_epi32(even, odd));
    }
  }
}

}  // namespace
}  // namespace quarry::kernels

// Scalar bf16 and fp16 conversions, for everything that is not a kernel.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <span>

#include "proto/types.h"

namespace quarry {

inline float Bf16ToFloat(uint16_t h) { return std::bit_cast<float>(uint32_t{h} << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
inline uint16_t FloatToBf16(float f) {
  uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float Fp16ToFloat(uint16_t h) {
  uint32_t sign = uint32_t{h & 0x8000u} << 16;
  uint32_t exponent = (h >> 10) & 31;
  uint32_t mantissa = h & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Round to nearest, ties to even; overflow gives infinity, a NaN stays a NaN.
inline uint16_t FloatToFp16(float f) {
  uint32_t bits = std::bit_cast<uint32_t>(f);
  uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                       // subnormal: let the FPU round at 2^-24
    float scaled = std::bit_cast<float>(magnitude) + 0.5f;  // ulp of [0.5, 1) is 2^-24
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(scaled) - 0x3f000000u);
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

// Element i of an array of `dtype`, widened exactly.
inline float LoadAsFloat(const void* data, size_t i, DType dtype) {
  const char* p = static_cast<const char*>(data);
  if (dtype == DType::kFp32) {
    float f;
    std::memcpy(&f, p + i * 4, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, p + i * 2, 2);
  return dtype == DType::kBf16 ? Bf16ToFloat(h) : Fp16ToFloat(h);
}

// Stores f as element i of an array of `dtype`, rounded to nearest even.
inline void StoreFromFloat(void* data, size_t i, DType dtype, float f) {
  char* p = static_cast<char*>(data);
  if (dtype == DType::kFp32) {
    std::memcpy(p + i * 4, &f, 4);
    return;
  }
  uint16_t h = dtype == DType::kBf16 ? FloatToBf16(f) : FloatToFp16(f);
  std::memcpy(p + i * 2, &h, 2);
}

}  // namespace quarry

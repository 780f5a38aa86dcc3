// Vectors of the compiler as wide as the instruction set that a file is compiled for, and what
// coding needs of them. As tile_coding.h: compiled anew for every level.
#pragma once

#include "storage/codecs/tile_kernels.h"

namespace quarry::codecs {
namespace {

#if defined(__AVX512F__)
constexpr uint32_t kWidth = 16;
#elif defined(__AVX2__)
constexpr uint32_t kWidth = 8;
#else
constexpr uint32_t kWidth = 4;
#endif
static_assert(kHeadDimStep % kWidth == 0 && coded::kValueChannels % kWidth == 0);

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

inline Floats All(float x) { return x - Floats{}; }
inline Floats ToFloats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats AsFloats(Ints x) { return reinterpret_cast<Floats>(x); }
inline Ints AsInts(Floats x) { return reinterpret_cast<Ints>(x); }

inline Floats LoadFloats(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline void Store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof(x)); }
inline Ints LoadBytes(const uint8_t* p) {
  Bytes x;
  __builtin_memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, Ints);
}
// Of numbers from 0 to 255.
inline void StoreBytes(uint8_t* p, Ints x) {
  const Bytes bytes = __builtin_convertvector(x, Bytes);
  __builtin_memcpy(p, &bytes, sizeof(bytes));
}

// Words of kBytes, each in a lane; return what is behind them.
template <uint32_t kBytes>
inline uint8_t* StoreWords(Ints x, uint8_t* out) {
  if constexpr (kBytes == 2) {
    const Halves halves = __builtin_convertvector(x, Halves);
    __builtin_memcpy(out, &halves, sizeof(halves));
  } else {
    __builtin_memcpy(out, &x, sizeof(x));
  }
  return out + kWidth * kBytes;
}
template <uint32_t kBytes>
inline const uint8_t* LoadWords(const uint8_t* in, Ints* x) {
  if constexpr (kBytes == 2) {
    Halves halves;
    __builtin_memcpy(&halves, in, sizeof(halves));
    *x = __builtin_convertvector(halves, Ints);
  } else {
    __builtin_memcpy(x, in, sizeof(*x));
  }
  return in + kWidth * kBytes;
}

// b where either is no number.
inline Floats Least(Floats a, Floats b) { return a < b ? a : b; }
inline Floats Most(Floats a, Floats b) { return a > b ? a : b; }
inline Floats Magnitude(Floats x) { return AsFloats(AsInts(x) & 0x7fffffff); }
inline float MostLane(Floats x) {
  float most = x[0];
  for (uint32_t i = 1; i < kWidth; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// To the nearest whole number, ties to even; below 2^22. The sum has no digits behind the point.
inline Ints Rounded(Floats x) {
  constexpr float kShift = 0x1.8p23f;
  return AsInts(x + kShift) - 0x4b400000;
}

// To bf16 towards plus infinity, for numbers from 0 on, and towards minus infinity, but for -0.
inline Floats UpToBf16(Floats x) { return AsFloats((AsInts(x) + 0xffff) & ~0xffff); }
inline Floats DownToBf16(Floats x) {
  const Ints bits = AsInts(x);
  return AsFloats((bits + (bits >> 31 & 0xffff)) & ~0xffff);
}

// The code of a number of at most about 448 in magnitude, to nearest even.
inline Ints ToE4m3(Floats x) {
  constexpr int32_t kLeastNormal = 0x3c800000;  // 2^-6
  const Ints bits = AsInts(x), magnitude = bits & 0x7fffffff;
  const Ints normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  const Ints denormal = Rounded(AsFloats(magnitude) * 0x1p9f);
  const Ints code = magnitude < kLeastNormal ? denormal : normal;
  return (code < 0x7e ? code : 0x7e - Ints{}) | (bits >> 24 & 0x80);
}

inline Floats FromE4m3(Ints code) {
  const Ints low = code & 0x7f;
  const Floats normal = AsFloats((low << 20) + (120 << 23));
  const Floats magnitude = low < 8 ? ToFloats(low) * 0x1p-9f : normal;
  return AsFloats(AsInts(magnitude) | (code & 0x80) << 24);
}

// Elements [at, at + kWidth) of rows. Infinities of fp16 come out as larger numbers.
template <uint8_t kDtype>
inline Floats Widen(const void* rows, size_t at) {
  if constexpr (kDtype == kFp32) return LoadFloats(static_cast<const float*>(rows) + at);
  Halves halves;
  __builtin_memcpy(&halves, static_cast<const char*>(rows) + at * 2, sizeof(halves));
  const Ints wide = __builtin_convertvector(halves, Ints);
  if constexpr (kDtype == kBf16) return AsFloats(wide << 16);
  const Floats magnitude = AsFloats((wide & 0x7fff) << 13) * 0x1p112f;
  return AsFloats(AsInts(magnitude) | (wide & 0x8000) << 16);
}

// Stores elements [at, at + kWidth), to nearest even and within the dtype's finite numbers.
template <uint8_t kDtype>
inline void Narrow(Floats x, void* rows, size_t at) {
  constexpr float kMost = kDtype == kBf16   ? 0x1.fep127f
                          : kDtype == kFp16 ? 65504.0f
                                            : 0x1.fffffep127f;
  x = Least(Most(x, All(-kMost)), All(kMost));
  if constexpr (kDtype == kFp32) return Store(static_cast<float*>(rows) + at, x);
  const Ints bits = AsInts(x);
  Ints narrow;
  if constexpr (kDtype == kBf16) {
    narrow = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  } else {
    constexpr int32_t kLeastNormal = 0x38800000;  // 2^-14
    const Ints magnitude = bits & 0x7fffffff;
    const Ints normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    const Ints denormal = Rounded(AsFloats(magnitude) * 0x1p24f);
    narrow = (magnitude < kLeastNormal ? denormal : normal) | (bits >> 16 & 0x8000);
  }
  const Halves halves = __builtin_convertvector(narrow, Halves);
  __builtin_memcpy(static_cast<char*>(rows) + at * 2, &halves, sizeof(halves));
}

}  // namespace
}  // namespace quarry::codecs

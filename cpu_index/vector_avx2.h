// Eight floats, for the AVX2 file.
#pragma once

#include <immintrin.h>

#include "cpu_index/attend_vector.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

struct Vector {
  using Reg = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kAccumulators = 8;
  // On Zen 3, 3 to 8 KiB were best, and a third faster from DRAM than 1 KiB with a group of 4.
  static constexpr size_t kAheadBytes = 4096;

  static Reg Zero() { return _mm256_setzero_ps(); }
  static Reg Set(float x) { return _mm256_set1_ps(x); }
  static Reg LoadFp32(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static Reg LoadFp16(const void* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static Reg LoadBf16(const void* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void Store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static Reg Fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg Mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg Add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg Sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg Max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg Round(Reg x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Reg Clamp(Reg x) {
    const Reg limit = Set(std::numeric_limits<float>::max());
    return _mm256_min_ps(_mm256_max_ps(x, _mm256_sub_ps(Zero(), limit)), limit);
  }
  static bool AnyAbove(Reg x, Reg limit) {
    return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GT_OQ)) != 0;
  }
  static Reg ScaleByPowerOfTwo(Reg x, Reg n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static Reg ZeroWhereBelow(Reg y, Reg x, float limit) {
    return _mm256_and_ps(y, _mm256_cmp_ps(x, Set(limit), _CMP_GE_OQ));
  }
  // kRows rows of kWidth / kRows floats each.
  template <int kRows>
  static void StoreRows(float* p, size_t ld, Reg x) {
    if constexpr (kRows == 1) {
      _mm256_storeu_ps(p, x);
    } else if constexpr (kRows == 2) {
      _mm_storeu_ps(p, _mm256_castps256_ps128(x));
      _mm_storeu_ps(p + ld, _mm256_extractf128_ps(x, 1));
    } else {
      const __m128 low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
      _mm_storel_pi(reinterpret_cast<__m64*>(p), low);
      _mm_storeh_pi(reinterpret_cast<__m64*>(p + ld), low);
      _mm_storel_pi(reinterpret_cast<__m64*>(p + 2 * ld), high);
      _mm_storeh_pi(reinterpret_cast<__m64*>(p + 3 * ld), high);
    }
  }
  // Lane i of the result is the sum of x[i]'s lanes.
  static Reg SumEach(const Reg* x) {
    Reg ab = _mm256_hadd_ps(x[0], x[1]), cd = _mm256_hadd_ps(x[2], x[3]);
    Reg ef = _mm256_hadd_ps(x[4], x[5]), gh = _mm256_hadd_ps(x[6], x[7]);
    Reg abcd = _mm256_hadd_ps(ab, cd), efgh = _mm256_hadd_ps(ef, gh);
    return _mm256_add_ps(_mm256_permute2f128_ps(abcd, efgh, 0x20),
                         _mm256_permute2f128_ps(abcd, efgh, 0x31));
  }

  // Words of codes (coded_vector.h), kWidth of 32 bits, as numbers.
  using Words = __m256i;
  static Words LoadWords(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  // For SignedByte, the byte less coded::kInt8Excess.
  static Words SignBytes(Words w) {
    return _mm256_xor_si256(w, _mm256_set1_epi32(static_cast<int>(0x80808080u)));
  }
  template <uint32_t kByte>
  static Reg SignedByte(Words signed_bytes) {
    return _mm256_cvtepi32_ps(
        _mm256_srai_epi32(_mm256_slli_epi32(signed_bytes, 24 - 8 * kByte), 24));
  }
  template <uint32_t kShift>
  static Reg FourBits(Words w) {
    return _mm256_cvtepi32_ps(
        _mm256_and_si256(_mm256_srli_epi32(w, kShift), _mm256_set1_epi32(15)));
  }
  // kWidth words of two e4m3: by 2^-8, as fp16 with the same bits of exponent and mantissa has
  // them.
  static void LoadE4m3(const void* p, Reg* low, Reg* high) {
    const __m128i w = _mm_loadu_si128(static_cast<const __m128i*>(p));
    *low = _mm256_cvtph_ps(HighE4m3(_mm_slli_epi16(w, 8)));
    *high = _mm256_cvtph_ps(HighE4m3(w));
  }
  static __m128i HighE4m3(__m128i w) {
    return _mm_or_si128(_mm_and_si128(w, _mm_set1_epi16(static_cast<short>(0x8000))),
                        _mm_and_si128(_mm_srli_epi16(w, 1), _mm_set1_epi16(0x3f80)));
  }
};

}  // namespace
}  // namespace quarry::kernels

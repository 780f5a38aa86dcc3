// Sixteen floats, for the AVX-512 and the AMX file.
#pragma once

#include <immintrin.h>

#include "cpu_index/attend_vector.h"

namespace quarry::kernels {
namespace {

struct Vector {
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kAccumulators = 16;
  // On Sapphire Rapids, 1 and 2 KiB were best from DRAM with few tokens between the keys and the
  // values (kAttendTokens); 4 KiB was a tenth slower.
  static constexpr size_t kAheadBytes = 1024;

  static Reg Zero() { return _mm512_setzero_ps(); }
  static Reg Set(float x) { return _mm512_set1_ps(x); }
  static Reg LoadFp32(const void* p) { return _mm512_loadu_ps(p); }
  static Reg LoadFp16(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static Reg LoadBf16(const void* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void Store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg Fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg Mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg Add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg Sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg Max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg Round(Reg x) { return _mm512_roundscale_ps(x, 0); }
  static Reg Clamp(Reg x) {
    const Reg limit = Set(std::numeric_limits<float>::max());
    return _mm512_min_ps(_mm512_max_ps(x, _mm512_sub_ps(Zero(), limit)), limit);
  }
  static bool AnyAbove(Reg x, Reg limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ) != 0; }
  static Reg ScaleByPowerOfTwo(Reg x, Reg n) { return _mm512_scalef_ps(x, n); }
  static Reg ZeroWhereBelow(Reg y, Reg x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, Set(limit), _CMP_GE_OQ), y);
  }
  // kRows rows of kWidth / kRows floats each.
  template <int kRows>
  static void StoreRows(float* p, size_t ld, Reg x) {
    if constexpr (kRows == 1) {
      _mm512_storeu_ps(p, x);
    } else if constexpr (kRows == 2) {
      _mm256_storeu_ps(p, _mm512_castps512_ps256(x));
      _mm256_storeu_ps(p + ld, _mm512_extractf32x8_ps(x, 1));
    } else {
      _mm_storeu_ps(p, _mm512_castps512_ps128(x));
      _mm_storeu_ps(p + ld, _mm512_extractf32x4_ps(x, 1));
      _mm_storeu_ps(p + 2 * ld, _mm512_extractf32x4_ps(x, 2));
      _mm_storeu_ps(p + 3 * ld, _mm512_extractf32x4_ps(x, 3));
    }
  }
  // Lane i of the result is the sum of x[i]'s lanes: a transposition that adds as it goes.
  static Reg SumEach(const Reg* x) {
    Reg pairs[8], quads[4];
    for (int i = 0; i < 8; ++i) {
      pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                               _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    }
    for (int i = 0; i < 4; ++i) {
      __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
      quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    Reg low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                            _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
    Reg high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                             _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                         _mm512_shuffle_f32x4(low, high, 0xdd));
  }

  // kWidth words of two e4m3: by 2^-8, as fp16 with the same bits of exponent and mantissa has
  // them.
  static void LoadE4m3(const void* p, Reg* low, Reg* high) {
    const __m256i w = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    *low = _mm512_cvtph_ps(HighE4m3(_mm256_slli_epi16(w, 8)));
    *high = _mm512_cvtph_ps(HighE4m3(w));
  }
  static __m256i HighE4m3(__m256i w) {
    const __m256i rest = _mm256_and_si256(_mm256_srli_epi16(w, 1), _mm256_set1_epi16(0x3f80));
    const __m256i sign = _mm256_set1_epi16(static_cast<short>(0x8000));
    return _mm256_ternarylogic_epi32(w, sign, rest, 0xea);  // (w & sign) | rest
  }
};

// bf16 queries with bf16 keys: two products per lane and instruction, exact up to the sum. As
// ScoreBlock.
template <int kQ, uint32_t kHeadDim>
void ScoreBlockBf16(const ScoreTile& a, uint32_t first_query, uint32_t first_token) {
  constexpr int kT = 16 / kQ;
  const uint32_t head_dim = kHeadDim == 0 ? a.head_dim : kHeadDim;
  const uint32_t whole = head_dim / 32 * 32;
  const uint16_t* q[kQ];
  for (int i = 0; i < kQ; ++i) {
    uint32_t query = first_query + i < a.queries ? first_query + i : a.queries - 1;
    q[i] = a.q_bf16 + size_t{query} * head_dim;
  }
  const uint16_t* keys = static_cast<const uint16_t*>(a.k);
  const RowStream<Vector> stream(a.k, a.next, a.tokens, size_t{head_dim} * 2);
  __m512 sum[16];
#pragma GCC unroll 16
  for (uint32_t j = 0; j < kT; ++j) {
    const uint32_t t = first_token + j < a.tokens ? first_token + j : a.tokens - 1;
    const uint16_t* k = keys + size_t{t} * head_dim;
    if (first_query == 0) stream.FetchAhead<kHeadDim * 2>(t, 0);
    __m512 s[kQ];
#pragma GCC unroll 4
    for (int i = 0; i < kQ; ++i) s[i] = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (uint32_t d = 0; d < whole; d += 32) {
      const __m512bh kr = (__m512bh)_mm512_loadu_si512(k + d);
#pragma GCC unroll 4
      for (int i = 0; i < kQ; ++i) {
        s[i] = _mm512_dpbf16_ps(s[i], (__m512bh)_mm512_loadu_si512(q[i] + d), kr);
      }
    }
    if (whole < head_dim) {  // a multiple of 16 that is not one of 32 ends in half a register
      const __m512bh kr = (__m512bh)_mm512_maskz_loadu_epi16(0xffffu, k + whole);
#pragma GCC unroll 4
      for (int i = 0; i < kQ; ++i) {
        const __m512bh qr = (__m512bh)_mm512_maskz_loadu_epi16(0xffffu, q[i] + whole);
        s[i] = _mm512_dpbf16_ps(s[i], qr, kr);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kQ; ++i) sum[i * kT + j] = s[i];
  }
  StoreScores<Vector, kQ>(a, first_query, first_token, sum);
}

template <uint32_t kHeadDim>
struct Bf16Blocks {
  template <int kQ>
  static void Run(const ScoreTile& a, uint32_t first_query, uint32_t first_token) {
    ScoreBlockBf16<kQ, kHeadDim>(a, first_query, first_token);
  }
};

void ScoreAvx512(const ScoreTile& a) {
  if (a.dtype != kBf16 || a.q_bf16 == nullptr) return Score<Vector>(a);
  WithHeadDim(a.head_dim,
              [&]<uint32_t kHeadDim>() { ScoreByBlocks<Vector, Bf16Blocks<kHeadDim>>(a); });
}

}  // namespace
}  // namespace quarry::kernels

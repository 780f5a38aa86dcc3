// Sixteen floats, for the AVX-512 and the AMX file.
#pragma once

#include <immintrin.h>

#include "cpu_index/kernels_vector.h"

namespace quarry::kernels {
namespace {

struct Vector {
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kAccumulators = 16;

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
  static Reg ScaleByPowerOfTwo(Reg x, Reg n) { return _mm512_scalef_ps(x, n); }
  static Reg ZeroWhereBelow(Reg y, Reg x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, Set(limit), _CMP_GE_OQ), y);
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
};

// bf16 queries with bf16 keys: two products per lane and instruction, exact up to the sum.
template <int kQ>
void ScoreBlockBf16(const ScoreTile& a, uint32_t first_query, uint32_t first_token) {
  constexpr int kT = 16 / kQ;
  const uint16_t* q[kQ];
  for (int i = 0; i < kQ; ++i) {
    uint32_t query = first_query + i < a.queries ? first_query + i : a.queries - 1;
    q[i] = a.q_bf16 + size_t{query} * a.head_dim;
  }
  const uint16_t* k[kT];
  for (int t = 0; t < kT; ++t) {
    uint32_t token = first_token + t < a.tokens ? first_token + t : a.tokens - 1;
    k[t] = static_cast<const uint16_t*>(a.k) + size_t{token} * a.head_dim;
  }
  __m512 sum[16];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  for (uint32_t d = 0; d < a.head_dim; d += 32) {
    // A multiple of 16 that is not one of 32 ends in half a register.
    __mmask32 mask = a.head_dim - d >= 32 ? 0xffffffffu : 0xffffu;
    __m512bh kr[kT];
    for (int t = 0; t < kT; ++t) kr[t] = (__m512bh)_mm512_maskz_loadu_epi16(mask, k[t] + d);
    for (int i = 0; i < kQ; ++i) {
      __m512bh qr = (__m512bh)_mm512_maskz_loadu_epi16(mask, q[i] + d);
      for (int t = 0; t < kT; ++t) {
        sum[i * kT + t] = _mm512_dpbf16_ps(sum[i * kT + t], qr, kr[t]);
      }
    }
  }
  const __m512 z = Vector::Clamp(Vector::Mul(Vector::SumEach(sum), Vector::Set(a.scale)));
  float* out = a.out + first_query * a.ld_out + first_token;
  if (kQ == 4 && first_query + 4 <= a.queries && first_token + 4 <= a.tokens) {
    _mm_storeu_ps(out, _mm512_extractf32x4_ps(z, 0));
    _mm_storeu_ps(out + a.ld_out, _mm512_extractf32x4_ps(z, 1));
    _mm_storeu_ps(out + 2 * a.ld_out, _mm512_extractf32x4_ps(z, 2));
    _mm_storeu_ps(out + 3 * a.ld_out, _mm512_extractf32x4_ps(z, 3));
    return;
  }
  alignas(64) float lanes[16];
  Vector::Store(lanes, z);
  for (int i = 0; i < kQ && first_query + i < a.queries; ++i) {
    for (int t = 0; t < kT && first_token + t < a.tokens; ++t) out[i * a.ld_out + t] = lanes[i * kT + t];
  }
}

void ScoreAvx512(const ScoreTile& a) {
  if (a.dtype != kBf16 || a.q_bf16 == nullptr) return Score<Vector>(a);
  const size_t row_bytes = size_t{a.head_dim} * 2;
  const RowStream keys{static_cast<const char*>(a.k), a.tokens * row_bytes,
                       static_cast<const char*>(a.next)};
  for (uint32_t t0 = 0; t0 < a.tokens; t0 += 16) {
    uint32_t end = t0 + 16 < a.tokens ? t0 + 16 : a.tokens;
    keys.FetchAhead(t0 * row_bytes, (end - t0) * row_bytes);
    for (uint32_t i = 0; i < a.queries; i += 4) {
      uint32_t left = a.queries - i;
      if (left == 1) {
        ScoreBlockBf16<1>(a, i, t0);
      } else if (left == 2) {
        for (uint32_t t = t0; t < end; t += 8) ScoreBlockBf16<2>(a, i, t);
      } else {
        for (uint32_t t = t0; t < end; t += 4) ScoreBlockBf16<4>(a, i, t);
      }
    }
  }
}

}  // namespace
}  // namespace quarry::kernels

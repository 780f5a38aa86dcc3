// Attention over whole segments in one pass, written once over a vector type as in
// kernels_vector.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu_index/kernels_vector.h"

namespace quarry::kernels {
namespace {

// Tokens between scoring and accumulation: few, so that the fetches of keys and of values and the
// arithmetic all mix within what the processor looks ahead. 64 tokens lost a tenth, 256 a quarter
// of the speed from DRAM.
constexpr uint32_t kAttendTokens = 16;

// What is behind the pointers of AttendRun::scratch.
template <typename V>
struct AttendScratch {
  float* scores;     // [queries][kAttendTokens]
  float* sums;       // [queries][V::kWidth]
  uint16_t* q_bf16;  // [queries][head_dim]

  static size_t Bytes(const AttendRun& a) {
    return a.queries * ((kAttendTokens + V::kWidth) * sizeof(float) + a.head_dim * 2);
  }
  explicit AttendScratch(const AttendRun& a)
      : scores(static_cast<float*>(a.scratch)),
        sums(scores + size_t{a.queries} * kAttendTokens),
        q_bf16(reinterpret_cast<uint16_t*>(sums + size_t{a.queries} * V::kWidth)) {}
};

// Masks the scores of tokens [first, first + kAttendTokens) outside [lo, hi); false if none is in.
inline bool MaskScores(uint32_t first, uint32_t lo, uint32_t hi, float* scores) {
  if (lo <= first && hi >= first + kAttendTokens) return true;
  bool any = false;
  for (uint32_t t = 0; t < kAttendTokens; ++t) {
    const bool in = first + t >= lo && first + t < hi;
    if (!in) scores[t] = -std::numeric_limits<float>::infinity();
    any |= in;
  }
  return any;
}

// Scores of one query and kTokens tokens to weights; what was summed before is scaled to a raised
// maximum.
template <typename V, uint32_t kTokens = kAttendTokens>
void WeighScores(uint32_t head_dim, float* scores, float* max, float* sums, float* acc) {
  const typename V::Reg limit = V::Set(*max);
  bool raised = false;
  for (uint32_t t = 0; t < kTokens; t += V::kWidth) {
    raised |= V::AnyAbove(V::LoadFp32(scores + t), limit);
  }
  if (raised) {
    const float largest = Max<V>(scores, kTokens);
    alignas(64) float factor[V::kWidth];
    V::Store(factor, Exp<V>(V::Set(*max - largest)));  // 0 at first
    for (uint32_t d = 0; d < head_dim; d += V::kWidth) {
      V::Store(acc + d, V::Mul(V::LoadFp32(acc + d), V::Set(factor[0])));
    }
    V::Store(sums, V::Mul(V::LoadFp32(sums), V::Set(factor[0])));
    *max = largest;
  }
  const typename V::Reg shift = V::Set(*max);
  typename V::Reg sum = V::LoadFp32(sums);
  for (uint32_t t = 0; t < kTokens; t += V::kWidth) {
    const typename V::Reg p = Exp<V>(V::Sub(V::LoadFp32(scores + t), shift));
    V::Store(scores + t, p);
    sum = V::Add(sum, p);
  }
  V::Store(sums, sum);
}

// Tokens [first, first + n) of a segment, n <= kAttendTokens.
template <typename V, void (*kScore)(const ScoreTile&)>
void AttendTokens(const AttendRun& a, const AttendScratch<V>& scratch, const AttendSegment& s,
                  const AttendSegment* next, uint32_t first, uint32_t n) {
  const size_t row_bytes = size_t{a.head_dim} * (a.dtype == kFp32 ? 4 : 2);
  const char* k = static_cast<const char*>(s.k) + (first - s.first) * row_bytes;
  const char* v = static_cast<const char*>(s.v) + (first - s.first) * row_bytes;
  const void* next_k = k + n * row_bytes;
  const void* next_v = v + n * row_bytes;
  if (first + n == s.first + s.tokens) {
    next_k = next == nullptr ? nullptr : next->k;
    next_v = next == nullptr ? nullptr : next->v;
  }
  kScore({a.q, a.q_parts == 1 ? scratch.q_bf16 : nullptr, a.queries, a.head_dim, k, n, a.dtype,
          a.scale, scratch.scores, kAttendTokens, next_k});
  for (uint32_t i = 0; i < a.queries; ++i) {
    float* scores = scratch.scores + i * kAttendTokens;
    const uint32_t hi = a.hi[i] < first + n ? a.hi[i] : first + n;
    if (MaskScores(first, a.lo[i], hi, scores)) {
      WeighScores<V>(a.head_dim, scores, a.max + i, scratch.sums + i * V::kWidth,
                     a.acc + size_t{i} * a.head_dim);
    } else {
      for (uint32_t t = 0; t < kAttendTokens; ++t) scores[t] = 0;
    }
  }
  Accumulate<V>({scratch.scores, kAttendTokens, a.queries, a.head_dim, v, nullptr, n, a.dtype,
                 a.acc, next_v});
}

struct TokenBounds {
  uint32_t lo, hi;
};

// Empties max, acc and sums [queries][width]; returns the tokens that some query wants.
inline TokenBounds Begin(const AttendRun& a, int width, float* sums) {
  TokenBounds wanted = {~0u, 0};
  for (uint32_t i = 0; i < a.queries; ++i) {
    a.max[i] = -std::numeric_limits<float>::infinity();
    if (a.lo[i] >= a.hi[i]) continue;
    wanted.lo = a.lo[i] < wanted.lo ? a.lo[i] : wanted.lo;
    wanted.hi = a.hi[i] > wanted.hi ? a.hi[i] : wanted.hi;
  }
  for (size_t i = 0; i < size_t{a.queries} * a.head_dim; ++i) a.acc[i] = 0;
  for (size_t i = 0; i < size_t{a.queries} * width; ++i) sums[i] = 0;
  return wanted;
}

inline void SumUp(const AttendRun& a, int width, const float* sums) {
  for (uint32_t i = 0; i < a.queries; ++i) {
    a.sum[i] = 0;
    for (int lane = 0; lane < width; ++lane) a.sum[i] += sums[i * width + lane];
  }
}

template <typename V, void (*kScore)(const ScoreTile&)>
void Attend(const AttendRun& a) {
  const AttendScratch<V> scratch(a);
  const TokenBounds wanted = Begin(a, V::kWidth, scratch.sums);
  if (a.q_parts == 1) {
    for (size_t i = 0; i < size_t{a.queries} * a.head_dim; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, a.q + i, sizeof(bits));
      scratch.q_bf16[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  for (size_t i = 0; i < a.segment_count; ++i) {
    const AttendSegment& s = a.segments[i];
    const AttendSegment* next = i + 1 < a.segment_count ? &s + 1 : nullptr;
    const uint32_t end = s.first + s.tokens < wanted.hi ? s.first + s.tokens : wanted.hi;
    for (uint32_t t = s.first > wanted.lo ? s.first : wanted.lo; t < end; t += kAttendTokens) {
      const uint32_t n = end - t < kAttendTokens ? end - t : kAttendTokens;
      AttendTokens<V, kScore>(a, scratch, s, next, t, n);
    }
  }
  SumUp(a, V::kWidth, scratch.sums);
}

}  // namespace
}  // namespace quarry::kernels

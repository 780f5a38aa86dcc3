// The kernels written once over a vector type V, included by the AVX2 and the AVX-512 file. V has
// kWidth floats and the operations used below; everything stands in an unnamed namespace, so that
// no code for one instruction set is ever linked into another's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu_index/kernels.h"

namespace quarry::kernels {
namespace {

// How far ahead of the row in use rows are fetched. From DRAM, 1 and 2 KiB were best with few
// tokens between the keys and the values (kAttendTokens); 4 KiB was a tenth slower.
constexpr size_t kAheadBytes = 1024;

// A tile's rows, and where they go on, for fetching ahead. Addresses are numbers: those past the
// end are never read.
class RowStream {
 public:
  RowStream(const void* rows, const void* next, uint32_t tokens, size_t row_bytes)
      : rows_(reinterpret_cast<uintptr_t>(rows)),
        beyond_(next == nullptr ? rows_ : reinterpret_cast<uintptr_t>(next) - tokens * row_bytes),
        row_bytes_(row_bytes),
        tokens_(tokens),
        ahead_(static_cast<uint32_t>((kAheadBytes + row_bytes - 1) / row_bytes)) {}

  // Fetches kBytes (0: the row's) at `offset` of the row that lies ahead of row t. Inlined by
  // force: GCC takes a function that only prefetches for one without effect, and drops the calls.
  template <size_t kBytes>
  [[gnu::always_inline]] void FetchAhead(uint32_t t, size_t offset) const {
    t += ahead_;
    const uintptr_t row = (t < tokens_ ? rows_ : beyond_) + t * row_bytes_ + offset;
    const size_t bytes = kBytes == 0 ? row_bytes_ : kBytes;
#pragma GCC unroll 32
    for (size_t b = 0; b < bytes; b += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(row + b));
    }
  }

 private:
  const uintptr_t rows_, beyond_;
  const size_t row_bytes_;
  const uint32_t tokens_, ahead_;
};

// The head dimensions of most models have loops of their own, of constant length: a fifth to a
// third faster from DRAM, as the processor then looks further ahead. 0: any other.
template <typename F>
inline void WithHeadDim(uint32_t head_dim, F&& f) {
  switch (head_dim) {
    case 64:
      return f.template operator()<64>();
    case 96:
      return f.template operator()<96>();
    case 128:
      return f.template operator()<128>();
    default:
      return f.template operator()<0>();
  }
}

template <uint8_t kDtype>
constexpr size_t ElementBytes() {
  return kDtype == kFp32 ? 4 : 2;
}

template <typename V, uint8_t kDtype>
inline typename V::Reg LoadWide(const char* p) {
  if constexpr (kDtype == kFp32) return V::LoadFp32(p);
  if constexpr (kDtype == kFp16) return V::LoadFp16(p);
  return V::LoadBf16(p);
}

// Lane i * kT + t of the sums of sum[0 .. kWidth) is the product of query i and token t.
template <typename V, int kQ>
inline void StoreScores(const ScoreTile& a, uint32_t first_query, uint32_t first_token,
                        const typename V::Reg* sum) {
  constexpr int kT = V::kWidth / kQ;
  const typename V::Reg z = V::Clamp(V::Mul(V::SumEach(sum), V::Set(a.scale)));
  float* out = a.out + first_query * a.ld_out + first_token;
  if (first_token + kT <= a.tokens && first_query + kQ <= a.queries) {
    V::template StoreRows<kQ>(out, a.ld_out, z);
    return;
  }
  alignas(64) float lanes[V::kWidth];
  V::Store(lanes, z);
  for (int i = 0; i < kQ && first_query + i < a.queries; ++i) {
    for (int t = 0; t < kT && first_token + t < a.tokens; ++t) {
      out[i * a.ld_out + t] = lanes[i * kT + t];
    }
  }
}

// Scores of kQ queries with kWidth / kQ tokens; rows past the end are read from the last token
// and dropped. Row by row, as the keys lie in memory, each with its fetches: from DRAM, bursts of
// fetches are slower.
template <typename V, uint8_t kDtype, int kQ, uint32_t kHeadDim>
void ScoreBlock(const ScoreTile& a, uint32_t first_query, uint32_t first_token) {
  constexpr int kT = V::kWidth / kQ;
  const uint32_t head_dim = kHeadDim == 0 ? a.head_dim : kHeadDim;
  const size_t row_bytes = size_t{head_dim} * ElementBytes<kDtype>();
  const float* q[kQ];
  for (int i = 0; i < kQ; ++i) {
    uint32_t query = first_query + i < a.queries ? first_query + i : a.queries - 1;
    q[i] = a.q + size_t{query} * head_dim;
  }
  const char* keys = static_cast<const char*>(a.k);
  const RowStream stream(a.k, a.next, a.tokens, row_bytes);
  typename V::Reg sum[V::kWidth];
#pragma GCC unroll 16
  for (uint32_t j = 0; j < kT; ++j) {
    const uint32_t t = first_token + j < a.tokens ? first_token + j : a.tokens - 1;
    const char* k = keys + t * row_bytes;
    if (first_query == 0) stream.template FetchAhead<kHeadDim * ElementBytes<kDtype>()>(t, 0);
    typename V::Reg s[kQ];
#pragma GCC unroll 4
    for (int i = 0; i < kQ; ++i) s[i] = V::Zero();
#pragma GCC unroll 16
    for (uint32_t d = 0; d < head_dim; d += V::kWidth) {
      const typename V::Reg kr = LoadWide<V, kDtype>(k + d * ElementBytes<kDtype>());
#pragma GCC unroll 4
      for (int i = 0; i < kQ; ++i) s[i] = V::Fma(V::LoadFp32(q[i] + d), kr, s[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kQ; ++i) sum[i * kT + j] = s[i];
  }
  StoreScores<V, kQ>(a, first_query, first_token, sum);
}

// Scores by blocks of up to 4 queries; tokens outside, so that keys are read from memory once.
// kBlock<kQ>(tile, first_query, first_token) does V::kWidth / kQ tokens.
template <typename V, typename Blocks>
void ScoreByBlocks(const ScoreTile& a) {
  constexpr uint32_t kTile = V::kWidth;
  for (uint32_t t0 = 0; t0 < a.tokens; t0 += kTile) {
    const uint32_t end = t0 + kTile < a.tokens ? t0 + kTile : a.tokens;
    for (uint32_t i = 0; i < a.queries; i += 4) {
      const uint32_t left = a.queries - i;
      if (left == 1) {
        Blocks::template Run<1>(a, i, t0);
      } else if (left == 2) {
        for (uint32_t t = t0; t < end; t += kTile / 2) Blocks::template Run<2>(a, i, t);
      } else {
        for (uint32_t t = t0; t < end; t += kTile / 4) Blocks::template Run<4>(a, i, t);
      }
    }
  }
}

template <typename V, uint8_t kDtype, uint32_t kHeadDim>
struct FmaBlocks {
  template <int kQ>
  static void Run(const ScoreTile& a, uint32_t first_query, uint32_t first_token) {
    ScoreBlock<V, kDtype, kQ, kHeadDim>(a, first_query, first_token);
  }
};

template <typename V, uint8_t kDtype>
void ScoreAs(const ScoreTile& a) {
  WithHeadDim(a.head_dim,
              [&]<uint32_t kHeadDim>() { ScoreByBlocks<V, FmaBlocks<V, kDtype, kHeadDim>>(a); });
}

// kQ queries and kD registers of the head's dimensions, kept in registers over all tokens.
template <typename V, uint8_t kDtype, int kQ, int kD, uint32_t kHeadDim, bool kGathered,
          bool kFetch>
void AccumulateBlock(const AccumulateTile& a, uint32_t first_query, uint32_t first_dim) {
  constexpr size_t kBytes = kD * V::kWidth * ElementBytes<kDtype>();
  const uint32_t head_dim = kHeadDim == 0 ? a.head_dim : kHeadDim;
  const size_t row_bytes = size_t{head_dim} * ElementBytes<kDtype>();
  const char* base = static_cast<const char*>(a.v) + first_dim * ElementBytes<kDtype>();
  const RowStream stream(a.v, a.next, a.tokens, row_bytes);
  const float* p = a.p + first_query * a.ld_p;
  float* acc = a.acc + size_t{first_query} * head_dim + first_dim;
  typename V::Reg sum[kQ][kD];
  for (int i = 0; i < kQ; ++i) {
    for (int d = 0; d < kD; ++d) sum[i][d] = V::LoadFp32(acc + i * head_dim + d * V::kWidth);
  }
  for (uint32_t t = 0; t < a.tokens; ++t) {
    const char* row = base + (kGathered ? a.rows[t] : t) * row_bytes;
    // The first queries' passes over the head's dimensions fetch a share of the row each.
    if constexpr (!kGathered && kFetch) {
      stream.template FetchAhead<kBytes>(t, first_dim * ElementBytes<kDtype>());
    }
    typename V::Reg v[kD];
    for (int d = 0; d < kD; ++d) {
      v[d] = LoadWide<V, kDtype>(row + d * V::kWidth * ElementBytes<kDtype>());
    }
    for (int i = 0; i < kQ; ++i) {
      typename V::Reg w = V::Set(p[i * a.ld_p + t]);
      for (int d = 0; d < kD; ++d) sum[i][d] = V::Fma(w, v[d], sum[i][d]);
    }
  }
  for (int i = 0; i < kQ; ++i) {
    for (int d = 0; d < kD; ++d) V::Store(acc + i * head_dim + d * V::kWidth, sum[i][d]);
  }
}

// kQ * kD accumulators and kD values fit the registers of both instruction sets; a head that is
// not a multiple of kD registers ends in fewer of them.
template <typename V, uint8_t kDtype, int kQ, int kD, uint32_t kHeadDim, bool kGathered,
          bool kFetch>
void AccumulateDims(const AccumulateTile& a, uint32_t first_query, uint32_t first_dim) {
  const uint32_t head_dim = kHeadDim == 0 ? a.head_dim : kHeadDim;
  uint32_t d = first_dim;
  for (; d + kD * V::kWidth <= head_dim; d += kD * V::kWidth) {
    AccumulateBlock<V, kDtype, kQ, kD, kHeadDim, kGathered, kFetch>(a, first_query, d);
  }
  if constexpr (kD > 1) {
    if (d < head_dim) {
      AccumulateDims<V, kDtype, kQ, kD / 2, kHeadDim, kGathered, kFetch>(a, first_query, d);
    }
  }
}

template <typename V, uint8_t kDtype, int kQ, uint32_t kHeadDim, bool kGathered>
void AccumulateQueries(const AccumulateTile& a, uint32_t first_query) {
  constexpr int kWanted = V::kAccumulators / kQ;
  constexpr int kD = kWanted < 8 ? kWanted : 8;
  if (first_query == 0) {
    AccumulateDims<V, kDtype, kQ, kD, kHeadDim, kGathered, true>(a, first_query, 0);
  } else {
    AccumulateDims<V, kDtype, kQ, kD, kHeadDim, kGathered, false>(a, first_query, 0);
  }
}

template <typename V, uint8_t kDtype, uint32_t kHeadDim>
void AccumulateRows(const AccumulateTile& a) {
  uint32_t i = 0;
  if constexpr (V::kAccumulators >= 16) {
    for (; i + 8 <= a.queries; i += 8) AccumulateQueries<V, kDtype, 8, kHeadDim, false>(a, i);
  }
  for (; i + 4 <= a.queries; i += 4) AccumulateQueries<V, kDtype, 4, kHeadDim, false>(a, i);
  for (; i + 2 <= a.queries; i += 2) AccumulateQueries<V, kDtype, 2, kHeadDim, false>(a, i);
  for (; i < a.queries; ++i) AccumulateQueries<V, kDtype, 1, kHeadDim, false>(a, i);
}

template <typename V, uint8_t kDtype>
void AccumulateAs(const AccumulateTile& a) {
  if (a.rows != nullptr) {
    for (uint32_t i = 0; i < a.queries; ++i) AccumulateQueries<V, kDtype, 1, 0, true>(a, i);
    return;
  }
  WithHeadDim(a.head_dim, [&]<uint32_t kHeadDim>() { AccumulateRows<V, kDtype, kHeadDim>(a); });
}

template <typename V>
void Score(const ScoreTile& a) {
  if (a.dtype == kBf16) return ScoreAs<V, kBf16>(a);
  if (a.dtype == kFp16) return ScoreAs<V, kFp16>(a);
  ScoreAs<V, kFp32>(a);
}

template <typename V>
void Accumulate(const AccumulateTile& a) {
  if (a.dtype == kBf16) return AccumulateAs<V, kBf16>(a);
  if (a.dtype == kFp16) return AccumulateAs<V, kFp16>(a);
  AccumulateAs<V, kFp32>(a);
}

template <typename V>
float Max(const float* x, size_t n) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  typename V::Reg m = V::Set(kLowest);
  size_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) m = V::Max(m, V::LoadFp32(x + i));
  alignas(64) float lanes[V::kWidth];
  V::Store(lanes, m);
  float best = kLowest;
  for (float lane : lanes) best = lane > best ? lane : best;
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// e^x for x <= 0 (and a little above): 2^n * e^f with |f| <= ln2 / 2 and a polynomial of degree
// six for e^f, relative error below 2e-7. Below -87.3 the result is 0; -infinity gives 0.
template <typename V>
inline typename V::Reg Exp(typename V::Reg x) {
  typename V::Reg clamped = V::Max(x, V::Set(-88.0f));
  typename V::Reg n = V::Round(V::Mul(clamped, V::Set(1.44269504088896341f)));
  typename V::Reg f = V::Fma(n, V::Set(-0.693359375f), clamped);
  f = V::Fma(n, V::Set(2.12194440e-4f), f);
  typename V::Reg y = V::Set(1.9875691500e-4f);
  y = V::Fma(y, f, V::Set(1.3981999507e-3f));
  y = V::Fma(y, f, V::Set(8.3334519073e-3f));
  y = V::Fma(y, f, V::Set(4.1665795894e-2f));
  y = V::Fma(y, f, V::Set(1.6666665459e-1f));
  y = V::Fma(y, f, V::Set(5.0000001201e-1f));
  y = V::Fma(V::Mul(f, f), y, V::Add(f, V::Set(1.0f)));
  return V::ZeroWhereBelow(V::ScaleByPowerOfTwo(y, n), x, -87.3f);
}

template <typename V>
float ExpSum(float* x, size_t n, float shift) {
  typename V::Reg s = V::Set(shift);
  typename V::Reg total = V::Zero();
  alignas(64) float lanes[V::kWidth];
  size_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) {
    typename V::Reg e = Exp<V>(V::Sub(V::LoadFp32(x + i), s));
    V::Store(x + i, e);
    total = V::Add(total, e);
  }
  if (i < n) {  // the rest, padded with what adds nothing
    for (int j = 0; j < V::kWidth; ++j) {
      lanes[j] = i + j < n ? x[i + j] : -std::numeric_limits<float>::infinity();
    }
    typename V::Reg e = Exp<V>(V::Sub(V::LoadFp32(lanes), s));
    total = V::Add(total, e);
    V::Store(lanes, e);
    for (int j = 0; i + j < n; ++j) x[i + j] = lanes[j];
  }
  V::Store(lanes, total);
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

template <typename V>
void Scale(float* x, size_t n, float factor) {
  typename V::Reg f = V::Set(factor);
  size_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) V::Store(x + i, V::Mul(V::LoadFp32(x + i), f));
  for (; i < n; ++i) x[i] *= factor;
}

// ---- Attention in one pass.

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

// Scores of one query to weights; what was summed before is scaled to a raised maximum.
template <typename V>
void WeighScores(uint32_t head_dim, float* scores, float* max, float* sums, float* acc) {
  const typename V::Reg limit = V::Set(*max);
  bool raised = false;
  for (uint32_t t = 0; t < kAttendTokens; t += V::kWidth) {
    raised |= V::AnyAbove(V::LoadFp32(scores + t), limit);
  }
  if (raised) {
    const float largest = Max<V>(scores, kAttendTokens);
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
  for (uint32_t t = 0; t < kAttendTokens; t += V::kWidth) {
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

template <typename V, void (*kScore)(const ScoreTile&)>
void Attend(const AttendRun& a) {
  const AttendScratch<V> scratch(a);
  uint32_t lo = ~0u, hi = 0;  // tokens that some query wants
  for (uint32_t i = 0; i < a.queries; ++i) {
    a.max[i] = -std::numeric_limits<float>::infinity();
    if (a.lo[i] >= a.hi[i]) continue;
    lo = a.lo[i] < lo ? a.lo[i] : lo;
    hi = a.hi[i] > hi ? a.hi[i] : hi;
  }
  const size_t elements = size_t{a.queries} * a.head_dim;
  for (size_t i = 0; i < elements; ++i) a.acc[i] = 0;
  for (size_t i = 0; i < size_t{a.queries} * V::kWidth; ++i) scratch.sums[i] = 0;
  if (a.q_parts == 1) {
    for (size_t i = 0; i < elements; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, a.q + i, sizeof(bits));
      scratch.q_bf16[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  for (size_t i = 0; i < a.segment_count; ++i) {
    const AttendSegment& s = a.segments[i];
    const AttendSegment* next = i + 1 < a.segment_count ? &s + 1 : nullptr;
    const uint32_t end = s.first + s.tokens < hi ? s.first + s.tokens : hi;
    for (uint32_t t = s.first > lo ? s.first : lo; t < end; t += kAttendTokens) {
      const uint32_t n = end - t < kAttendTokens ? end - t : kAttendTokens;
      AttendTokens<V, kScore>(a, scratch, s, next, t, n);
    }
  }
  for (uint32_t i = 0; i < a.queries; ++i) {
    a.sum[i] = 0;
    for (int lane = 0; lane < V::kWidth; ++lane) a.sum[i] += scratch.sums[i * V::kWidth + lane];
  }
}

}  // namespace
}  // namespace quarry::kernels

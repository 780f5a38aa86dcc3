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

// A tile's rows, and where they go on, for fetching V::kAheadBytes ahead of the row in use.
// Addresses are numbers: those past the end are never read.
template <typename V>
class RowStream {
 public:
  RowStream(const void* rows, const void* next, uint32_t tokens, size_t row_bytes)
      : rows_(reinterpret_cast<uintptr_t>(rows)),
        beyond_(next == nullptr ? rows_ : reinterpret_cast<uintptr_t>(next) - tokens * row_bytes),
        row_bytes_(row_bytes),
        tokens_(tokens),
        ahead_(static_cast<uint32_t>((V::kAheadBytes + row_bytes - 1) / row_bytes)) {}

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
  const RowStream<V> stream(a.k, a.next, a.tokens, row_bytes);
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
  const RowStream<V> stream(a.v, a.next, a.tokens, row_bytes);
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
float SumOfLanes(typename V::Reg x) {
  alignas(64) float lanes[V::kWidth];
  V::Store(lanes, x);
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
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
  return SumOfLanes<V>(total);
}

template <typename V>
void Scale(float* x, size_t n, float factor) {
  typename V::Reg f = V::Set(factor);
  size_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) V::Store(x + i, V::Mul(V::LoadFp32(x + i), f));
  for (; i < n; ++i) x[i] *= factor;
}

}  // namespace
}  // namespace quarry::kernels

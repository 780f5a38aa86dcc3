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

// How far ahead of the row in use rows are fetched into the second-level cache. From DRAM, 131,072
// keys and values of 128 bf16 reach, with one query on one core, 0.93 of the read bandwidth with
// 8 or 16 KiB, 0.89 with 4 or 32, and 0.68 with none (perf/README.md).
constexpr size_t kPrefetchBytes = 8192;

// A tile's rows in memory, and where they go on.
struct RowStream {
  const char* rows;
  size_t bytes;
  const char* next;

  // Fetches what lies kPrefetchBytes after [offset, offset + count). Inlined by force: GCC takes a
  // function that only prefetches for one without effect, and drops the calls.
  [[gnu::always_inline]] void FetchAhead(size_t offset, size_t count) const {
    const size_t at = offset + kPrefetchBytes;
    const char* p = at < bytes ? rows + at : next + (at - bytes);
    if (at >= bytes && (next == nullptr || at - bytes >= kPrefetchBytes)) return;
    for (size_t b = 0; b < count; b += 64) __builtin_prefetch(p + b, 0, 2);
  }
};

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

// Scores of kQ queries with kWidth / kQ tokens; rows past the end are read from the last token
// and dropped.
template <typename V, uint8_t kDtype, int kQ>
void ScoreBlock(const ScoreTile& a, uint32_t first_query, uint32_t first_token) {
  constexpr int kT = V::kWidth / kQ;
  const float* q[kQ];
  for (int i = 0; i < kQ; ++i) {
    uint32_t query = first_query + i < a.queries ? first_query + i : a.queries - 1;
    q[i] = a.q + size_t{query} * a.head_dim;
  }
  const size_t row_bytes = size_t{a.head_dim} * ElementBytes<kDtype>();
  const char* k[kT];
  for (int t = 0; t < kT; ++t) {
    uint32_t token = first_token + t < a.tokens ? first_token + t : a.tokens - 1;
    k[t] = static_cast<const char*>(a.k) + token * row_bytes;
  }
  typename V::Reg sum[V::kWidth];
  for (auto& s : sum) s = V::Zero();
  for (uint32_t d = 0; d < a.head_dim; d += V::kWidth) {
    typename V::Reg kr[kT];
    for (int t = 0; t < kT; ++t) kr[t] = LoadWide<V, kDtype>(k[t] + d * ElementBytes<kDtype>());
    for (int i = 0; i < kQ; ++i) {
      typename V::Reg qr = V::LoadFp32(q[i] + d);
      for (int t = 0; t < kT; ++t) sum[i * kT + t] = V::Fma(qr, kr[t], sum[i * kT + t]);
    }
  }
  alignas(64) float z[V::kWidth];
  V::Store(z, V::Clamp(V::Mul(V::SumEach(sum), V::Set(a.scale))));
  for (int i = 0; i < kQ && first_query + i < a.queries; ++i) {
    for (int t = 0; t < kT && first_token + t < a.tokens; ++t) {
      a.out[(first_query + i) * a.ld_out + first_token + t] = z[i * kT + t];
    }
  }
}

template <typename V, uint8_t kDtype>
void ScoreAs(const ScoreTile& a) {
  // Tokens outside, so that a tile of K is read from memory once.
  constexpr uint32_t kTile = V::kWidth;
  const size_t row_bytes = size_t{a.head_dim} * ElementBytes<kDtype>();
  const RowStream keys{static_cast<const char*>(a.k), a.tokens * row_bytes,
                       static_cast<const char*>(a.next)};
  for (uint32_t t0 = 0; t0 < a.tokens; t0 += kTile) {
    uint32_t end = t0 + kTile < a.tokens ? t0 + kTile : a.tokens;
    keys.FetchAhead(t0 * row_bytes, (end - t0) * row_bytes);
    for (uint32_t i = 0; i < a.queries; i += 4) {
      uint32_t left = a.queries - i;
      if (left == 1) {
        for (uint32_t t = t0; t < end; t += V::kWidth) ScoreBlock<V, kDtype, 1>(a, i, t);
      } else if (left == 2) {
        for (uint32_t t = t0; t < end; t += V::kWidth / 2) ScoreBlock<V, kDtype, 2>(a, i, t);
      } else {
        for (uint32_t t = t0; t < end; t += V::kWidth / 4) ScoreBlock<V, kDtype, 4>(a, i, t);
      }
    }
  }
}

// kQ queries and kD vectors of the head, kept in registers over all tokens.
template <typename V, uint8_t kDtype, int kQ, int kD>
void AccumulateBlock(const AccumulateTile& a, uint32_t first_query, uint32_t first_dim) {
  const size_t row_bytes = size_t{a.head_dim} * ElementBytes<kDtype>();
  const char* base = static_cast<const char*>(a.v) + first_dim * ElementBytes<kDtype>();
  const RowStream values{static_cast<const char*>(a.v), a.tokens * row_bytes,
                         static_cast<const char*>(a.next)};
  const float* p[kQ];
  float* acc[kQ];
  typename V::Reg sum[kQ][kD];
  for (int i = 0; i < kQ; ++i) {
    p[i] = a.p + (first_query + i) * a.ld_p;
    acc[i] = a.acc + size_t{first_query + i} * a.head_dim + first_dim;
    for (int d = 0; d < kD; ++d) sum[i][d] = V::LoadFp32(acc[i] + d * V::kWidth);
  }
  for (uint32_t t = 0; t < a.tokens; ++t) {
    const char* row = base + (a.rows != nullptr ? a.rows[t] : t) * row_bytes;
    // Only the first pass, but whole rows: the others find them in the cache.
    if (first_query == 0 && first_dim == 0 && a.rows == nullptr) {
      values.FetchAhead(t * row_bytes, row_bytes);
    }
    typename V::Reg v[kD];
    for (int d = 0; d < kD; ++d) {
      v[d] = LoadWide<V, kDtype>(row + d * V::kWidth * ElementBytes<kDtype>());
    }
    for (int i = 0; i < kQ; ++i) {
      typename V::Reg w = V::Set(p[i][t]);
      for (int d = 0; d < kD; ++d) sum[i][d] = V::Fma(w, v[d], sum[i][d]);
    }
  }
  for (int i = 0; i < kQ; ++i) {
    for (int d = 0; d < kD; ++d) V::Store(acc[i] + d * V::kWidth, sum[i][d]);
  }
}

// kQ * kD accumulators and kD values fit the registers of both instruction sets; a head that is
// not a multiple of kD registers ends in fewer of them.
template <typename V, uint8_t kDtype, int kQ, int kD>
void AccumulateDims(const AccumulateTile& a, uint32_t first_query, uint32_t first_dim) {
  uint32_t d = first_dim;
  for (; d + kD * V::kWidth <= a.head_dim; d += kD * V::kWidth) {
    AccumulateBlock<V, kDtype, kQ, kD>(a, first_query, d);
  }
  if constexpr (kD > 1) {
    if (d < a.head_dim) AccumulateDims<V, kDtype, kQ, kD / 2>(a, first_query, d);
  }
}

template <typename V, uint8_t kDtype, int kQ>
void AccumulateQueries(const AccumulateTile& a, uint32_t first_query) {
  constexpr int kWanted = V::kAccumulators / kQ;
  AccumulateDims<V, kDtype, kQ, (kWanted < 8 ? kWanted : 8)>(a, first_query, 0);
}

template <typename V, uint8_t kDtype>
void AccumulateAs(const AccumulateTile& a) {
  uint32_t i = 0;
  if constexpr (V::kAccumulators >= 16) {
    for (; i + 8 <= a.queries; i += 8) AccumulateQueries<V, kDtype, 8>(a, i);
  }
  for (; i + 4 <= a.queries; i += 4) AccumulateQueries<V, kDtype, 4>(a, i);
  for (; i + 2 <= a.queries; i += 2) AccumulateQueries<V, kDtype, 2>(a, i);
  for (; i < a.queries; ++i) AccumulateQueries<V, kDtype, 1>(a, i);
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

}  // namespace
}  // namespace quarry::kernels

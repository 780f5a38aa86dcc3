// Attention over coded strips in one pass, written once over a vector type as in kernels_vector.h.
//
// Codes become floats in registers, and what a product needs beside them is put where it costs
// least: a token's scale onto its score and its weight, the steps of an int4 key's channels into
// the query, once a tile. Words of codes have kLaneTokens tokens (keys) or as many channels as a
// vector (values) side by side, so that no sum runs across lanes.
#pragma once

#include "cpu_index/attend_vector.h"

namespace quarry::kernels {
namespace {

static_assert(coded::kLaneTokens == kAttendTokens);

// Words of kWidth lanes, and the numbers of their kEach codes by 1 / kFactor.
template <typename V, uint8_t kCodec>
struct Codes;

template <typename V>
struct Codes<V, coded::kFp8> {
  static constexpr float kFactor = 256;
  struct Words {
    typename V::Reg numbers[2];
  };
  static Words Load(const uint8_t* p) {
    Words words;
    V::LoadE4m3(p, &words.numbers[0], &words.numbers[1]);
    return words;
  }
  template <uint32_t kCode>
  static typename V::Reg Get(const Words& words) {
    return words.numbers[kCode];
  }
};

template <typename V>
struct Codes<V, coded::kInt8> {
  static constexpr float kFactor = 1;
  using Words = typename V::Words;
  static Words Load(const uint8_t* p) { return V::SignBytes(V::LoadWords(p)); }
  template <uint32_t kCode>
  static typename V::Reg Get(const Words& words) {
    return V::template SignedByte<kCode>(words);
  }
};

template <typename V>
struct Codes<V, coded::kInt4> {
  static constexpr float kFactor = 1;
  using Words = typename V::Words;
  static Words Load(const uint8_t* p) { return V::LoadWords(p); }
  template <uint32_t kCode>
  static typename V::Reg Get(const Words& words) {
    return V::template FourBits<kCode % 4 * 8 + kCode / 4 * 4>(words);
  }
};

// f<0>(), f<1>(), .. f<kCount - 1>(): the numbers of codes are parts of instructions.
template <uint32_t kCount, uint32_t kFrom = 0, typename F>
[[gnu::always_inline]] inline void ForEachCode(F&& f) {
  if constexpr (kFrom < kCount) {
    f.template operator()<kFrom>();
    ForEachCode<kCount, kFrom + 1>(f);
  }
}

// What is behind the pointers of AttendRun::scratch. `groups`: of values that share a weight.
template <typename V>
struct CodedScratch {
  float* scores;   // [queries][kAttendTokens]
  float* sums;     // [queries][V::kWidth]
  float* weights;  // [queries][groups][kAttendTokens]
  float* zeros;    // [queries][groups], what the zero points of values add
  float* q;        // int4: [queries][head_dim], times the steps of a tile's channels
  float* offsets;  // int4: [queries], what the zero points of a tile's channels add

  static uint32_t Groups(const AttendRun& a) {
    return a.dtype == coded::kInt4 ? coded::ValueGroups(a.head_dim) : 1;
  }
  static size_t Bytes(const AttendRun& a) {
    const size_t each = kAttendTokens + V::kWidth + Groups(a) * (kAttendTokens + 1) +
                        (a.dtype == coded::kInt4 ? a.head_dim + 1 : 0);
    return a.queries * each * sizeof(float);
  }
  explicit CodedScratch(const AttendRun& a)
      : scores(static_cast<float*>(a.scratch)),
        sums(scores + size_t{a.queries} * kAttendTokens),
        weights(sums + size_t{a.queries} * V::kWidth),
        zeros(weights + size_t{a.queries} * Groups(a) * kAttendTokens),
        q(zeros + size_t{a.queries} * Groups(a)),
        offsets(q + size_t{a.queries} * a.head_dim) {}
};

// A tile of a strip, and the kLaneTokens of it that are attended.
struct CodedBlock {
  const uint8_t* k_scales;
  const uint8_t* v_scales;
  const uint8_t* k;  // the block's codes
  const uint8_t* v;
  const uint8_t* next_k;  // what to fetch meanwhile
  const uint8_t* next_v;
  uint32_t in_tile;      // tokens of the tile before the block
  uint32_t tile_tokens;  // filled up
};

// Products of kQ queries with a block's keys; q are rows of head_dim. kChains sums of each keep
// the processor from waiting for the last one.
template <typename V, uint8_t kCodec, uint32_t kQ, bool kFetch>
void ScoreCodedBlock(const AttendRun& a, const CodedBlock& b, const float* q, float* scores) {
  using C = Codes<V, kCodec>;
  constexpr uint32_t kEach = coded::WordCodes(kCodec), kChains = kQ == 1 && kEach >= 4 ? 4 : 2;
  constexpr size_t kWord = coded::WordBytes(kCodec);
  for (uint32_t lane = 0; lane < kAttendTokens; lane += V::kWidth) {
    typename V::Reg sum[kQ][kChains];
    for (uint32_t i = 0; i < kQ; ++i) {
      for (uint32_t s = 0; s < kChains; ++s) sum[i][s] = V::Zero();
    }
    const uint8_t* at = b.k + lane * kWord;
    size_t offset = 0;
    for (uint32_t c = 0; c < a.head_dim; c += kEach, offset += kAttendTokens * kWord) {
      if constexpr (kFetch) {
        if (lane == 0) __builtin_prefetch(b.next_k + offset);
      }
      const typename C::Words words = C::Load(at + offset);
      ForEachCode<kEach>([&]<uint32_t kCode>() __attribute__((always_inline)) {
        const typename V::Reg k = C::template Get<kCode>(words);
        for (uint32_t i = 0; i < kQ; ++i) {
          sum[i][kCode % kChains] =
              V::Fma(V::Set(q[size_t{i} * a.head_dim + c + kCode]), k, sum[i][kCode % kChains]);
        }
      });
    }
    for (uint32_t i = 0; i < kQ; ++i) {
      typename V::Reg all = V::Add(sum[i][0], sum[i][1]);
      for (uint32_t s = 2; s < kChains; s += 2) all = V::Add(all, V::Add(sum[i][s], sum[i][s + 1]));
      V::Store(scores + size_t{i} * kAttendTokens + lane, all);
    }
  }
}

// Products to scores.
template <typename V, uint8_t kCodec>
void FinishScores(const AttendRun& a, const CodedScratch<V>& scratch, const CodedBlock& b) {
  for (uint32_t i = 0; i < a.queries; ++i) {
    for (uint32_t t = 0; t < kAttendTokens; t += V::kWidth) {
      float* at = scratch.scores + size_t{i} * kAttendTokens + t;
      typename V::Reg z = V::LoadFp32(at);
      if constexpr (kCodec == coded::kInt4) {
        z = V::Add(z, V::Set(scratch.offsets[i]));
      } else {
        z = V::Mul(z, V::LoadBf16(reinterpret_cast<const char*>(b.k_scales) + (b.in_tile + t) * 2));
      }
      V::Store(at, V::Clamp(V::Mul(z, V::Set(a.scale * Codes<V, kCodec>::kFactor))));
    }
  }
}

template <typename V, uint8_t kCodec>
void ScoreCoded(const AttendRun& a, const CodedScratch<V>& scratch, const CodedBlock& b) {
  const float* q = kCodec == coded::kInt4 ? scratch.q : a.q;
  const auto score = [&]<uint32_t kQ, bool kFetch>(uint32_t i) {
    ScoreCodedBlock<V, kCodec, kQ, kFetch>(a, b, q + size_t{i} * a.head_dim,
                                           scratch.scores + size_t{i} * kAttendTokens);
  };
  uint32_t i = 0;
  if (a.queries >= 4) {
    score.template operator()<4, true>(0);
    for (i = 4; i + 4 <= a.queries; i += 4) score.template operator()<4, false>(i);
  } else if (a.queries >= 2) {
    score.template operator()<2, true>(0);
    i = 2;
  } else {
    score.template operator()<1, true>(0);
    i = 1;
  }
  for (; i + 2 <= a.queries; i += 2) score.template operator()<2, false>(i);
  for (; i < a.queries; ++i) score.template operator()<1, false>(i);
  FinishScores<V, kCodec>(a, scratch, b);
}

// Steps of an int4 tile's channels into the queries.
template <typename V>
void FoldSteps(const AttendRun& a, const CodedScratch<V>& scratch, const uint8_t* scales) {
  const char* steps = reinterpret_cast<const char*>(scales);
  const char* zeros = steps + size_t{a.head_dim} * 2;
  for (uint32_t i = 0; i < a.queries; ++i) {
    const float* q = a.q + size_t{i} * a.head_dim;
    typename V::Reg offset = V::Zero();
    for (uint32_t c = 0; c < a.head_dim; c += V::kWidth) {
      const typename V::Reg x = V::LoadFp32(q + c);
      V::Store(scratch.q + size_t{i} * a.head_dim + c, V::Mul(x, V::LoadBf16(steps + c * 2)));
      offset = V::Fma(x, V::LoadBf16(zeros + c * 2), offset);
    }
    scratch.offsets[i] = SumOfLanes<V>(offset);
  }
}

// Weights of tokens to weights of codes.
template <typename V, uint8_t kCodec>
void FoldValueScales(const AttendRun& a, const CodedScratch<V>& scratch, const CodedBlock& b) {
  const uint32_t groups = CodedScratch<V>::Groups(a);
  for (uint32_t i = 0; i < a.queries; ++i) {
    const float* p = scratch.scores + size_t{i} * kAttendTokens;
    for (uint32_t g = 0; g < groups; ++g) {
      const char* scales = reinterpret_cast<const char*>(b.v_scales) +
                           (size_t{g} * 2 * b.tile_tokens + b.in_tile) * 2;
      float* out = scratch.weights + (size_t{i} * groups + g) * kAttendTokens;
      typename V::Reg zero = V::Zero();
      for (uint32_t t = 0; t < kAttendTokens; t += V::kWidth) {
        const typename V::Reg weight = V::LoadFp32(p + t);
        const typename V::Reg scaled = V::Mul(weight, V::LoadBf16(scales + t * 2));
        V::Store(out + t, V::Mul(scaled, V::Set(Codes<V, kCodec>::kFactor)));
        if constexpr (kCodec == coded::kInt4) {
          zero = V::Fma(weight, V::LoadBf16(scales + (b.tile_tokens + t) * 2), zero);
        }
      }
      scratch.zeros[size_t{i} * groups + g] = kCodec == coded::kInt4 ? SumOfLanes<V>(zero) : 0;
    }
  }
}

// acc of kQ queries and kD vectors of channels.
template <typename V, uint8_t kCodec, uint32_t kQ, uint32_t kD, bool kFetch>
void AddCodedBlock(const AttendRun& a, const CodedScratch<V>& scratch, const CodedBlock& b,
                   uint32_t first_query, uint32_t first_dim) {
  using C = Codes<V, kCodec>;
  constexpr uint32_t kEach = coded::WordCodes(kCodec);
  constexpr size_t kWord = coded::WordBytes(kCodec);
  const uint32_t groups = CodedScratch<V>::Groups(a);
  const auto group = [&](uint32_t d) {
    return kCodec == coded::kInt4 ? (first_dim + d * V::kWidth) / coded::kValueChannels : 0;
  };
  const float* weights = scratch.weights + size_t{first_query} * groups * kAttendTokens;
  float* acc = a.acc + size_t{first_query} * a.head_dim + first_dim;
  typename V::Reg sum[kQ][kD];
  for (uint32_t i = 0; i < kQ; ++i) {
    for (uint32_t d = 0; d < kD; ++d) {
      sum[i][d] = V::LoadFp32(acc + size_t{i} * a.head_dim + d * V::kWidth);
      if constexpr (kCodec == coded::kInt4) {
        const float zero = scratch.zeros[(first_query + i) * size_t{groups} + group(d)];
        sum[i][d] = V::Add(sum[i][d], V::Set(zero));
      }
    }
  }
  for (uint32_t t = 0; t < kAttendTokens; t += kEach) {
    const size_t offset = (size_t{t / kEach} * a.head_dim + first_dim) * kWord;
    if constexpr (kFetch) {
#pragma GCC unroll 8
      for (size_t line = 0; line < kD * V::kWidth * kWord; line += 64) {
        __builtin_prefetch(b.next_v + offset + line);
      }
    }
    for (uint32_t d = 0; d < kD; ++d) {
      const typename C::Words words = C::Load(b.v + offset + d * V::kWidth * kWord);
      const float* w = weights + size_t{group(d)} * kAttendTokens + t;
      ForEachCode<kEach>([&]<uint32_t kCode>() __attribute__((always_inline)) {
        const typename V::Reg v = C::template Get<kCode>(words);
        for (uint32_t i = 0; i < kQ; ++i) {
          const float weight = w[size_t{i} * groups * kAttendTokens + kCode];
          sum[i][d] = V::Fma(V::Set(weight), v, sum[i][d]);
        }
      });
    }
  }
  for (uint32_t i = 0; i < kQ; ++i) {
    for (uint32_t d = 0; d < kD; ++d) {
      V::Store(acc + size_t{i} * a.head_dim + d * V::kWidth, sum[i][d]);
    }
  }
}

template <typename V, uint8_t kCodec, uint32_t kQ, uint32_t kD, bool kFetch>
void AddCodedDims(const AttendRun& a, const CodedScratch<V>& scratch, const CodedBlock& b,
                  uint32_t first_query, uint32_t first_dim) {
  uint32_t d = first_dim;
  for (; d + kD * V::kWidth <= a.head_dim; d += kD * V::kWidth) {
    AddCodedBlock<V, kCodec, kQ, kD, kFetch>(a, scratch, b, first_query, d);
  }
  if constexpr (kD > 1) {
    if (d < a.head_dim) {
      AddCodedDims<V, kCodec, kQ, kD / 2, kFetch>(a, scratch, b, first_query, d);
    }
  }
}

template <typename V, uint8_t kCodec>
void AddCoded(const AttendRun& a, const CodedScratch<V>& scratch, const CodedBlock& b) {
  FoldValueScales<V, kCodec>(a, scratch, b);
  const auto add = [&]<uint32_t kQ>(uint32_t i) {
    constexpr uint32_t kWanted = V::kAccumulators / kQ, kD = kWanted < 8 ? kWanted : 8;
    if (i == 0) {
      AddCodedDims<V, kCodec, kQ, kD, true>(a, scratch, b, i, 0);
    } else {
      AddCodedDims<V, kCodec, kQ, kD, false>(a, scratch, b, i, 0);
    }
  };
  uint32_t i = 0;
  for (; i + 4 <= a.queries; i += 4) add.template operator()<4>(i);
  for (; i + 2 <= a.queries; i += 2) add.template operator()<2>(i);
  for (; i < a.queries; ++i) add.template operator()<1>(i);
}

template <typename V, uint8_t kCodec>
void AttendCodedBlock(const AttendRun& a, const CodedScratch<V>& scratch, const AttendSegment& s,
                      const CodedBlock& b, uint32_t first) {
  ScoreCoded<V, kCodec>(a, scratch, b);
  const uint32_t end = s.first + s.tokens;
  for (uint32_t i = 0; i < a.queries; ++i) {
    float* scores = scratch.scores + size_t{i} * kAttendTokens;
    const uint32_t hi = a.hi[i] < end ? a.hi[i] : end;
    if (MaskScores(first, a.lo[i], hi, scores)) {
      WeighScores<V>(a.head_dim, scores, a.max + i, scratch.sums + size_t{i} * V::kWidth,
                     a.acc + size_t{i} * a.head_dim);
    } else {
      for (uint32_t t = 0; t < kAttendTokens; ++t) scores[t] = 0;
    }
  }
  AddCoded<V, kCodec>(a, scratch, b);
}

// The blocks of a segment that tokens [lo, hi) touch.
template <typename V, uint8_t kCodec>
void AttendCodedSegment(const AttendRun& a, const CodedScratch<V>& scratch, const AttendSegment& s,
                        const AttendSegment* next, TokenBounds wanted) {
  constexpr uint32_t kBlock = coded::kLaneTokens;
  const uint32_t block_bytes = coded::CodeBytes(kCodec, a.head_dim, kBlock);
  const uint32_t from = wanted.lo > s.first ? (wanted.lo - s.first) / kBlock * kBlock : 0;
  const uint32_t end = wanted.hi < s.first + s.tokens ? wanted.hi - s.first : s.tokens;
  const auto* next_k = static_cast<const uint8_t*>(next == nullptr ? s.k : next->k);
  const auto* next_v = static_cast<const uint8_t*>(next == nullptr ? s.v : next->v);
  uint32_t folded = ~0u;  // the tile whose steps are in the queries
  for (uint32_t t = from; t < end; t += kBlock) {
    const uint32_t tile = t / coded::kTileTokens, behind = s.tokens - tile * coded::kTileTokens;
    const uint32_t tokens = behind < coded::kTileTokens ? behind : coded::kTileTokens;
    const auto scales = [&](uint8_t part, const void* strip) {
      return static_cast<const uint8_t*>(strip) +
             size_t{tile} * coded::TileBytes(kCodec, part, a.head_dim, coded::kTileTokens);
    };
    CodedBlock b;
    b.in_tile = t % coded::kTileTokens;
    b.tile_tokens = coded::FilledTokens(tokens);
    b.k_scales = scales(coded::kKey, s.k);
    b.v_scales = scales(coded::kValue, s.v);
    const size_t at = size_t{b.in_tile / kBlock} * block_bytes;
    b.k = b.k_scales + coded::ScaleBytes(kCodec, coded::kKey, a.head_dim, tokens) + at;
    b.v = b.v_scales + coded::ScaleBytes(kCodec, coded::kValue, a.head_dim, tokens) + at;
    b.next_k = t + kBlock < end ? b.k + block_bytes : next_k;
    b.next_v = t + kBlock < end ? b.v + block_bytes : next_v;
    if (kCodec == coded::kInt4 && folded != tile) {
      FoldSteps<V>(a, scratch, b.k_scales);
      folded = tile;
    }
    AttendCodedBlock<V, kCodec>(a, scratch, s, b, s.first + t);
  }
}

// Calls f(segment, the next one or null, tokens wanted) for the segments that some query wants;
// max, acc and sums [queries][V::kWidth] are empty before, and sum is theirs behind.
template <typename V, typename F>
inline void AttendCodedSegments(const AttendRun& a, float* sums, F&& f) {
  const TokenBounds wanted = Begin(a, V::kWidth, sums);
  for (size_t n = 0; n < a.segment_count; ++n) {
    const AttendSegment& s = a.segments[n];
    if (s.first >= wanted.hi || s.first + s.tokens <= wanted.lo) continue;
    f(s, n + 1 < a.segment_count ? &s + 1 : nullptr, wanted);
  }
  SumUp(a, V::kWidth, sums);
}

template <typename V, uint8_t kCodec>
void AttendCodedAs(const AttendRun& a) {
  const CodedScratch<V> scratch(a);
  AttendCodedSegments<V>(
      a, scratch.sums, [&](const AttendSegment& s, const AttendSegment* next, TokenBounds wanted) {
        AttendCodedSegment<V, kCodec>(a, scratch, s, next, wanted);
      });
}

template <typename V>
void AttendCoded(const AttendRun& a) {
  if (a.dtype == coded::kFp8) return AttendCodedAs<V, coded::kFp8>(a);
  if (a.dtype == coded::kInt8) return AttendCodedAs<V, coded::kInt8>(a);
  AttendCodedAs<V, coded::kInt4>(a);
}

}  // namespace
}  // namespace quarry::kernels

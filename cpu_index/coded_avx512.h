// Attention over coded strips with AVX-512: fp8 as floats (coded_vector.h), int8 and int4 by
// products of whole numbers (VNNI), 64 a vector, for which codes need no conversion.
//
// The other factor, queries or weights, becomes whole numbers of 16 bits by the largest of them,
// which are two digits of base 256. A score is off by up to 2^-15 of the product of its query's and
// key's length so, mostly by a quarter of it (with int4, whose codes are longer than what they
// mean, twice as much), and an output by as much of its values': a hundredth of what the codecs
// make them err. A third digit took a sixth more time for 8 queries and a fifth more for 16. What
// products need beside them is put where it costs least: a token's scale onto its score and its
// weight, the steps of an int4 key's channels into the query, the excess of int8 into where sums
// begin. A tile of coded::kTileTokens tokens at a time, so that making digits is shared.
#pragma once

#include "cpu_index/coded_vector.h"
#include "cpu_index/vector_avx512.h"

namespace quarry::kernels {
namespace {

constexpr uint32_t kDigits = 2;
// Numbers whose digits lie together, so that loops over them address all by one register a query.
constexpr uint32_t kDigitNumbers = 16;

// Numbers as digits: x = step * (d0 + 256 d1), to within 2^-16 of the largest.
struct Digits {
  int8_t* digits;         // [kDigits][count]
  int32_t bias[kDigits];  // where sums begin: less the codes' excess times the digits
  float step;
  float zero;  // what the zero points of codes add
};

// Largest magnitude of count numbers; count is a multiple of 16, as below.
inline float MostMagnitude(const float* x, uint32_t count) {
  __m512 most = _mm512_setzero_ps();
  for (uint32_t i = 0; i < count; i += 16) {
    most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  }
  return _mm512_reduce_max_ps(most);
}

template <uint8_t kCodec>
void MakeDigits(const float* x, uint32_t count, Digits* out) {
  constexpr float kSteps = 127 * 256;
  const float most = MostMagnitude(x, count);
  // Numbers so small have no step that is one; nothing that is attended is.
  out->step = most > 0x1p-100f ? most / kSteps : 0;
  const __m512 inverse = _mm512_set1_ps(out->step > 0 ? kSteps / most : 0);
  const __m512i excess = _mm512_set1_epi32(0x8080);
  // The even bytes, then the odd ones.
  const __m256i order = _mm256_set_epi8(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,
                                        30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  __m256i sums = _mm256_setzero_si256();
  for (uint32_t i = 0; i < count; i += kDigitNumbers) {
    const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
    // Digits from -128 to 127: bytes of the number plus 128 in each, less 128.
    const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(n, excess), excess);
    const __m256i digits = _mm256_permutexvar_epi8(order, _mm512_cvtepi32_epi16(bytes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out->digits + i * kDigits), digits);
    if constexpr (kCodec == coded::kInt8) {
      sums = _mm256_dpbusd_epi32(sums, _mm256_set1_epi8(1), digits);
    }
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
  for (uint32_t d = 0; d < kDigits; ++d) {
    const int32_t* of = lanes + d * 4;
    out->bias[d] = -coded::kInt8Excess * (of[0] + of[1] + of[2] + of[3]);  // 0 but for int8
  }
}

// What is behind the pointers of AttendRun::scratch.
struct TileScratch {
  float* scores;    // [queries][kTileTokens]
  float* sums;      // [queries][16]
  Digits* q;        // [queries]
  Digits* weights;  // [queries][groups]
  int8_t* digits;

  static size_t DigitBytes(const AttendRun& a) {
    const size_t groups = CodedScratch<Vector>::Groups(a);
    return a.queries * kDigits * (a.head_dim + groups * coded::kTileTokens);
  }
  static size_t Bytes(const AttendRun& a) {
    const size_t groups = CodedScratch<Vector>::Groups(a);
    return a.queries * ((coded::kTileTokens + 16) * sizeof(float) + (1 + groups) * sizeof(Digits)) +
           DigitBytes(a);
  }
  explicit TileScratch(const AttendRun& a) : scores(static_cast<float*>(a.scratch)) {
    const uint32_t groups = CodedScratch<Vector>::Groups(a);
    sums = scores + size_t{a.queries} * coded::kTileTokens;
    q = reinterpret_cast<Digits*>(sums + size_t{a.queries} * 16);
    weights = q + a.queries;
    digits = reinterpret_cast<int8_t*>(weights + size_t{a.queries} * groups);
    int8_t* at = digits;
    for (uint32_t i = 0; i < a.queries; ++i, at += kDigits * a.head_dim) q[i].digits = at;
    for (uint32_t i = 0; i < a.queries * groups; ++i, at += kDigits * coded::kTileTokens) {
      weights[i].digits = at;
    }
  }
};

// A tile of a strip of K or V.
struct CodedTile {
  const uint8_t* scales;
  const uint8_t* codes;
  const uint8_t* next;  // what to fetch meanwhile, as many bytes as the codes have
  uint32_t tokens;      // filled up
};

// Words of four codes of 8 bits out of a vector of words: itself, or its low and its high bits.
template <uint8_t kCodec>
constexpr uint32_t kHalves = kCodec == coded::kInt4 ? 2 : 1;

template <uint8_t kCodec, uint32_t kHalf>
inline __m512i BytesOf(__m512i words) {
  if constexpr (kCodec == coded::kInt8) return words;
  const __m512i low = _mm512_set1_epi8(15);
  return _mm512_and_si512(kHalf == 0 ? words : _mm512_srli_epi32(words, 4), low);
}

// Fetches kBytes in lines that lie `step` bytes apart.
template <uint32_t kBytes>
[[gnu::always_inline]] inline void Fetch(const uint8_t* at, size_t step) {
#pragma GCC unroll 4
  for (uint32_t line = 0; line < kBytes / 64; ++line) __builtin_prefetch(at + line * step);
}

inline __m512i FourDigits(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}

// sum[d] += the products of four codes in every lane with the digits of the w-th four numbers.
[[gnu::always_inline]] inline void AddProducts(__m512i codes, const int8_t* digits, uint32_t w,
                                               __m512i* sum) {
#pragma GCC unroll 2
  for (uint32_t d = 0; d < kDigits; ++d) {
    sum[d] = _mm512_dpbusd_epi32(sum[d], codes, FourDigits(digits + d * kDigitNumbers + w * 4));
  }
}

// The products of kDigitNumbers codes in every lane, whose vectors of words lie `step` bytes apart.
template <uint8_t kCodec, uint32_t kQ>
[[gnu::always_inline]] inline void AddWords(const uint8_t* words, size_t step,
                                            const int8_t* const* digits, size_t digits_at,
                                            __m512i (*sum)[kDigits]) {
  constexpr uint32_t kVectors = kDigitNumbers / coded::WordCodes(kCodec);
#pragma GCC unroll 4
  for (uint32_t w = 0; w < kVectors; ++w) {
    const __m512i x = _mm512_loadu_si512(words + w * step);
#pragma GCC unroll 4
    for (uint32_t i = 0; i < kQ; ++i) {
      const int8_t* of = digits[i] + digits_at;
      AddProducts(BytesOf<kCodec, 0>(x), of, w * kHalves<kCodec>, sum[i]);
      if constexpr (kHalves<kCodec> == 2) AddProducts(BytesOf<kCodec, 1>(x), of, w * 2 + 1, sum[i]);
    }
  }
}

[[gnu::always_inline]] inline void BeginSums(const Digits& of, __m512i* sum) {
#pragma GCC unroll 2
  for (uint32_t d = 0; d < kDigits; ++d) sum[d] = _mm512_set1_epi32(of.bias[d]);
}

[[gnu::always_inline]] inline __m512 EndSums(const Digits& of, const __m512i* sum) {
  const __m512 base = _mm512_set1_ps(256);
  const __m512 all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[1]), base, _mm512_cvtepi32_ps(sum[0]));
  return _mm512_mul_ps(all, _mm512_set1_ps(of.step));
}

// Scores of kQ queries and kBlocks blocks of kLaneTokens tokens.
template <uint8_t kCodec, uint32_t kQ, uint32_t kBlocks>
void ScoreTileBlocks(const AttendRun& a, const TileScratch& scratch, const CodedTile& tile,
                     uint32_t first_query, uint32_t first_block) {
  constexpr uint32_t kBytes = kDigitNumbers / coded::WordCodes(kCodec) * 64;
  const size_t block_bytes = coded::CodeBytes(kCodec, a.head_dim, coded::kLaneTokens);
  const Digits* q = scratch.q + first_query;
  const int8_t* digits[kQ];
#pragma GCC unroll 4
  for (uint32_t i = 0; i < kQ; ++i) digits[i] = q[i].digits;
  __m512i sum[kBlocks][kQ][kDigits];
#pragma GCC unroll 4
  for (uint32_t b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 4
    for (uint32_t i = 0; i < kQ; ++i) BeginSums(q[i], sum[b][i]);
  }
  const uint8_t* words = tile.codes + first_block * block_bytes;
  const uint8_t* next = tile.next + first_block * block_bytes;
  for (uint32_t c = 0; c < a.head_dim; c += kDigitNumbers) {
#pragma GCC unroll 4
    for (uint32_t b = 0; b < kBlocks; ++b) {
      if (first_query == 0) Fetch<kBytes>(next + b * block_bytes, 64);
      AddWords<kCodec, kQ>(words + b * block_bytes, 64, digits, size_t{c} * kDigits, sum[b]);
    }
    words += kBytes;
    next += kBytes;
  }
#pragma GCC unroll 4
  for (uint32_t b = 0; b < kBlocks; ++b) {
    const uint32_t t = (first_block + b) * coded::kLaneTokens;
#pragma GCC unroll 4
    for (uint32_t i = 0; i < kQ; ++i) {
      __m512 z = EndSums(q[i], sum[b][i]);
      if constexpr (kCodec == coded::kInt4) {
        z = _mm512_add_ps(z, _mm512_set1_ps(q[i].zero));
      } else {
        z = _mm512_mul_ps(z, Vector::LoadBf16(tile.scales + t * 2));
      }
      z = Vector::Clamp(_mm512_mul_ps(z, _mm512_set1_ps(a.scale)));
      _mm512_storeu_ps(scratch.scores + size_t{first_query + i} * coded::kTileTokens + t, z);
    }
  }
}

// kQ * kBlocks * kDigits sums fit the registers.
template <uint8_t kCodec, uint32_t kQ>
void ScoreTileQueries(const AttendRun& a, const TileScratch& scratch, const CodedTile& tile,
                      uint32_t first_query) {
  constexpr uint32_t kBlocks = 4 / kQ;
  const uint32_t blocks = tile.tokens / coded::kLaneTokens;
  uint32_t b = 0;
  for (; b + kBlocks <= blocks; b += kBlocks) {
    ScoreTileBlocks<kCodec, kQ, kBlocks>(a, scratch, tile, first_query, b);
  }
  for (; b < blocks; ++b) ScoreTileBlocks<kCodec, kQ, 1>(a, scratch, tile, first_query, b);
}

// kQ queries and kD vectors of channels, which have weights in common.
template <uint8_t kCodec, uint32_t kQ, uint32_t kD>
void AddTileBlock(const AttendRun& a, const TileScratch& scratch, const CodedTile& tile,
                  uint32_t first_query, uint32_t first_dim) {
  constexpr uint32_t kVectors = kDigitNumbers / coded::WordCodes(kCodec);
  const size_t step = size_t{a.head_dim} * 4;
  const uint32_t groups = CodedScratch<Vector>::Groups(a);
  const Digits* weights = scratch.weights + size_t{first_query} * groups;
  if constexpr (kCodec == coded::kInt4) weights += first_dim / coded::kValueChannels;
  const int8_t* digits[kQ];
#pragma GCC unroll 4
  for (uint32_t i = 0; i < kQ; ++i) digits[i] = weights[size_t{i} * groups].digits;
  __m512i sum[kD][kQ][kDigits];
#pragma GCC unroll 4
  for (uint32_t d = 0; d < kD; ++d) {
#pragma GCC unroll 4
    for (uint32_t i = 0; i < kQ; ++i) BeginSums(weights[size_t{i} * groups], sum[d][i]);
  }
  const uint8_t* words = tile.codes + first_dim * 4;
  const uint8_t* next = tile.next + first_dim * 4;
  for (uint32_t t = 0; t < tile.tokens; t += kDigitNumbers) {
#pragma GCC unroll 4
    for (uint32_t d = 0; d < kD; ++d) {
      if (first_query == 0) Fetch<kVectors * 64>(next + d * 64, step);
      AddWords<kCodec, kQ>(words + d * 64, step, digits, size_t{t} * kDigits, sum[d]);
    }
    words += kVectors * step;
    next += kVectors * step;
  }
#pragma GCC unroll 4
  for (uint32_t i = 0; i < kQ; ++i) {
    const Digits& of = weights[size_t{i} * groups];
#pragma GCC unroll 4
    for (uint32_t d = 0; d < kD; ++d) {
      float* acc = a.acc + size_t{first_query + i} * a.head_dim + first_dim + d * 16;
      __m512 x = _mm512_add_ps(_mm512_loadu_ps(acc), EndSums(of, sum[d][i]));
      if constexpr (kCodec == coded::kInt4) x = _mm512_add_ps(x, _mm512_set1_ps(of.zero));
      _mm512_storeu_ps(acc, x);
    }
  }
}

template <uint8_t kCodec, uint32_t kQ>
void AddTileQueries(const AttendRun& a, const TileScratch& scratch, const CodedTile& tile,
                    uint32_t first_query) {
  // Two vectors of channels are a group of int4; more would not share their weights.
  constexpr uint32_t kRoom = 4 / kQ, kD = kCodec == coded::kInt4 && kRoom > 2 ? 2 : kRoom;
  uint32_t c = 0;
  for (; c + kD * 16 <= a.head_dim; c += kD * 16) {
    AddTileBlock<kCodec, kQ, kD>(a, scratch, tile, first_query, c);
  }
  for (; c < a.head_dim; c += 16) {
    AddTileBlock<kCodec, kQ, 1>(a, scratch, tile, first_query, c);
  }
}

// f<kQ>(first query) for all queries, four at a time.
template <typename F>
inline void ForEachQueries(uint32_t queries, F&& f) {
  uint32_t i = 0;
  for (; i + 4 <= queries; i += 4) f.template operator()<4>(i);
  for (; i + 2 <= queries; i += 2) f.template operator()<2>(i);
  for (; i < queries; ++i) f.template operator()<1>(i);
}

// Digits of the queries: of themselves, or times the steps of a tile's channels.
template <uint8_t kCodec>
void MakeQueries(const AttendRun& a, const TileScratch& scratch, const uint8_t* scales) {
  alignas(64) float folded[kMaxHeadDim];
  for (uint32_t i = 0; i < a.queries; ++i) {
    const float* q = a.q + size_t{i} * a.head_dim;
    if constexpr (kCodec == coded::kInt4) {
      __m512 zero = _mm512_setzero_ps();
      for (uint32_t c = 0; c < a.head_dim; c += 16) {
        const __m512 x = _mm512_loadu_ps(q + c);
        _mm512_store_ps(folded + c, _mm512_mul_ps(x, Vector::LoadBf16(scales + c * 2)));
        zero = _mm512_fmadd_ps(x, Vector::LoadBf16(scales + (a.head_dim + c) * 2), zero);
      }
      scratch.q[i].zero = _mm512_reduce_add_ps(zero);
      q = folded;
    }
    MakeDigits<kCodec>(q, a.head_dim, scratch.q + i);
  }
}

// Digits of weights of codes, from those of tokens.
template <uint8_t kCodec>
void MakeWeights(const AttendRun& a, const TileScratch& scratch, const CodedTile& tile) {
  const uint32_t groups = CodedScratch<Vector>::Groups(a);
  alignas(64) float scaled[coded::kTileTokens] = {};
  for (uint32_t i = 0; i < a.queries; ++i) {
    const float* p = scratch.scores + size_t{i} * coded::kTileTokens;
    for (uint32_t g = 0; g < groups; ++g) {
      const uint8_t* steps = tile.scales + size_t{g} * 4 * tile.tokens;
      Digits* out = scratch.weights + size_t{i} * groups + g;
      __m512 zero = _mm512_setzero_ps();
      for (uint32_t t = 0; t < tile.tokens; t += 16) {
        const __m512 weight = _mm512_loadu_ps(p + t);
        _mm512_store_ps(scaled + t, _mm512_mul_ps(weight, Vector::LoadBf16(steps + t * 2)));
        if constexpr (kCodec == coded::kInt4) {
          zero = _mm512_fmadd_ps(weight, Vector::LoadBf16(steps + (tile.tokens + t) * 2), zero);
        }
      }
      if constexpr (kCodec == coded::kInt4) out->zero = _mm512_reduce_add_ps(zero);
      MakeDigits<kCodec>(scaled, coded::kTileTokens, out);
    }
  }
}

// Scores of a tile's tokens to weights.
void WeighTile(const AttendRun& a, const TileScratch& scratch, uint32_t first, uint32_t tokens,
               uint32_t end) {
  constexpr uint32_t kTokens = coded::kTileTokens;
  for (uint32_t i = 0; i < a.queries; ++i) {
    float* scores = scratch.scores + size_t{i} * kTokens;
    const uint32_t hi = a.hi[i] < end ? a.hi[i] : end;
    bool any = false;
    for (uint32_t t = 0; t < tokens; t += kAttendTokens) {
      any |= MaskScores(first + t, a.lo[i], hi, scores + t);
    }
    for (uint32_t t = tokens; t < kTokens; ++t) scores[t] = -std::numeric_limits<float>::infinity();
    if (any) {
      WeighScores<Vector, kTokens>(a.head_dim, scores, a.max + i, scratch.sums + size_t{i} * 16,
                                   a.acc + size_t{i} * a.head_dim);
    } else {
      for (uint32_t t = 0; t < kTokens; ++t) scores[t] = 0;
    }
  }
}

// The tiles of a segment that tokens [lo, hi) touch.
template <uint8_t kCodec>
void AttendTiles(const AttendRun& a, const TileScratch& scratch, const AttendSegment& s,
                 const AttendSegment* next, TokenBounds wanted) {
  constexpr uint32_t kTokens = coded::kTileTokens;
  const uint32_t from = wanted.lo > s.first ? (wanted.lo - s.first) / kTokens * kTokens : 0;
  const uint32_t end = wanted.hi < s.first + s.tokens ? wanted.hi - s.first : s.tokens;
  const auto tile_at = [&](uint8_t part, const void* strip, const void* next_strip, uint32_t t) {
    const uint32_t whole = coded::TileBytes(kCodec, part, a.head_dim, kTokens);
    CodedTile tile;
    tile.tokens = coded::FilledTokens(s.tokens - t < kTokens ? s.tokens - t : kTokens);
    tile.scales = static_cast<const uint8_t*>(strip) + size_t{t / kTokens} * whole;
    tile.codes = tile.scales + coded::ScaleBytes(kCodec, part, a.head_dim, tile.tokens);
    tile.next = t + kTokens < end ? tile.scales + whole : static_cast<const uint8_t*>(next_strip);
    return tile;
  };
  for (uint32_t t = from; t < end; t += kTokens) {
    const CodedTile k = tile_at(coded::kKey, s.k, next == nullptr ? s.k : next->k, t);
    const CodedTile v = tile_at(coded::kValue, s.v, next == nullptr ? s.v : next->v, t);
    if constexpr (kCodec == coded::kInt4) MakeQueries<kCodec>(a, scratch, k.scales);
    ForEachQueries(a.queries, [&]<uint32_t kQ>(uint32_t i) {
      ScoreTileQueries<kCodec, kQ>(a, scratch, k, i);
    });
    WeighTile(a, scratch, s.first + t, k.tokens, s.first + s.tokens);
    MakeWeights<kCodec>(a, scratch, v);
    ForEachQueries(a.queries,
                   [&]<uint32_t kQ>(uint32_t i) { AddTileQueries<kCodec, kQ>(a, scratch, v, i); });
  }
}

template <uint8_t kCodec>
void AttendWholeNumbers(const AttendRun& a) {
  const TileScratch scratch(a);
  if constexpr (kCodec == coded::kInt8) MakeQueries<kCodec>(a, scratch, nullptr);
  AttendCodedSegments<Vector>(
      a, scratch.sums, [&](const AttendSegment& s, const AttendSegment* next, TokenBounds wanted) {
        AttendTiles<kCodec>(a, scratch, s, next, wanted);
      });
}

size_t CodedScratchBytesAvx512(const AttendRun& a) {
  return a.dtype == coded::kFp8 ? CodedScratch<Vector>::Bytes(a) : TileScratch::Bytes(a);
}

void AttendCodedAvx512(const AttendRun& a) {
  if (a.dtype == coded::kFp8) return AttendCodedAs<Vector, coded::kFp8>(a);
  if (a.dtype == coded::kInt8) return AttendWholeNumbers<coded::kInt8>(a);
  AttendWholeNumbers<coded::kInt4>(a);
}

}  // namespace
}  // namespace quarry::kernels

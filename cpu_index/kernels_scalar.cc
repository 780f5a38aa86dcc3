// The portable kernels, and what the others are tested against.
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu_index/coded_scalar.h"
#include "cpu_index/codes_scalar.h"
#include "cpu_index/kernels.h"
#include "cpu_index/rows_scalar.h"

namespace quarry::kernels {
namespace {

float HalfToFloat(uint16_t h, uint8_t dtype) {
  uint32_t bits;
  if (dtype == kBf16) {
    bits = uint32_t{h} << 16;
  } else {
    uint32_t sign = uint32_t{h & 0x8000u} << 16;
    uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ffu;
    if (exponent == 0) {
      float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
      return sign != 0 ? -magnitude : magnitude;
    }
    bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (mantissa << 13);
  }
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

// One row widened into out [n].
void Widen(const void* data, size_t first, size_t n, uint8_t dtype, float* out) {
  if (dtype == kFp32) {
    std::memcpy(out, static_cast<const char*>(data) + first * 4, n * 4);
    return;
  }
  const char* p = static_cast<const char*>(data) + first * 2;
  for (size_t i = 0; i < n; ++i) {
    uint16_t h;
    std::memcpy(&h, p + i * 2, 2);
    out[i] = HalfToFloat(h, dtype);
  }
}

void Score(const ScoreTile& a) {
  constexpr float kMax = std::numeric_limits<float>::max();
  float row[kMaxHeadDim];
  for (uint32_t t = 0; t < a.tokens; ++t) {
    Widen(a.k, size_t{t} * a.head_dim, a.head_dim, a.dtype, row);
    for (uint32_t i = 0; i < a.queries; ++i) {
      const float* q = a.q + size_t{i} * a.head_dim;
      float sum[4] = {};  // independent chains, so that the sum rounds less and pipelines
      for (uint32_t d = 0; d < a.head_dim; d += 4) {
        for (int j = 0; j < 4; ++j) sum[j] += q[d + j] * row[d + j];
      }
      float z = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * a.scale;
      a.out[i * a.ld_out + t] = z < kMax ? (z > -kMax ? z : -kMax) : kMax;
    }
  }
}

void Accumulate(const AccumulateTile& a) {
  constexpr uint32_t kPiece = 512;
  float row[kPiece];
  for (uint32_t t = 0; t < a.tokens; ++t) {
    const size_t r = a.rows != nullptr ? a.rows[t] : t;
    for (uint32_t from = 0; from < a.head_dim; from += kPiece) {
      const uint32_t n = a.head_dim - from < kPiece ? a.head_dim - from : kPiece;
      Widen(a.v, r * a.head_dim + from, n, a.dtype, row);
      for (uint32_t i = 0; i < a.queries; ++i) {
        const float w = a.p[i * a.ld_p + t];
        float* acc = a.acc + size_t{i} * a.head_dim + from;
        for (uint32_t d = 0; d < n; ++d) acc[d] += w * row[d];
      }
    }
  }
}

float Max(const float* x, size_t n) {
  float m = -std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

float ExpSum(float* x, size_t n, float shift) {
  float sum = 0;
  for (size_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - shift);
  return sum;
}

void Scale(float* x, size_t n, float factor) {
  for (size_t i = 0; i < n; ++i) x[i] *= factor;
}

size_t AttendScratchBytes(const AttendRun& a) { return a.queries * sizeof(float); }

// Scores to weights of one token, in place; what was summed before is scaled to a raised maximum.
void WeighToken(const AttendRun& a, uint32_t token, float* scores) {
  for (uint32_t i = 0; i < a.queries; ++i) {
    if (token < a.lo[i] || token >= a.hi[i]) {
      scores[i] = 0;
      continue;
    }
    if (scores[i] > a.max[i]) {
      const float factor = std::exp(a.max[i] - scores[i]);  // 0 at first
      a.sum[i] *= factor;
      Scale(a.acc + size_t{i} * a.head_dim, a.head_dim, factor);
      a.max[i] = scores[i];
    }
    scores[i] = std::exp(scores[i] - a.max[i]);
    a.sum[i] += scores[i];
  }
}

// Empties max, sum and acc, then calls f(segment, token within it) for every token that some query
// wants.
template <typename F>
void ForEachWanted(const AttendRun& a, F&& f) {
  for (uint32_t i = 0; i < a.queries; ++i) {
    a.max[i] = -std::numeric_limits<float>::infinity();
    a.sum[i] = 0;
  }
  for (size_t i = 0; i < size_t{a.queries} * a.head_dim; ++i) a.acc[i] = 0;
  for (size_t n = 0; n < a.segment_count; ++n) {
    const AttendSegment& s = a.segments[n];
    for (uint32_t t = 0; t < s.tokens; ++t) {
      bool wanted = false;
      for (uint32_t i = 0; i < a.queries; ++i) {
        wanted |= s.first + t >= a.lo[i] && s.first + t < a.hi[i];
      }
      if (wanted) f(s, t);
    }
  }
}

// One token's key and value, of dtype.
void AttendToken(const AttendRun& a, uint8_t dtype, uint32_t token, const void* k, const void* v) {
  float* scores = static_cast<float*>(a.scratch);
  Score({a.q, nullptr, a.queries, a.head_dim, k, 1, dtype, a.scale, scores, 1, nullptr});
  WeighToken(a, token, scores);
  Accumulate({scores, 1, a.queries, a.head_dim, v, nullptr, 1, dtype, a.acc, nullptr});
}

void Attend(const AttendRun& a) {
  const size_t row_bytes = size_t{a.head_dim} * (a.dtype == kFp32 ? 4 : 2);
  ForEachWanted(a, [&](const AttendSegment& s, uint32_t t) {
    AttendToken(a, a.dtype, s.first + t, static_cast<const char*>(s.k) + t * row_bytes,
                static_cast<const char*>(s.v) + t * row_bytes);
  });
}

void AttendCoded(const AttendRun& a) {
  float k[kMaxHeadDim], v[kMaxHeadDim];
  ForEachWanted(a, [&](const AttendSegment& s, uint32_t t) {
    CodedRows(a.dtype, coded::kKey, a.head_dim, s.tokens, s.k).Read(t, k);
    CodedRows(a.dtype, coded::kValue, a.head_dim, s.tokens, s.v).Read(t, v);
    AttendToken(a, kFp32, s.first + t, k, v);
  });
}

}  // namespace

const Table& ScalarTable() {
  static constexpr Table kTable = {
      .name = "scalar",
      .attend_scratch_bytes = AttendScratchBytes,
      .attend = Attend,
      .attend_coded_scratch_bytes = AttendScratchBytes,
      .attend_coded = AttendCoded,
      .score = Score,
      .accumulate = Accumulate,
      .max = Max,
      .exp_sum = ExpSum,
      .scale = Scale,
      .sum_codes = SumCodesScalar,
      .score_nodes = ScoreNodesScalar,
      .score_codes = ScoreCodesScalar,
      .find_codes = FindCodesScalar,
      .select = SelectScalar,
      .exp_groups = ExpGroupsScalar,
      .histogram = HistogramScalar,
      .score_key_rows = ScoreKeyRowsScalar,
      .add_value_rows = AddValueRowsScalar,
      .measure_rows = MeasureRowsScalar,
      .quantise = QuantiseScalar,
  };
  return kTable;
}

}  // namespace quarry::kernels

// Attention over coded strips at every level this processor has, against sums in double over the
// numbers that the format says they mean.
#include "cpu_index/coded_attend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cpu_index/simd.h"
#include "proto/half.h"
#include "proto/head_dim.h"
#include "storage/codecs/kv_codecs.h"
#include "tests/support/coded_reference.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr KvCodec kCodecs[] = {KvCodec::kFp8, KvCodec::kInt8, KvCodec::kInt4};

struct Case {
  KvCodec codec;
  DType q_dtype;
  uint32_t head_dim;
  uint32_t queries;
  uint32_t tokens;
  uint32_t segment_tokens;  // at most
  uint32_t first_token = 0;
  bool whole = false;  // else queries have ranges of their own
};

std::string NameOf(const Case& c) {
  return std::string(KvCodecName(c.codec)) + ", head_dim " + std::to_string(c.head_dim) + ", " +
         std::to_string(c.queries) + " queries of " + std::string(DTypeName(c.q_dtype)) + ", " +
         std::to_string(c.tokens) + " tokens from " + std::to_string(c.first_token);
}

// Segments of one head, each misaligned in memory of its own.
struct Segments {
  std::vector<std::vector<std::byte>> memory;
  std::vector<CodedSegment> list;
  std::vector<double> k, v;  // [tokens][head_dim], what the codes mean
  uint32_t first, head_dim;

  Segments(const Case& c, std::mt19937* random, float size = 1)
      : first(c.first_token), head_dim(c.head_dim) {
    std::normal_distribution<float> normal;
    std::vector<float> mean(c.head_dim);
    for (float& m : mean) m = (*random)() % 8 == 0 ? 3 * normal(*random) : 0;
    memory.reserve(2 * c.tokens);
    for (uint32_t lo = 0; lo < c.tokens;) {
      const uint32_t n = std::min<uint32_t>(c.tokens - lo, 1 + (*random)() % c.segment_tokens);
      std::span<const std::byte> strips[2];
      for (KvPart part : {KvPart::kKey, KvPart::kValue}) {
        std::vector<float> rows(size_t{n} * c.head_dim);
        for (size_t i = 0; i < rows.size(); ++i) {
          rows[i] = size * (mean[i % c.head_dim] + normal(*random));
        }
        const CodedStrip strip{c.codec, part, c.head_dim, n};
        const size_t misalign = (*random)() % 3;
        memory.emplace_back(strip.bytes() + misalign);
        const std::span<std::byte> coded = std::span(memory.back()).subspan(misalign);
        EncodeStrip(strip, DType::kFp32, rows.data(), coded);
        const CodedReference reference(strip, coded);
        std::vector<double>& wide = part == KvPart::kKey ? k : v;
        for (uint32_t t = 0; t < n; ++t) {
          for (uint32_t d = 0; d < c.head_dim; ++d) wide.push_back(reference.Number(t, d));
        }
        strips[static_cast<int>(part)] = coded;
      }
      list.push_back({strips[0], strips[1], {first + lo, first + lo + n}});
      lo += n;
    }
  }
  uint32_t tokens() const { return static_cast<uint32_t>(k.size() / head_dim); }
  std::vector<kernels::AttendSegment> ForKernels() const {
    std::vector<kernels::AttendSegment> out;
    for (const CodedSegment& s : list) {
      out.push_back({s.k.data(), s.v.data(), s.tokens.lo, s.tokens.size()});
    }
    return out;
  }
};

struct Queries {
  std::vector<float> q;  // [queries][head_dim]
  std::vector<uint32_t> lo, hi;

  Queries(const Case& c, std::mt19937* random) : q(size_t{c.queries} * c.head_dim) {
    std::normal_distribution<float> normal(0, 1.5f);
    for (float& x : q) {
      StoreFromFloat(&x, 0, c.q_dtype, normal(*random));
      x = LoadAsFloat(&x, 0, c.q_dtype);
    }
    for (uint32_t i = 0; i < c.queries; ++i) {  // whole, empty, outside, or a part
      const uint32_t end = c.first_token + c.tokens;
      const uint32_t a = c.first_token + (*random)() % (c.tokens + 1);
      const uint32_t b = c.first_token + (*random)() % (c.tokens + 1);
      const uint32_t kind = c.whole ? 0 : (*random)() % 5;
      lo.push_back(kind == 0 ? c.first_token : kind == 1 ? a : kind == 2 ? end : std::min(a, b));
      hi.push_back(kind == 0 ? end : kind == 1 ? a : kind == 2 ? end + 100 : std::max(a, b));
    }
  }
};

struct Answer {
  std::vector<double> o;
  double lse = -INFINITY;
  double size = 0;   // mean length of the values it is made of
  double reach = 0;  // the largest score that its query's length and that of a key allow
};

// What the arithmetic may err by: of an output, by the length of its values, and of a log sum.
// Where kernels multiply whole numbers, queries and weights have 16 bits.
struct Tolerance {
  double o, lse;
};
Tolerance ToleranceOf(SimdLevel level, KvCodec codec, const Answer& answer) {
  if (level < SimdLevel::kAvx512 || codec == KvCodec::kFp8) return {1e-5, 2e-5};
  // Half a step of 2^-16 of the largest, which is a few times a usual number, for each of a row's.
  // Codes of int4 are all positive, and longer than what they mean.
  const double step = codec == KvCodec::kInt8 ? 0x1p-15 : 0x1p-14;
  return {1e-5 + step * (1 + answer.reach), 2e-5 + step * answer.reach};
}

Answer InDouble(const Segments& s, std::span<const float> q, uint32_t lo, uint32_t hi) {
  Answer answer{std::vector<double>(s.head_dim)};
  lo = std::min(std::max(lo, s.first) - s.first, s.tokens());
  hi = std::max(lo, std::min(std::max(hi, s.first) - s.first, s.tokens()));
  std::vector<double> z;
  double largest = -INFINITY, total = 0;
  for (uint32_t t = lo; t < hi; ++t) {
    double dot = 0;
    double q_squares = 0, k_squares = 0;
    for (uint32_t d = 0; d < s.head_dim; ++d) {
      const double k = s.k[size_t{t} * s.head_dim + d];
      dot += q[d] * k;
      q_squares += double{q[d]} * q[d];
      k_squares += k * k;
    }
    z.push_back(dot / std::sqrt(static_cast<double>(s.head_dim)));
    answer.reach = std::max(answer.reach, std::sqrt(q_squares * k_squares / s.head_dim));
    largest = std::max(largest, z.back());
  }
  if (lo == hi) return answer;
  for (uint32_t t = lo; t < hi; ++t) {
    const double w = std::exp(z[t - lo] - largest);
    double squares = 0;
    total += w;
    for (uint32_t d = 0; d < s.head_dim; ++d) {
      const double v = s.v[size_t{t} * s.head_dim + d];
      answer.o[d] += w * v;
      squares += v * v;
    }
    answer.size += w * std::sqrt(squares);
  }
  for (double& x : answer.o) x /= total;
  answer.size /= total;
  answer.lse = largest + std::log(total);
  return answer;
}

// A run of the kernel; what it overwrites is poisoned.
struct KernelState {
  std::vector<float> max, sum, acc;
  std::vector<char> scratch;
  std::vector<kernels::AttendSegment> segments;
  kernels::AttendRun run{};

  KernelState(const Case& c, const Segments& s, const Queries& q, const kernels::Table& table)
      : max(c.queries + 1, NAN),
        sum(c.queries + 1, NAN),
        acc((size_t{c.queries} + 1) * c.head_dim, NAN),
        segments(s.ForKernels()) {
    run.q = q.q.data();
    run.queries = c.queries;
    run.head_dim = c.head_dim;
    run.dtype = static_cast<uint8_t>(c.codec);
    run.q_parts = c.q_dtype == DType::kBf16 ? 1 : c.q_dtype == DType::kFp16 ? 2 : 3;
    run.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    run.segments = segments.data();
    run.segment_count = segments.size();
    run.lo = q.lo.data();
    run.hi = q.hi.data();
    run.max = max.data();
    run.sum = sum.data();
    run.acc = acc.data();
    const size_t bytes = table.attend_coded_scratch_bytes(run);
    scratch.assign(bytes + 128, static_cast<char>(0xff));
    char* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
    run.scratch = aligned;
    behind = aligned + bytes;
  }
  const char* behind;

  void ExpectNothingElseWritten() const {
    EXPECT_TRUE(std::isnan(max.back()) && std::isnan(sum.back()) && std::isnan(acc.back()));
    for (uint32_t i = 0; i < 32; ++i) ASSERT_EQ(behind[i], static_cast<char>(0xff)) << i;
  }
};

class CodedAttendTest : public ::testing::TestWithParam<SimdLevel> {
 protected:
  const kernels::Table& table() { return KernelsOf(GetParam()); }

  // Holds every query's answer against sums in double.
  void Check(const Case& c, std::mt19937* random) {
    SCOPED_TRACE(NameOf(c));
    const Segments segments(c, random);
    const Queries queries(c, random);
    KernelState state(c, segments, queries, table());
    table().attend_coded(state.run);
    for (uint32_t i = 0; i < c.queries; ++i) {
      const auto q = std::span(queries.q).subspan(size_t{i} * c.head_dim, c.head_dim);
      const Answer want = InDouble(segments, q, queries.lo[i], queries.hi[i]);
      const Tolerance tolerance = ToleranceOf(GetParam(), c.codec, want);
      const float* acc = state.acc.data() + size_t{i} * c.head_dim;
      if (want.lse == -INFINITY) {
        ASSERT_EQ(state.max[i], -INFINITY);
        ASSERT_EQ(state.sum[i], 0);
        for (uint32_t d = 0; d < c.head_dim; ++d) ASSERT_EQ(acc[d], 0);
        continue;
      }
      ASSERT_NEAR(state.max[i] + std::log(state.sum[i]), want.lse, tolerance.lse) << "query " << i;
      double error = 0;
      for (uint32_t d = 0; d < c.head_dim; ++d) {
        error += std::pow(acc[d] / state.sum[i] - want.o[d], 2);
      }
      ASSERT_LE(std::sqrt(error) / want.size, tolerance.o)
          << "query " << i << ", range [" << queries.lo[i] << ", " << queries.hi[i] << ")";
    }
    state.ExpectNothingElseWritten();
  }
};

TEST_P(CodedAttendTest, AttendsEveryShapeAsSumsInDouble) {
  std::mt19937 random(Seed());
  const DType dtypes[] = {DType::kBf16, DType::kFp16, DType::kFp32};
  const uint32_t tokens[] = {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 200, 255, 256, 257, 600};
  for (KvCodec codec : kCodecs) {
    for (uint32_t d = kHeadDimStep; d <= kMaxHeadDim; d += d < 256 ? 16 : 64) {
      for (int round = 0; round < 3; ++round) {
        Check({codec, dtypes[random() % 3], d, 1 + static_cast<uint32_t>(random() % 33),
               tokens[random() % std::size(tokens)], random() % 3 == 0 ? 20u : 256u,
               static_cast<uint32_t>(random() % 2 * 128)},
              &random);
        if (HasFatalFailure()) return;
      }
    }
    for (uint32_t q = 1; q <= 33; ++q) {  // every remainder of the query loops
      Check({codec, dtypes[q % 3], 128, q, 130, 256, 128, true}, &random);
      if (HasFatalFailure()) return;
    }
    for (uint32_t t : tokens) {
      for (uint32_t q : {1u, 4u, 6u, 8u}) {
        Check({codec, DType::kBf16, 96, q, t, 256}, &random);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(CodedAttendTest, AttendsNothingWithoutSegments) {
  std::mt19937 random(Seed() + 1);
  for (KvCodec codec : kCodecs) Check({codec, DType::kBf16, 64, 5, 0, 1}, &random);
}

// Scores from very small to far past what fp32 holds, values up to the largest that are coded.
TEST_P(CodedAttendTest, ExtremesGiveNoNan) {
  std::mt19937 random(Seed() + 2);
  for (KvCodec codec : kCodecs) {
    for (uint32_t queries : {1u, 3u, 4u, 8u, 17u}) {
      for (float size : {0.0f, 1e-38f, 1e3f, 1e18f, 3e38f}) {
        for (float q_size : {0.0f, 1e-30f, 1e18f, 2e38f}) {
          const Case c{codec, DType::kFp32, 96, queries, 150, 70, 5};
          const Segments segments(c, &random, size);
          Queries q(c, &random);
          for (float& x : q.q) x = std::max(-3e38f, std::min(3e38f, x * q_size));
          KernelState state(c, segments, q, table());
          table().attend_coded(state.run);
          for (uint32_t i = 0; i < queries; ++i) {
            ASSERT_FALSE(std::isnan(state.max[i])) << NameOf(c);
            ASSERT_TRUE(std::isfinite(state.sum[i])) << NameOf(c);
            ASSERT_TRUE(state.max[i] == -INFINITY ? state.sum[i] == 0 : state.sum[i] >= 0.999f);
            for (uint32_t d = 0; d < 96; ++d) ASSERT_TRUE(std::isfinite(state.acc[i * 96 + d]));
          }
        }
      }
    }
  }
}

// Any codes mean something: none is a reason to read elsewhere or to give a NaN.
TEST_P(CodedAttendTest, AnyCodesAreAttendedAsTheyAreRead) {
  std::mt19937 random(Seed() + 3);
  for (KvCodec codec : kCodecs) {
    const Case c{codec, DType::kBf16, 80, 6, 64, 256, 0, true};
    Segments segments(c, &random);
    for (std::vector<std::byte>& strip : segments.memory) {
      const size_t codes = coded::CodeBytes(static_cast<uint8_t>(codec), 80, 16);
      for (size_t i = 0; i < codes && i < strip.size(); ++i) {
        strip[strip.size() - 1 - i] = static_cast<std::byte>(random());
      }
    }
    for (KvPart part : {KvPart::kKey, KvPart::kValue}) {
      std::vector<double>& wide = part == KvPart::kKey ? segments.k : segments.v;
      wide.clear();
      for (const CodedSegment& s : segments.list) {
        const CodedReference reference({codec, part, 80, s.tokens.size()},
                                       part == KvPart::kKey ? s.k : s.v);
        for (uint32_t t = 0; t < s.tokens.size(); ++t) {
          for (uint32_t d = 0; d < 80; ++d) wide.push_back(reference.Number(t, d));
        }
      }
    }
    const Queries queries(c, &random);
    KernelState state(c, segments, queries, table());
    table().attend_coded(state.run);
    for (uint32_t i = 0; i < c.queries; ++i) {
      const auto q = std::span(queries.q).subspan(size_t{i} * 80, 80);
      const Answer want = InDouble(segments, q, 0, 64);
      const Tolerance tolerance = ToleranceOf(GetParam(), codec, want);
      EXPECT_NEAR(state.max[i] + std::log(state.sum[i]), want.lse, 2 * tolerance.lse);
      for (uint32_t d = 0; d < 80; ++d) {
        EXPECT_NEAR(state.acc[i * 80 + d] / state.sum[i], want.o[d], 2 * tolerance.o * want.size);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, CodedAttendTest, ::testing::ValuesIn(SupportedSimdLevels()),
                         [](const auto& param) { return std::string(SimdLevelName(param.param)); });

// The whole call: passes, merging, and what it says it read.
TEST(AttendCodedTest, MergesIntoWhatWasAttendedAndCountsItsBytes) {
  std::mt19937 random(Seed() + 4);
  for (KvCodec codec : kCodecs) {
    const Case c{codec, DType::kBf16, 64, 3, 20000, 256, 512};
    Segments segments(c, &random);
    Queries queries(c, &random);
    const std::vector<TokenRange> ranges = {{512, 20512}, {700, 15000}, {600, 600}};
    std::vector<float> acc(3 * 64);
    std::vector<Partial> partials(3);
    for (uint32_t i = 0; i < 3; ++i) partials[i].acc = std::span(acc).subspan(i * 64, 64);
    const QueryBlock block{queries.q.data(), DType::kBf16, 3, 64, 0.125f, ranges};
    // Two halves, as a caller with several runs would.
    const size_t half = segments.list.size() / 2;
    AttendCoded({std::span(segments.list).first(half), 64, codec}, block, partials);
    AttendCoded({std::span(segments.list).subspan(half), 64, codec}, block, partials);
    uint64_t bytes = 0;
    for (const CodedSegment& s : segments.list) bytes += s.k.size() + s.v.size();
    EXPECT_EQ(partials[0].bytes, bytes);
    for (uint32_t i = 0; i < 3; ++i) {
      EXPECT_EQ(partials[i].tokens, ranges[i].size());
      const Answer want =
          InDouble(segments, std::span(queries.q).subspan(i * 64, 64), ranges[i].lo, ranges[i].hi);
      const Tolerance tolerance = ToleranceOf(SimdLevelInUse(), codec, want);
      std::vector<float> o(64);
      const float lse = partials[i].Finish(o);
      if (ranges[i].empty()) {
        EXPECT_EQ(lse, -INFINITY);
        continue;
      }
      EXPECT_NEAR(lse, want.lse, tolerance.lse);
      for (uint32_t d = 0; d < 64; ++d) EXPECT_NEAR(o[d], want.o[d], tolerance.o * want.size);
    }
  }
}

TEST(AttendCodedTest, OnlyTilesThatAreTouchedCountAsRead) {
  std::mt19937 random(Seed() + 5);
  const Case c{KvCodec::kInt8, DType::kBf16, 64, 1, 200, 1, 0, true};
  std::vector<float> rows(200 * 64, 1.0f);
  std::vector<std::byte> strips[2];
  for (KvPart part : {KvPart::kKey, KvPart::kValue}) {
    const CodedStrip strip{c.codec, part, 64, 200};
    strips[static_cast<int>(part)].resize(strip.bytes());
    EncodeStrip(strip, DType::kFp32, rows.data(), strips[static_cast<int>(part)]);
  }
  const CodedSegment segment{strips[0], strips[1], {0, 200}};
  const uint64_t tile = CodedStrip{c.codec, KvPart::kKey, 64, 64}.bytes();
  const uint64_t last = CodedStrip{c.codec, KvPart::kKey, 64, 8}.bytes();
  const auto bytes = [&](TokenRange range) {
    std::vector<float> q(64, 1.0f), acc(64);
    Partial partial;
    partial.acc = acc;
    AttendCoded({std::span(&segment, 1), 64, c.codec},
                {q.data(), DType::kBf16, 1, 64, 0.125f, std::span(&range, 1)},
                std::span(&partial, 1));
    return partial.bytes;
  };
  EXPECT_EQ(bytes({0, 1}), 2 * tile);
  EXPECT_EQ(bytes({63, 65}), 4 * tile);
  EXPECT_EQ(bytes({64, 128}), 2 * tile);
  EXPECT_EQ(bytes({130, 200}), 2 * (tile + last));
  EXPECT_EQ(bytes({199, 300}), 2 * last);
  EXPECT_EQ(bytes({300, 400}), 0);
}

}  // namespace
}  // namespace quarry

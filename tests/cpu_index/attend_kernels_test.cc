// Attention over segments at every level this processor has, against sums in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cpu_index/simd.h"
#include "proto/half.h"
#include "proto/types.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

enum class Ranges { kWhole, kMixed };

struct AttendCase {
  DType dtype;
  DType q_dtype;
  uint32_t head_dim;
  uint32_t queries;
  uint32_t tokens;
  uint32_t segment_tokens;  // at most
  uint32_t first_token;
  Ranges ranges;
};

std::vector<AttendCase> AttendCases() {
  std::vector<AttendCase> cases;
  std::mt19937 random(Seed() + 3);
  const DType dtypes[] = {DType::kBf16, DType::kFp16, DType::kFp32};
  const uint32_t tokens[] = {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 256, 257};
  const auto segment_tokens = [&] { return random() % 3 == 0 ? 20 : 256; };
  for (uint32_t d = 16; d <= 256; d += 16) {
    for (DType dtype : dtypes) {
      for (DType q_dtype : dtypes) {
        for (int i = 0; i < 2; ++i) {
          cases.push_back({dtype, q_dtype, d, 1 + static_cast<uint32_t>(random() % 33),
                           tokens[random() % std::size(tokens)],
                           static_cast<uint32_t>(segment_tokens()),
                           static_cast<uint32_t>(random() % 2 * 128), Ranges::kMixed});
        }
      }
    }
  }
  for (DType dtype : dtypes) {
    for (uint32_t q = 1; q <= 33; ++q) {  // every remainder of the query loops
      cases.push_back({dtype, dtype, 128, q, 130, 256, 128, Ranges::kWhole});
    }
    for (uint32_t t : {1u, 2u, 15u, 16u, 17u, 255u, 256u, 257u, 1000u}) {
      for (uint32_t q : {1u, 4u, 8u}) {
        for (uint32_t d : {64u, 96u, 128u}) {
          cases.push_back({dtype, DType::kBf16, d, q, t, 256, 0, Ranges::kMixed});
        }
      }
    }
    cases.push_back({dtype, DType::kFp32, 512, 130, 97, 256, 3, Ranges::kMixed});
  }
  return cases;
}

// Segments of one head, each misaligned in memory of its own, with random keys and values.
struct Segments {
  std::vector<std::vector<char>> memory;
  std::vector<kernels::AttendSegment> list;
  std::vector<float> k, v;  // [tokens][head_dim], widened
  uint32_t first;           // token

  Segments(const AttendCase& c, std::mt19937* random) : first(c.first_token) {
    std::normal_distribution<float> normal;
    for (uint32_t lo = 0; lo < c.tokens;) {
      const uint32_t n = std::min<uint32_t>(c.tokens - lo, 1 + (*random)() % c.segment_tokens);
      for (std::vector<float>* wide : {&k, &v}) {
        const size_t elements = size_t{n} * c.head_dim, offset = ((*random)() % 3) * 2;
        std::vector<char>& bytes = memory.emplace_back(elements * DTypeBytes(c.dtype) + offset);
        const size_t misalign = c.dtype == DType::kFp32 ? 0 : offset;
        for (size_t i = 0; i < elements; ++i) {
          StoreFromFloat(bytes.data() + misalign, i, c.dtype, normal(*random));
          wide->push_back(LoadAsFloat(bytes.data() + misalign, i, c.dtype));
        }
        starts.push_back(bytes.data() + misalign);
      }
      list.push_back({starts[starts.size() - 2], starts.back(), first + lo, n});
      lo += n;
    }
  }
  std::vector<const void*> starts;
};

// The queries of a case, their ranges, and what an attend overwrites: all poisoned.
struct AttendState {
  std::vector<float> q, max, sum, acc;
  std::vector<uint32_t> lo, hi;
  std::vector<char> scratch;
  kernels::AttendRun run{};

  AttendState(const AttendCase& c, const Segments& segments, const kernels::Table& table,
              std::mt19937* random)
      : q(size_t{c.queries} * c.head_dim),
        max(c.queries + 1, NAN),
        sum(c.queries + 1, NAN),
        acc((size_t{c.queries} + 1) * c.head_dim, NAN) {
    std::normal_distribution<float> normal(0, 1.5f);
    for (float& x : q) {
      StoreFromFloat(&x, 0, c.q_dtype, normal(*random));
      x = LoadAsFloat(&x, 0, c.q_dtype);
    }
    for (uint32_t i = 0; i < c.queries; ++i) {
      // Whole, empty, outside, or a part.
      const uint32_t end = c.first_token + c.tokens;
      const uint32_t a = c.first_token + (*random)() % (c.tokens + 1);
      const uint32_t b = c.first_token + (*random)() % (c.tokens + 1);
      switch (c.ranges == Ranges::kWhole ? 0 : (*random)() % 5) {
        case 0:
          lo.push_back(c.first_token), hi.push_back(end);
          break;
        case 1:
          lo.push_back(a), hi.push_back(a);
          break;
        case 2:
          lo.push_back(end), hi.push_back(end + 100);
          break;
        default:
          lo.push_back(std::min(a, b)), hi.push_back(std::max(a, b));
      }
    }
    run.q = q.data();
    run.queries = c.queries;
    run.head_dim = c.head_dim;
    run.dtype = static_cast<uint8_t>(c.dtype);
    run.q_parts = c.q_dtype == DType::kBf16 ? 1 : c.q_dtype == DType::kFp16 ? 2 : 3;
    run.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    run.segments = segments.list.data();
    run.segment_count = segments.list.size();
    run.lo = lo.data();
    run.hi = hi.data();
    run.max = max.data();
    run.sum = sum.data();
    run.acc = acc.data();
    scratch.assign(table.attend_scratch_bytes(run) + 128, static_cast<char>(0xff));
    run.scratch = Aligned();
  }
  char* Aligned() {
    return scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  }
  // What lies behind the buffers is untouched.
  void ExpectNothingElseWritten(const AttendCase& c) {
    EXPECT_TRUE(std::isnan(max.back()) && std::isnan(sum.back()));
    for (uint32_t d = 0; d < c.head_dim; ++d) EXPECT_TRUE(std::isnan(acc[acc.size() - 1 - d]));
    EXPECT_EQ(scratch.back(), static_cast<char>(0xff));
  }
};

// The share of the output of query i that is wrong, against sums in double; checks the lse.
double ErrorOf(const AttendCase& c, const Segments& segments, const AttendState& s, uint32_t i) {
  const float* q = s.q.data() + size_t{i} * c.head_dim;
  std::vector<double> z, o(c.head_dim, 0.0);
  const uint32_t lo = std::min(std::max(s.lo[i], segments.first) - segments.first, c.tokens);
  const uint32_t hi = std::max(lo, std::min(s.hi[i] - segments.first, c.tokens));
  double largest = -1e300, total = 0;
  for (uint32_t t = lo; t < hi; ++t) {
    double dot = 0;
    for (uint32_t d = 0; d < c.head_dim; ++d) dot += double{q[d]} * segments.k[t * c.head_dim + d];
    z.push_back(dot / std::sqrt(static_cast<double>(c.head_dim)));
    largest = std::max(largest, z.back());
  }
  const float* acc = s.acc.data() + size_t{i} * c.head_dim;
  if (lo == hi) {
    EXPECT_EQ(s.max[i], -std::numeric_limits<float>::infinity());
    EXPECT_EQ(s.sum[i], 0);
    for (uint32_t d = 0; d < c.head_dim; ++d) EXPECT_EQ(acc[d], 0);
    return 0;
  }
  for (uint32_t t = lo; t < hi; ++t) {
    const double w = std::exp(z[t - lo] - largest);
    total += w;
    for (uint32_t d = 0; d < c.head_dim; ++d) o[d] += w * segments.v[t * c.head_dim + d];
  }
  EXPECT_NEAR(s.max[i] + std::log(s.sum[i]), largest + std::log(total), 1e-5);
  double error = 0, size = 0;
  for (uint32_t d = 0; d < c.head_dim; ++d) {
    const double want = o[d] / total;
    error += std::pow(acc[d] / s.sum[i] - want, 2);
    size += want * want;
  }
  return std::sqrt(error / size);
}

class AttendKernelsTest : public ::testing::TestWithParam<SimdLevel> {
 protected:
  const kernels::Table& table() { return KernelsOf(GetParam()); }
};

TEST_P(AttendKernelsTest, AttendsEveryShapeWithin1e5OfDouble) {
  std::mt19937 random(Seed() + 4);
  for (const AttendCase& c : AttendCases()) {
    const Segments segments(c, &random);
    AttendState state(c, segments, table(), &random);
    table().attend(state.run);
    for (uint32_t i = 0; i < c.queries; ++i) {
      ASSERT_LE(ErrorOf(c, segments, state, i), 1e-5)
          << "query " << i << " of " << c.queries << ", range [" << state.lo[i] << ", "
          << state.hi[i] << ") of " << c.tokens << " tokens from " << c.first_token << ", head_dim "
          << c.head_dim << ", " << DTypeName(c.dtype) << ", queries of " << DTypeName(c.q_dtype);
    }
    state.ExpectNothingElseWritten(c);
    if (HasFailure()) FAIL() << c.tokens << " tokens, " << c.queries << " queries";
  }
}

TEST_P(AttendKernelsTest, AttendsNothingWithoutSegments) {
  std::mt19937 random(Seed() + 5);
  for (uint32_t queries : {1u, 4u, 5u, 33u}) {
    const AttendCase c{DType::kBf16, DType::kBf16, 64, queries, 0, 1, 0, Ranges::kWhole};
    const Segments segments(c, &random);
    AttendState state(c, segments, table(), &random);
    table().attend(state.run);
    for (uint32_t i = 0; i < queries; ++i) EXPECT_EQ(ErrorOf(c, segments, state, i), 0);
  }
}

// Scores from very small to far past what fp32 holds: finite sums, weights that add up, no NaN.
TEST_P(AttendKernelsTest, AttendsExtremeScoresWithoutNan) {
  std::mt19937 random(Seed() + 6);
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (uint32_t queries : {1u, 3u, 4u, 7u, 16u, 17u}) {
      for (float size : {1e-30f, 1e3f, 1e18f, 3e38f}) {
        const AttendCase c{dtype, DType::kFp32, 96, queries, 150, 70, 5, Ranges::kMixed};
        Segments segments(c, &random);
        AttendState state(c, segments, table(), &random);
        for (float& x : state.q) x = std::max(-3e38f, std::min(3e38f, x * size));
        table().attend(state.run);
        for (uint32_t i = 0; i < queries; ++i) {
          EXPECT_FALSE(std::isnan(state.max[i]));
          EXPECT_TRUE(std::isfinite(state.sum[i]));
          const bool empty = state.max[i] == -std::numeric_limits<float>::infinity();
          EXPECT_TRUE(empty ? state.sum[i] == 0 : state.sum[i] >= 0.999f) << state.sum[i];
          for (uint32_t d = 0; d < 96; ++d) EXPECT_TRUE(std::isfinite(state.acc[i * 96 + d]));
        }
      }
    }
  }
}

// A query's answer does not depend on what else is in the batch.
TEST_P(AttendKernelsTest, OtherQueriesOfTheBatchDoNotMatter) {
  std::mt19937 random(Seed() + 7);
  const AttendCase c{DType::kBf16, DType::kBf16, 128, 40, 300, 256, 128, Ranges::kMixed};
  const Segments segments(c, &random);
  AttendState all(c, segments, table(), &random);
  table().attend(all.run);
  for (uint32_t i = 0; i < c.queries; i += 3) {
    kernels::AttendRun one = all.run;
    float max, sum;
    std::vector<float> acc(128);
    one.queries = 1;
    one.q += i * 128;
    one.lo += i;
    one.hi += i;
    one.max = &max;
    one.sum = &sum;
    one.acc = acc.data();
    table().attend(one);
    if (all.sum[i] == 0) {
      EXPECT_EQ(sum, 0);
      continue;
    }
    EXPECT_NEAR(max, all.max[i], 1e-5);
    for (uint32_t d = 0; d < 128; ++d) {
      EXPECT_NEAR(acc[d] / sum, all.acc[i * 128 + d] / all.sum[i], 2e-5);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, AttendKernelsTest, ::testing::ValuesIn(SupportedSimdLevels()),
                         [](const auto& param) { return std::string(SimdLevelName(param.param)); });

}  // namespace
}  // namespace quarry

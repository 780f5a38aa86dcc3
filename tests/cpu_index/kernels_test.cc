// Every kernel at every level this processor has, against sums in double.
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

struct Case {
  DType dtype;
  DType q_dtype;
  uint32_t head_dim;
  uint32_t queries;
  uint32_t tokens;
  size_t misalign;  // bytes
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  std::mt19937 random(Seed());
  const uint32_t tokens[] = {1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 100, 257};
  for (uint32_t d = 16; d <= 256; d += 16) {
    for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
      for (DType q_dtype : {DType::kBf16, DType::kFp32}) {
        for (int i = 0; i < 3; ++i) {
          cases.push_back({dtype, q_dtype, d, 1 + static_cast<uint32_t>(random() % 33),
                           tokens[random() % std::size(tokens)], (random() % 2) * 2});
        }
      }
    }
  }
  for (uint32_t q = 1; q <= 33; ++q) {  // every remainder of the query loops
    cases.push_back({DType::kBf16, DType::kBf16, 128, q, 37, 0});
  }
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    cases.push_back({dtype, DType::kBf16, kMaxHeadDim, 17, 19, 2});
  }
  return cases;
}

// Values may be longer than keys: those of the longest head, beside them three of 48 numbers.
std::vector<Case> CasesOfValues() {
  std::vector<Case> cases = Cases();
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (uint32_t d : {528u, 656u, 1024u, 1040u}) cases.push_back({dtype, dtype, d, 17, 19, 2});
  }
  return cases;
}

struct Data {
  std::vector<float> q;
  std::vector<uint16_t> q_bf16;
  std::vector<char> rows;  // K or V, misaligned
  const char* at;

  Data(const Case& c, std::mt19937* random) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < size_t{c.queries} * c.head_dim; ++i) {
      float x = normal(*random);
      q.push_back(c.q_dtype == DType::kBf16 ? Bf16ToFloat(FloatToBf16(x)) : x);
      q_bf16.push_back(FloatToBf16(x));
    }
    size_t n = size_t{c.tokens} * c.head_dim;
    size_t misalign = c.dtype == DType::kFp32 ? 0 : c.misalign;
    rows.resize(n * DTypeBytes(c.dtype) + misalign);
    for (size_t i = 0; i < n; ++i) {
      StoreFromFloat(rows.data() + misalign, i, c.dtype, normal(*random));
    }
    at = rows.data() + misalign;
  }
};

class KernelsTest : public ::testing::TestWithParam<SimdLevel> {
 protected:
  const kernels::Table& table() { return KernelsOf(GetParam()); }
};

TEST_P(KernelsTest, ScoresEqualDotProductsInDouble) {
  std::mt19937 random(Seed());
  for (const Case& c : Cases()) {
    Data data(c, &random);
    const size_t ld = c.tokens + 3;
    std::vector<float> out(c.queries * ld, NAN);
    const float scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    table().score({data.q.data(), c.q_dtype == DType::kBf16 ? data.q_bf16.data() : nullptr,
                   c.queries, c.head_dim, data.at, c.tokens, static_cast<uint8_t>(c.dtype), scale,
                   out.data(), ld, data.at});
    for (uint32_t i = 0; i < c.queries; ++i) {
      for (uint32_t t = 0; t < c.tokens; ++t) {
        double want = 0, size = 0;
        for (uint32_t d = 0; d < c.head_dim; ++d) {
          double x = double{data.q[i * c.head_dim + d]} *
                     LoadAsFloat(data.at, size_t{t} * c.head_dim + d, c.dtype);
          want += x;
          size += std::abs(x);
        }
        ASSERT_NEAR(out[i * ld + t], want * scale, 4e-7 * size * scale + 1e-30)
            << "query " << i << " of " << c.queries << ", token " << t << " of " << c.tokens
            << ", head_dim " << c.head_dim << ", " << DTypeName(c.dtype);
      }
      for (size_t t = c.tokens; t < ld; ++t) {
        ASSERT_TRUE(std::isnan(out[i * ld + t])) << "wrote past the tile";
      }
    }
  }
}

// Budgets compare scores of different batches and tiles: equal keys must tie exactly.
TEST_P(KernelsTest, AScoreDependsOnItsQueryAndKeyAlone) {
  std::mt19937 random(Seed() + 8);
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (DType q_dtype : {DType::kBf16, DType::kFp32}) {
      for (uint32_t d : {48u, 64u, 128u}) {
        const Case c{dtype, q_dtype, d, 37, 150, 0};
        Data data(c, &random);
        const size_t row = size_t{d} * DTypeBytes(dtype);
        for (uint32_t t = 5; t < c.tokens; t += 5) {  // copies of the first key
          std::copy_n(data.at, row, data.rows.data() + t * row);
        }
        const auto score = [&](uint32_t first, uint32_t queries, uint32_t tokens) {
          std::vector<float> out(size_t{queries} * tokens);
          table().score({data.q.data() + first * d,
                         q_dtype == DType::kBf16 ? data.q_bf16.data() + first * d : nullptr,
                         queries, d, data.at, tokens, static_cast<uint8_t>(dtype), 0.1f, out.data(),
                         tokens, nullptr});
          return out;
        };
        const std::vector<float> all = score(0, 37, 150);
        for (uint32_t first : {0u, 3u, 20u}) {
          for (uint32_t queries : {1u, 2u, 4u, 5u, 17u}) {
            for (uint32_t tokens : {1u, 16u, 61u, 150u}) {
              const std::vector<float> some = score(first, queries, tokens);
              for (uint32_t i = 0; i < queries; ++i) {
                for (uint32_t t = 0; t < tokens; ++t) {
                  ASSERT_EQ(some[i * tokens + t], all[(first + i) * 150 + t]);
                  ASSERT_TRUE(t % 5 != 0 || some[i * tokens + t] == all[(first + i) * 150]);
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST_P(KernelsTest, AccumulatesInAndOutOfOrder) {
  std::mt19937 random(Seed() + 1);
  for (const Case& c : CasesOfValues()) {
    Data data(c, &random);
    std::vector<float> p(size_t{c.queries} * (c.tokens + 1));
    for (float& x : p) x = std::uniform_real_distribution<float>()(random);
    std::vector<uint32_t> rows(c.tokens);
    for (uint32_t& r : rows) r = static_cast<uint32_t>(random() % c.tokens);
    for (bool gathered : {false, true}) {
      std::vector<float> acc(size_t{c.queries} * c.head_dim, 0.5f);
      table().accumulate({p.data(), c.tokens + 1, c.queries, c.head_dim, data.at,
                          gathered ? rows.data() : nullptr, c.tokens, static_cast<uint8_t>(c.dtype),
                          acc.data(), gathered ? nullptr : data.at});
      for (uint32_t i = 0; i < c.queries; ++i) {
        for (uint32_t d = 0; d < c.head_dim; ++d) {
          double want = 0.5, size = 0.5;
          for (uint32_t t = 0; t < c.tokens; ++t) {
            size_t r = gathered ? rows[t] : t;
            double x = double{p[i * (c.tokens + 1) + t]} *
                       LoadAsFloat(data.at, r * c.head_dim + d, c.dtype);
            want += x;
            size += std::abs(x);
          }
          ASSERT_NEAR(acc[i * c.head_dim + d], want, 2e-6 * size)
              << "query " << i << " of " << c.queries << ", dim " << d << " of " << c.head_dim
              << ", " << c.tokens << " tokens of " << DTypeName(c.dtype);
        }
      }
    }
  }
}

TEST_P(KernelsTest, ExponentialIsAccurateAndSafe) {
  std::mt19937 random(Seed() + 2);
  for (size_t n : {1u, 2u, 7u, 8u, 15u, 16u, 17u, 100u, 1000u}) {
    std::vector<float> x(n), y;
    for (float& v : x) v = -90.0f * std::pow(std::uniform_real_distribution<float>()(random), 3.f);
    if (n > 2) x[1] = -std::numeric_limits<float>::infinity();
    y = x;
    float sum = table().exp_sum(y.data(), n, 0.25f);
    double want_sum = 0;
    for (size_t i = 0; i < n; ++i) {
      double want = std::exp(double{x[i] - 0.25f});
      want_sum += want;
      ASSERT_NEAR(y[i], want, 3e-7 * want + 2e-38) << "x " << x[i];
    }
    EXPECT_NEAR(sum, want_sum, 2e-6 * want_sum);
  }
}

TEST_P(KernelsTest, ExtremeScoresStayFinite) {
  std::vector<float> q(32, 3e38f), k(32 * 3, 3e38f), out(3, NAN);
  for (int i = 32; i < 64; ++i) k[i] = -3e38f;
  table().score(
      {q.data(), nullptr, 1, 32, k.data(), 3, kernels::kFp32, 1.0f, out.data(), 3, nullptr});
  for (float z : out) EXPECT_TRUE(std::isfinite(z)) << z;
  EXPECT_GT(out[0], 0);
  EXPECT_LT(out[1], 0);
}

TEST_P(KernelsTest, MaxAndScaleCoverEveryElement) {
  for (size_t n = 0; n < 70; ++n) {
    std::vector<float> x(n, -5.0f);
    for (size_t at = 0; at < n; ++at) {
      x[at] = 7.0f;
      EXPECT_EQ(table().max(x.data(), n), 7.0f);
      x[at] = -5.0f;
    }
    table().scale(x.data(), n, 2.0f);
    for (float v : x) EXPECT_EQ(v, -10.0f);
  }
  EXPECT_EQ(table().max(nullptr, 0), -std::numeric_limits<float>::infinity());
}

INSTANTIATE_TEST_SUITE_P(Levels, KernelsTest, ::testing::ValuesIn(SupportedSimdLevels()),
                         [](const auto& param) { return std::string(SimdLevelName(param.param)); });

TEST(SimdTest, UnknownAndMissingLevelsAreNamed) {
  setenv("QUARRY_SIMD", "sse9", 1);
  EXPECT_TRUE(absl::IsInvalidArgument(ChooseSimdLevel().status()));
  EXPECT_NE(std::string(ChooseSimdLevel().status().message()).find("sse9"), std::string::npos);
  setenv("QUARRY_SIMD", "scalar", 1);
  EXPECT_EQ(*ChooseSimdLevel(), SimdLevel::kScalar);
  unsetenv("QUARRY_SIMD");
}

}  // namespace
}  // namespace quarry

#include "cpu_index/query_basis.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "proto/half.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using ::testing::HasSubstr;

// Keys that lie near a subspace, and queries that look along another.
struct Sample {
  Sample(uint32_t n, uint32_t m, uint32_t d) : head_dim(d), keys(n * d), queries(m * d) {
    std::mt19937 random(Seed());
    std::normal_distribution<float> normal;
    std::vector<float> mix(d * d), look(d * d);
    for (uint32_t i = 0; i < d * d; ++i) {
      mix[i] = normal(random) * std::exp(-0.08f * static_cast<float>(i / d));
      look[i] = normal(random) * std::exp(-0.05f * static_cast<float>(i / d));
    }
    Fill(mix, n, 0.7f, &keys, &random);
    Fill(look, m, 0.2f, &queries, &random);
    for (float& k : keys) k = Bf16ToFloat(FloatToBf16(k));
    for (const float k : keys) k_bf16.push_back(FloatToBf16(k));
    for (float& q : queries) q /= std::sqrt(static_cast<float>(d));
    segment = {k_bf16.data(), nullptr, {1000, 1000 + n}};
    view.segments = {&segment, 1};
    view.head_dim = d;
  }
  void Fill(const std::vector<float>& map, uint32_t rows, float mean, std::vector<float>* out,
            std::mt19937* random) {
    std::normal_distribution<float> normal;
    std::vector<float> z(head_dim);
    for (uint32_t r = 0; r < rows; ++r) {
      for (float& x : z) x = normal(*random);
      for (uint32_t c = 0; c < head_dim; ++c) {
        float sum = mean;
        for (uint32_t e = 0; e < head_dim; ++e) sum += z[e] * map[e * head_dim + c];
        (*out)[r * head_dim + c] = sum;
      }
    }
  }
  std::span<const float> Key(uint32_t t) const {
    return std::span(keys).subspan(size_t{t} * head_dim, head_dim);
  }
  std::span<const float> Query(uint32_t i) const {
    return std::span(queries).subspan(size_t{i} * head_dim, head_dim);
  }

  uint32_t head_dim;
  std::vector<float> keys, queries;
  std::vector<uint16_t> k_bf16;
  KvSegment segment;
  KvView view;
};

double Dot(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * b[i];
  return sum;
}

// A key's coordinates [rank].
void EncodeKey(const QueryBasis& basis, std::span<const float> key, std::vector<float>* out) {
  std::vector<float> centred(key.begin(), key.end());
  for (uint32_t d = 0; d < key.size(); ++d) centred[d] -= basis.mean[d];
  for (uint32_t r = 0; r < basis.rank; ++r) {
    const auto row = std::span(basis.key_map).subspan(size_t{r} * basis.head_dim, basis.head_dim);
    (*out)[r] = static_cast<float>(Dot(row, centred));
  }
}

// Mean square of what the basis misses of q.(k - mean), over a sample of pairs.
double MeanSquareLoss(const Sample& s, const QueryBasis& basis) {
  std::vector<float> k(basis.rank), q(basis.rank);
  double sum = 0;
  int pairs = 0;
  for (uint32_t i = 0; i < s.queries.size() / s.head_dim; i += 3) {
    basis.EncodeQuery(s.Query(i), q);
    for (uint32_t t = 0; t < s.keys.size() / s.head_dim; t += 17) {
      EncodeKey(basis, s.Key(t), &k);
      const double exact = Dot(s.Query(i), s.Key(t)) - Dot(s.Query(i), basis.mean);
      sum += std::pow(exact - Dot(q, k), 2);
      ++pairs;
    }
  }
  return sum / pairs;
}

TEST(QueryBasisTest, OfFullRankItKeepsEveryScore) {
  for (const uint32_t head_dim : {16u, 96u, 128u}) {
    const Sample s(700, 300, head_dim);
    const auto basis = FitQueryBasis(s.view, s.queries, head_dim);
    ASSERT_TRUE(basis.ok()) << basis.status();
    EXPECT_EQ(basis->lost_variance, 0);
    EXPECT_LT(MeanSquareLoss(s, *basis), 1e-5) << head_dim;
  }
}

TEST(QueryBasisTest, WhatItLosesIsWhatItSaysAndLessThanWithoutQueries) {
  const Sample s(1500, 600, 64);
  for (const uint32_t rank : {8u, 16u, 32u}) {
    const auto aware = FitQueryBasis(s.view, s.queries, rank);
    const auto blind = FitQueryBasis(s.view, {}, rank);
    ASSERT_TRUE(aware.ok() && blind.ok());
    const double loss = MeanSquareLoss(s, *aware);
    EXPECT_LT(loss, MeanSquareLoss(s, *blind)) << rank;
    // It allows for directions that these queries happen not to have.
    EXPECT_GT(aware->lost_variance, 0.7 * loss) << rank;
    EXPECT_LT(aware->lost_variance, 3 * loss) << rank;
  }
}

TEST(QueryBasisTest, CoordinatesAreCentredAndTheirVarianceFalls) {
  const Sample s(900, 200, 32);
  const auto basis = FitQueryBasis(s.view, s.queries, 32);
  ASSERT_TRUE(basis.ok()) << basis.status();
  std::vector<double> mean(32), square(32);
  std::vector<float> y(32);
  for (uint32_t t = 0; t < 900; ++t) {
    EncodeKey(*basis, s.Key(t), &y);
    for (uint32_t r = 0; r < 32; ++r) mean[r] += y[r] / 900, square[r] += y[r] * y[r] / 900;
  }
  for (uint32_t r = 0; r < 32; ++r) {
    const double deviation = std::sqrt(basis->variance[r]);
    EXPECT_NEAR(mean[r], 0, 1e-3 * deviation + 1e-5);
    EXPECT_NEAR(square[r], basis->variance[r],
                1e-2 * basis->variance[r] + 1e-6 * (1 + basis->variance[0]));
    if (r > 0) {
      EXPECT_LE(basis->variance[r], basis->variance[r - 1]);
    }
  }
}

TEST(QueryBasisTest, ProjectedKeysAreTheirFirstCoordinatesAndZerosBehindTheRank) {
  Sample s(700, 300, 64);
  const auto basis = FitQueryBasis(s.view, s.queries, 40);
  ASSERT_TRUE(basis.ok()) << basis.status();
  std::vector<float> wanted(40);
  for (const DType dtype : {DType::kBf16, DType::kFp32}) {
    s.view.dtype = dtype;
    s.segment.k = dtype == DType::kBf16 ? static_cast<const void*>(s.k_bf16.data()) : s.keys.data();
    for (const uint32_t width : {16u, 48u}) {
      const std::vector<float> rows = ProjectKeys(s.view, *basis, width);
      ASSERT_EQ(rows.size(), 700 * width);
      for (uint32_t t = 0; t < 700; ++t) {
        EncodeKey(*basis, s.Key(t), &wanted);
        for (uint32_t c = 0; c < width; ++c) {
          const float at = rows[t * width + c];
          if (c >= 40) {
            ASSERT_EQ(at, 0);
          } else {
            ASSERT_NEAR(at, wanted[c], 0.02 * std::sqrt(basis->variance[0])) << t << " " << c;
          }
        }
      }
    }
  }
}

TEST(QueryBasisTest, FewerQueriesThanDimensionsAndEqualKeysAreNoProblem) {
  const Sample s(600, 5, 64);
  const auto few = FitQueryBasis(s.view, s.queries, 64);
  ASSERT_TRUE(few.ok()) << few.status();
  EXPECT_LT(MeanSquareLoss(s, *few), 1e-4);

  std::vector<uint16_t> equal(100 * 16, FloatToBf16(0.5f));
  const KvSegment segment{equal.data(), nullptr, {0, 100}};
  KvView view;
  view.segments = {&segment, 1};
  view.head_dim = 16;
  const auto flat = FitQueryBasis(view, {}, 16);
  ASSERT_TRUE(flat.ok()) << flat.status();
  for (const float v : flat->variance) EXPECT_EQ(v, 0);
  for (const float x : flat->key_map) EXPECT_TRUE(std::isfinite(x));
}

TEST(QueryBasisTest, WrongShapesAreNamed) {
  const Sample s(50, 5, 16);
  const auto text = [](const auto& result) { return std::string(result.status().message()); };
  EXPECT_THAT(text(FitQueryBasis(s.view, s.queries, 17)), HasSubstr("rank 17 of head_dim 16"));
  EXPECT_THAT(text(FitQueryBasis(s.view, s.queries, 0)), HasSubstr("rank 0"));
  EXPECT_THAT(text(FitQueryBasis(s.view, std::span(s.queries).first(17), 8)),
              HasSubstr("17 numbers"));
  EXPECT_THAT(text(FitQueryBasis(KvView{{}, 16}, s.queries, 8)), HasSubstr("no keys"));
}

}  // namespace
}  // namespace quarry

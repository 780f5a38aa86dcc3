#include "cpu_index/cluster_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "proto/half.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kTokens = 1000, kDim = 64;  // the last super and the last leaf are not whole

// A run in two segments.
class ClusterRowsTest : public ::testing::Test {
 protected:
  ClusterRowsTest() : random_(Seed()) {
    std::normal_distribution<float> normal;
    for (uint32_t at = 0; at < kTokens * kDim; ++at) {
      k_.push_back(FloatToBf16(normal(random_) / (1 + 0.1f * static_cast<float>(at % kDim))));
      v_.push_back(FloatToBf16(1 + normal(random_)));
    }
    constexpr uint32_t kFirst = 300, kCut = 640;
    segments_ = {{k_.data(), v_.data(), {kFirst, kFirst + kCut}},
                 {k_.data() + kCut * kDim, v_.data() + kCut * kDim, {kFirst + kCut, kFirst + kTokens}}};
    view_.segments = segments_;
    view_.head_dim = kDim;
    auto basis = FitQueryBasis(view_, {}, kDim);
    EXPECT_TRUE(basis.ok()) << basis.status();
    basis_ = *std::move(basis);
  }

  std::mt19937 random_;
  std::vector<uint16_t> k_, v_;
  std::vector<KvSegment> segments_;
  KvView view_;
  QueryBasis basis_;
};

TEST_F(ClusterRowsTest, TheTreesOrderHasEveryTokenOnceAndKeysFollowIt) {
  const std::vector<uint32_t> order = TreeOrder(view_, basis_);
  std::vector<uint32_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  ASSERT_EQ(sorted.size(), kTokens);
  for (uint32_t t = 0; t < kTokens; ++t) ASSERT_EQ(sorted[t], t);
  const std::vector<float> all = ProjectKeys(view_, basis_, kDim);
  OrderedKeys keys(view_, order, basis_);
  for (const TokenRange places : {TokenRange{0, 256}, TokenRange{600, 700}, TokenRange{999, 1000}}) {
    std::vector<float> rows(places.size() * kDim);
    keys.Read(places.lo, places.hi, rows.data());
    for (uint32_t at = places.lo; at < places.hi; ++at) {
      for (uint32_t c = 0; c < kDim; ++c) {
        ASSERT_NEAR(rows[(at - places.lo) * kDim + c], all[order[at] * kDim + c], 1e-4);
      }
    }
  }
}

TEST_F(ClusterRowsTest, MeansOfValuesAreOfLeavesAndSupers) {
  std::vector<uint32_t> order(kTokens);
  for (uint32_t t = 0; t < kTokens; ++t) order[t] = kTokens - 1 - t;
  OrderedValues values(view_, order);
  const auto value = [&](uint32_t place, uint32_t d) {
    return double{Bf16ToFloat(v_[order[place] * kDim + d])};
  };
  for (const uint32_t super : {0u, 3u}) {
    values.Read(super);
    const uint32_t lo = super * kSuperRows;
    ASSERT_EQ(values.tokens(), std::min(kSuperRows, kTokens - lo));
    ASSERT_EQ(values.leaves(), (values.tokens() + kLeafRows - 1) / kLeafRows);
    for (uint32_t d = 0; d < kDim; ++d) {
      double of_super = 0;
      for (uint32_t leaf = 0; leaf < values.leaves(); ++leaf) {
        const uint32_t count = values.leaf_tokens(leaf);
        double of_leaf = 0;
        for (uint32_t t = 0; t < count; ++t) {
          const double one = value(lo + leaf * kLeafRows + t, d);
          ASSERT_EQ(values.Leaf(leaf)[t * kDim + d], one);
          of_leaf += one;
        }
        ASSERT_NEAR(values.LeafMean(leaf)[d], of_leaf / count, 1e-5);
        of_super += of_leaf;
      }
      ASSERT_NEAR(values.mean()[d], of_super / values.tokens(), 1e-5);
    }
  }
}

TEST_F(ClusterRowsTest, EqualisedRowsAreOneLongAndScalesBringThemBack) {
  std::vector<float> variance, rows(kTokens * kDim);
  for (uint32_t c = 0; c < kDim; ++c) variance.push_back(c == 7 ? 0 : 1.0f / (1 + c));
  std::normal_distribution<float> normal;
  for (uint32_t at = 0; at < rows.size(); ++at) {
    const float length = at / kDim % 10 == 0 ? 8.0f : 1.0f;
    rows[at] = length * normal(random_) * std::sqrt(variance[at % kDim]);
  }
  std::fill_n(rows.begin() + kDim, kDim, 0.0f);  // no length at all
  rows[2 * kDim + 5] = 100;                      // nearly all of its row's
  const std::vector<float> before = rows;
  std::vector<uint16_t> scale(kTokens);
  Equaliser(variance).Equalise(rows, scale);
  for (uint32_t r = 0; r < kTokens; ++r) {
    double squares = 0;
    for (uint32_t c = 0; c < kDim; ++c) {
      const float x = rows[r * kDim + c];
      ASSERT_NEAR(x * Bf16ToFloat(scale[r]), before[r * kDim + c], 1e-4);
      if (variance[c] > 0) squares += x * x / variance[c] / (kDim - 1);
      ASSERT_LE(x * x, 9.2f * variance[c]);
    }
    if (r == 1) {
      EXPECT_EQ(squares, 0);
    } else if (r == 2) {
      EXPECT_LT(squares, 0.5);
    } else {
      ASSERT_LE(squares, 1.02) << r;
      ASSERT_GT(squares, 0.2) << r;  // one coordinate in many lies beyond three deviations
    }
  }
}

}  // namespace
}  // namespace quarry

#include "cpu_index/top_keys.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/cpu_index/graph_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::GraphCase;

TEST(TopKeysTest, AreTheKeysWithTheLargestProducts) {
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    const GraphCase c(3001, Seed(), dtype);
    const std::span<const float> q(c.queries.q, size_t{GraphCase::kGroup} * GraphCase::kHeadDim);
    const std::vector<uint32_t> top = TopKeys(c.view, q, 50, 1);
    ASSERT_EQ(top.size(), 200u);
    for (uint32_t i = 0; i < 4; ++i) {
      const std::set<uint32_t> best = c.Best(i, 50);
      double worst = INFINITY;
      for (uint32_t token : best) worst = std::min(worst, c.Score(i, token));
      for (uint32_t j = 0; j < 50; ++j) {
        const double score = c.Score(i, GraphCase::kFirst + top[i * 50 + j]);
        EXPECT_GE(score, worst - 1e-4);
        if (j > 0) {
          EXPECT_LE(score, c.Score(i, GraphCase::kFirst + top[i * 50 + j - 1]) + 1e-4);
        }
      }
      EXPECT_EQ(std::set<uint32_t>(top.begin() + i * 50, top.begin() + i * 50 + 50).size(), 50u);
    }
  }
}

TEST(TopKeysTest, OfEqualKeysAreTheFirst) {
  const std::vector<float> keys(700 * 16, 1.0f), q(16, 1.0f);
  const KvSegment segment{keys.data(), keys.data(), {10, 710}};
  const KvView view{std::span(&segment, 1), 16, DType::kFp32};
  EXPECT_EQ(TopKeys(view, q, 3, 1), (std::vector<uint32_t>{0, 1, 2}));
}

TEST(TopKeysTest, AreTheSameOnAnyNumberOfThreads) {
  GraphCase c(2000, Seed());
  std::vector<float> queries;
  c.MakeQueries(70, &queries);
  const std::vector<uint32_t> one = TopKeys(c.view, queries, 20, 1);
  EXPECT_EQ(one, TopKeys(c.view, queries, 20, 4));
  EXPECT_EQ(one.size(), 70 * 4 * 20u);
}

TEST(TopKeysTest, AreAllKeysOfAShortRun) {
  GraphCase c(30, Seed());
  const std::span<const float> q(c.queries.q, GraphCase::kHeadDim);
  std::vector<uint32_t> top = TopKeys(c.view, q, 100, 2);
  std::sort(top.begin(), top.end());
  ASSERT_EQ(top.size(), 30u);
  for (uint32_t i = 0; i < 30; ++i) EXPECT_EQ(top[i], i);
  EXPECT_TRUE(TopKeys(c.view, {}, 100, 2).empty());
}

}  // namespace
}  // namespace quarry

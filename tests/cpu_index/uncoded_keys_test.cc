// Keys that codes cannot tell: which are kept, what they score, and that searches find them.
#include "cpu_index/uncoded_keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>
#include <span>
#include <vector>

#include "cpu_index/key_codes.h"
#include "tests/cpu_index/cluster_case.h"

namespace quarry {
namespace {

using testing::ClusterHead;
using testing::ClusterRuns;
using testing::ErrorOf;
using testing::Exactly;
using testing::Search;
using testing::Within;

constexpr uint32_t kHeadDim = 128, kFirst = ClusterHead::kFirst;

TEST(UncodedKeysTest, KeepsTheKeysOfWhichMostIsLeftOutInTheOrderOfTheirPlaces) {
  const ClusterHead head(3 * UncodedKeys::kTokensForOne + 5, 64, 1, DType::kFp32);
  const ClusterRuns runs(head, {100, head.tokens});  // views alone
  const KvView& run = runs.views[1];
  const uint32_t n = run.tokens().size();
  std::vector<uint32_t> order(n);
  for (uint32_t place = 0; place < n; ++place) order[place] = n - 1 - place;
  std::vector<float> lost(n, 1.0f);
  lost[200] = 2;
  const UncodedKeys one(run, order, std::span(lost).first(UncodedKeys::kTokensForOne));
  EXPECT_THAT(one.places(), ::testing::ElementsAre(0u));  // of equal ones the first
  const UncodedKeys keys(run, order, lost);
  ASSERT_THAT(keys.places(), ::testing::ElementsAre(0u, 200u));
  std::vector<float> scores(2 * 2);
  keys.Score(head.Queries(3, 2), scores.data());
  for (uint32_t i = 0; i < 2; ++i) {
    for (uint32_t j = 0; j < 2; ++j) {
      const uint32_t token = 100 + order[keys.places()[j]];
      double product = 0;
      for (uint32_t d = 0; d < 64; ++d) {
        product += double{head.Asked(3 + i)[d]} *
                   LoadAsFloat(head.keys.data(), token * 64 + d, DType::kFp32);
      }
      EXPECT_NEAR(scores[i * 2 + j], product * head.scale, 0.01 * (1 + std::fabs(product * head.scale)));
    }
  }
}

// Keys in 32 of 128 directions, but for a few tokens far out at right angles to all of them, each
// sought by other queries, and by none of the sampled.
class SoughtOutsideTest : public ::testing::Test {
 protected:
  // None of them is among the keys, every third one, that a basis is made of.
  static constexpr std::array<uint32_t, 4> kTokens = {1501, 2999, 4321, 5773};

  SoughtOutsideTest() : head_(6000, kHeadDim, 2) {
    for (uint32_t m = 0; m < kTokens.size(); ++m) {
      const std::vector<float> mark = Outside(6);
      head_.SetKey(kTokens[m], mark);
      for (uint32_t i = m; i < ClusterHead::kAsked; i += kTokens.size()) {  // 20 nats for the token
        for (uint32_t d = 0; d < kHeadDim; ++d) {
          head_.asked[size_t{i} * kHeadDim + d] += mark[d] * 20 / (36 * head_.scale);
        }
      }
    }
  }
  std::vector<float> Outside(float length) {
    std::vector<float> mark(kHeadDim);
    std::normal_distribution<float> normal(0, 1);
    for (float& x : mark) x = normal(head_.random);
    for (int round = 0; round < 200; ++round) {  // they are not at right angles to one another
      for (size_t at = 0; at < head_.directions.size(); at += kHeadDim) {
        const std::span<const float> direction = std::span(head_.directions).subspan(at, kHeadDim);
        const float along = Product(mark, direction) / Product(direction, direction);
        for (uint32_t d = 0; d < kHeadDim; ++d) mark[d] -= along * direction[d];
      }
    }
    const float factor = length / std::sqrt(Product(mark, mark));
    for (float& x : mark) x *= factor;
    return mark;
  }
  static float Product(std::span<const float> a, std::span<const float> b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0f);
  }
  ClusterHead head_;
};

TEST_F(SoughtOutsideTest, EachTokenIsFoundInOneRunAndInMany) {
  for (const uint32_t count : {1u, 6u}) {
    ClusterRuns runs(head_, ClusterRuns::Even(head_, count));
    runs.Learn(head_.sampled, 1);
    runs.OpenAll(true);
    const std::vector<TokenRange> ranges(4, head_.all());
    for (uint32_t first = 0; first < ClusterHead::kAsked; first += 4) {
      const auto found = Search(runs, head_.Queries(first, 4), ranges, Within(0.05f));
      const auto exact = Exactly(runs, head_.Queries(first, 4), ranges);
      for (uint32_t i = 0; i < 4; ++i) EXPECT_LT(ErrorOf(found.o[i], exact.o[i]), 0.25);
    }
  }
}

TEST_F(SoughtOutsideTest, OnlyQueriesThatSeeTheTokenFindIt) {
  ClusterRuns runs(head_, {3000, head_.tokens});
  runs.Learn();
  runs.OpenAll(true);
  std::vector<TokenRange> ranges(4, head_.all());
  ranges[1] = {kFirst, kFirst + kTokens[1]};
  ranges[2] = {kFirst + kTokens[2], kFirst + kTokens[2] + 1};
  ranges[3] = {kFirst + kTokens[3] + 1, kFirst + head_.tokens};
  const auto found = Search(runs, head_.Queries(0, 4), ranges, Within(0.05f));
  const auto exact = Exactly(runs, head_.Queries(0, 4), ranges);
  for (uint32_t i = 0; i < 4; ++i) EXPECT_LT(ErrorOf(found.o[i], exact.o[i]), 0.25) << i;
}

}  // namespace
}  // namespace quarry

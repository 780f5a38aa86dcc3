#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "perf/retrieval/head_class.h"
#include "perf/retrieval/truth.h"
#include "tests/support/seed.h"

namespace quarry::perf {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

// Five tokens of weights 1, 2, 4, 2, 1, of which the first and the last are the window:
//   weight 1 2 4 2 1
//   value  (1,0) (0,1) (1,1) (0,0) (0,0)
// The rest weighs 8 and gives (4, 6) / 8; everything weighs 10 and gives (5, 6) / 10.
struct ByHand {
  std::vector<float> k, v = {1, 0, 0, 1, 1, 1, 0, 0, 0, 0};
  std::vector<float> q = {2, 0};
  QueryTruth truth;
  ByHand() {
    for (double weight : {1, 2, 4, 2, 1}) {
      k.push_back(static_cast<float>(std::log(weight)));
      k.push_back(7);
    }
    truth = ComputeTruth({k.data(), v.data(), 2}, q, 0.5, 5, {.first = 1, .last = 1});
  }
};

void ExpectNear(const std::vector<double>& got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-6);
}

TEST(RetrievalTruthTest, ExactAnswersAreThoseByHand) {
  const ByHand c;
  EXPECT_EQ(c.truth.rest, (TokenRange{1, 4}));
  ExpectNear(c.truth.window_o, {0.5, 0.0});
  ExpectNear(c.truth.rest_o, {0.5, 0.75});
  ExpectNear(c.truth.full_o, {0.5, 0.6});
  EXPECT_NEAR(c.truth.window_lse, std::log(2.0), 1e-6);
  EXPECT_NEAR(c.truth.rest_lse, std::log(8.0), 1e-6);
  ASSERT_EQ(c.truth.log_share.size(), 3u);
  EXPECT_NEAR(c.truth.log_share[1], std::log(0.5), 1e-6);
  EXPECT_EQ(c.truth.best, (std::vector<uint32_t>{2, 1, 3}));  // ties by token
}

TEST(RetrievalTruthTest, OneTokenIsJudgedAsByHand) {
  const ByHand c;
  const std::vector<uint32_t> attended = {2};
  const std::vector<float> o = {1, 1};
  const Quality q = Judge(c.truth, attended, o, std::log(4.0f));
  EXPECT_NEAR(q.recall_at_100, 1.0 / 3, 1e-9);
  EXPECT_NEAR(q.mass, 0.5, 1e-6);
  // (1, 1) for (0.5, 0.75).
  EXPECT_NEAR(q.partial_rel_l2, std::sqrt(0.3125 / 0.8125), 1e-6);
  // Merged with the window: (1 + 4, 4) / 6 for (0.5, 0.6).
  EXPECT_NEAR(q.rel_l2, std::hypot(5.0 / 6 - 0.5, 4.0 / 6 - 0.6) / std::hypot(0.5, 0.6), 1e-6);
  EXPECT_EQ(q.heavy, 3u);
  EXPECT_EQ(q.heavy_missed, 2u);
}

TEST(RetrievalTruthTest, HeavyTokensAreThoseWithA64thOfTheMass) {
  // The window's token and 99 others weigh 1 each, token 7 weighs 2: a 51st of all.
  const uint32_t tokens = 101;
  std::vector<float> k(tokens, 0), v(tokens, 1), q = {1};
  k[7] = std::log(2.0f);
  const QueryTruth truth = ComputeTruth({k.data(), v.data(), 1}, q, 1, tokens, {1, 0});
  for (const auto& [attended, missed] :
       {std::pair{std::vector<uint32_t>{3, 7, 50}, 0u}, {std::vector<uint32_t>{3, 50}, 1u}}) {
    const Quality quality = Judge(truth, attended, std::vector<float>{1}, 0);
    EXPECT_EQ(quality.heavy, 1u);
    EXPECT_EQ(quality.heavy_missed, missed);
    EXPECT_NEAR(quality.missed_share, (1.0 + missed) / 102, 1e-6);
  }
  // A window of all but the mass takes their heaviness.
  k[0] = std::log(1000.0f);
  EXPECT_EQ(Judge(ComputeTruth({k.data(), v.data(), 1}, q, 1, tokens, {1, 0}), {},
                  std::vector<float>{1}, 0)
                .heavy,
            0u);
}

TEST(RetrievalTruthTest, EverythingAttendedHasNoErrorAndNothingTheWindows) {
  const ByHand c;
  const std::vector<uint32_t> all = {3, 1, 2};
  const Quality exact = Judge(c.truth, all, std::vector<float>{0.5f, 0.75f}, std::log(8.0f));
  EXPECT_NEAR(exact.recall_at_100, 1, 1e-9);
  EXPECT_NEAR(exact.mass, 1, 1e-6);
  EXPECT_NEAR(exact.rel_l2, 0, 1e-6);
  EXPECT_NEAR(exact.partial_rel_l2, 0, 1e-6);
  const Quality none =
      Judge(c.truth, {}, std::vector<float>{0, 0}, -std::numeric_limits<float>::infinity());
  EXPECT_EQ(none.recall_at_100, 0);
  EXPECT_EQ(none.mass, 0);
  EXPECT_NEAR(none.partial_rel_l2, 1, 1e-9);
  EXPECT_NEAR(none.rel_l2, 0.6 / std::hypot(0.5, 0.6), 1e-6);  // (0.5, 0) for (0.5, 0.6)
}

TEST(RetrievalTruthTest, OracleNeedsAsManyTokensAsByHand) {
  const ByHand c;
  // No token: 0.6 / 0.781 = 0.768. The best: 0.435. Two: (5, 6) / 8 for (5, 6) / 10 is 0.25 off;
  // the third has no value, but takes its weight: no error.
  EXPECT_EQ(OracleTokens(c.truth, 0.8), 0u);
  EXPECT_EQ(OracleTokens(c.truth, 0.5), 1u);
  EXPECT_EQ(OracleTokens(c.truth, 0.26), 2u);
  EXPECT_EQ(OracleTokens(c.truth, 0.24), 3u);
  EXPECT_EQ(OracleTokens(c.truth, 0.0), 3u);  // as well as it can
  const Quality two = OracleQuality(c.truth, 2);
  EXPECT_NEAR(two.rel_l2, 0.25, 1e-6);
  EXPECT_NEAR(two.mass, 0.75, 1e-6);
  EXPECT_NEAR(two.recall_at_100, 2.0 / 3, 1e-9);
  EXPECT_EQ(two.heavy, 3u);
  EXPECT_EQ(two.heavy_missed, 1u);
  EXPECT_NEAR(two.missed_share, 0.2, 1e-6);
  EXPECT_NEAR(two.partial_rel_l2, std::hypot(4.0 / 6 - 0.5, 1 - 0.75) / std::hypot(0.5, 0.75),
              1e-6);
}

TEST(RetrievalTruthTest, AContextWithinItsWindowHasNothingToRetrieve) {
  const ByHand c;
  const QueryTruth truth =
      ComputeTruth({c.k.data(), c.v.data(), 2}, c.q, 0.5, 4, {.first = 2, .last = 2});
  EXPECT_TRUE(truth.rest.empty());
  EXPECT_EQ(truth.rest_lse, kNothing);
  const Quality q =
      Judge(truth, {}, std::vector<float>{0, 0}, -std::numeric_limits<float>::infinity());
  EXPECT_EQ(q.rel_l2, 0);
  EXPECT_EQ(q.mass, 1);
  EXPECT_EQ(q.recall_at_100, 1);
  EXPECT_EQ(OracleTokens(truth, 0.0), 0u);
}

TEST(RetrievalTruthTest, OracleOverManyTokensMeetsEveryError) {
  std::mt19937 random(Seed());
  std::normal_distribution<float> normal;
  constexpr uint32_t kTokens = 3000, kDim = 16;
  std::vector<float> k(kTokens * kDim), v(kTokens * kDim), q(kDim);
  for (std::vector<float>* x : {&k, &v, &q}) {
    for (float& f : *x) f = normal(random);
  }
  const QueryTruth truth =
      ComputeTruth({k.data(), v.data(), kDim}, q, 0.25, kTokens, {.first = 10, .last = 10});
  uint32_t before = 0;
  for (double error : {0.5, 0.1, 0.02, 0.005}) {
    const uint32_t tokens = OracleTokens(truth, error);
    EXPECT_GE(tokens, before);
    EXPECT_LE(OracleQuality(truth, tokens).rel_l2, error);
    before = tokens;
  }
  EXPECT_GT(before, 100u);
}

TEST(RetrievalTruthTest, TokensForMassAreTheFewest) {
  std::vector<float> weights = {1, 5, 2, 2};
  EXPECT_EQ(TokensForMass(weights, 0.5), 1u);
  EXPECT_EQ(TokensForMass(weights, 0.7), 2u);
  EXPECT_EQ(TokensForMass(weights, 0.71), 3u);
  EXPECT_EQ(TokensForMass(weights, 1.0), 4u);
  EXPECT_EQ(TokensForMass({}, 0.9), 0u);
}

TEST(RetrievalTruthTest, ClassesLieBetweenTheirThresholds) {
  EXPECT_EQ(ClassOf(128, 100000), HeadClass::kSharp);
  EXPECT_EQ(ClassOf(129, 100000), HeadClass::kMedium);
  EXPECT_EQ(ClassOf(4096, 100000), HeadClass::kMedium);
  EXPECT_EQ(ClassOf(4097, 100000), HeadClass::kDiffuse);
  EXPECT_EQ(ClassOf(501, 4000), HeadClass::kDiffuse);  // an eighth of few tokens
}

}  // namespace
}  // namespace quarry::perf

// Cuts are found from histograms; here they are compared with sums over every token.
#include "cpu_index/error_cut.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kAll = std::numeric_limits<float>::infinity();
constexpr float kBin = 0.125f;
// Half a bin, either way, and what floats round.
constexpr double kTrue = 1.07;

std::vector<float> RandomScores(size_t n, float spread, std::mt19937* random) {
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> out(n);
  for (float& x : out) x = (*random)() % 9 == 0 ? kNone : 3 + normal(*random);
  return out;
}

struct CutCase : ErrorCutInput {
  std::vector<float> scores;
};

size_t CountFrom(const std::vector<float>& scores, float least) {
  return static_cast<size_t>(std::count_if(scores.begin(), scores.end(),
                                           [=](float x) { return x != kNone && x >= least; }));
}

// What is left where tokens from `refine` on are read by their rows, and from `exact` on exactly.
double ErrorLeft(const CutCase& in, float refine, float exact) {
  double squares = 0, common = in.closed;
  for (const float score : in.scores) {
    const double weight = in.token_doubt * std::exp(double{score} - in.tokens.top);
    if (score >= exact) continue;
    const double part = score >= refine ? in.refined_part : 1;
    squares += part * part * weight * weight;
    if (score < refine) common += in.common_part * weight;
  }
  return std::sqrt(squares + common * common);
}

// How much heavier than what is just refined a token is that is read exactly: a byte of either
// takes as much of the squared error away.
double ExactAbove(const CutCase& in) { return std::log(2 / in.refined_part); }

CutCase Input(const std::vector<float>& scores, float allowed) {
  CutCase in;
  in.scores = scores;
  in.tokens = ScoreHistogram::Of(scores);
  in.token_doubt = 1.3f;
  in.common_part = 0.08f;
  in.refined_part = 0.2f;
  in.allowed = allowed;
  return in;
}

// Sums from which all parts were taken again are 0 but for what doubles round, of which this is the
// root.
double Rounding(const CutCase& in) { return 1e-6 * ErrorLeft(in, kAll, kAll); }

// The sum of all weights, by e^top.
float MassOf(const CutCase& in) {
  double mass = 0;
  for (const float x : in.scores) mass += std::exp(double{x} - in.tokens.top);
  return static_cast<float>(mass);
}

void ExpectRightCut(const CutCase& in, const std::vector<float>& scores) {
  const ErrorCut cut = FindErrorCut(in);
  const double allowed = std::max<double>(in.allowed, 1.4 * in.closed);
  ASSERT_GE(cut.exact, cut.refine);
  const double left = ErrorLeft(in, cut.refine, cut.exact);
  ASSERT_LE(left, kTrue * cut.error + Rounding(in));
  ASSERT_GE(left, cut.error / kTrue - Rounding(in));
  ASSERT_LE(cut.error, allowed * 1.0001);
  if (cut.refine == kAll) return;
  // With an eighth of a nat less, it would not be within what is allowed.
  const auto exact = static_cast<float>(cut.refine + 2 * kBin + ExactAbove(in));
  EXPECT_GT(ErrorLeft(in, cut.refine + 2 * kBin, exact), allowed / kTrue);
  EXPECT_GT(CountFrom(scores, cut.refine), 0u);
}

// How many scores are in the first bins, at the edges of all bins.
std::vector<uint32_t> Summed(const ScoreHistogram& scores) {
  std::vector<uint32_t> out;
  for (const uint32_t n : scores.count) out.push_back(n + (out.empty() ? 0 : out.back()));
  return out;
}

TEST(ScoreHistogramTest, CountsScoresByEighthsBelowATop) {
  const std::vector<float> scores = {2.3f, 1.0f, 0.99f, -40.0f, kNone, 2.26f};
  const ScoreHistogram histogram = ScoreHistogram::Of(scores);
  EXPECT_EQ(histogram.top, 2.375f);
  EXPECT_EQ(histogram.count[0], 2u);
  EXPECT_EQ(histogram.count[11], 2u);
  EXPECT_EQ(histogram.count.back(), 2u);
  EXPECT_EQ(Summed(histogram).back(), 6u);
}

TEST(ScoreHistogramTest, PartsAddUpToTheWhole) {
  std::mt19937 random(static_cast<uint32_t>(Seed()));
  for (const float spread : {0.4f, 5.0f, 30.0f}) {
    const std::vector<float> scores = RandomScores(3000, spread, &random);
    const ScoreHistogram whole = ScoreHistogram::Of(scores);
    ScoreHistogram sum;
    size_t lo = 0;
    for (const size_t hi : {0u, 1u, 700u, 701u, 2900u, 3000u}) {
      sum.Add(ScoreHistogram::Of(std::span(scores).subspan(lo, hi - lo)));
      lo = hi;
    }
    EXPECT_EQ(sum.top, whole.top);
    const std::vector<uint32_t> parts = Summed(sum), all = Summed(whole);
    EXPECT_EQ(parts.back(), all.back());
    for (int b = 1; b < ScoreHistogram::kBins - 1; ++b) {  // but for what is rounded across an edge
      EXPECT_LE(parts[b - 1], all[b]);
      EXPECT_GE(parts[b], all[b - 1]);
    }
  }
}

TEST(ErrorCutTest, TheFirstTokensAreReadUntilTheErrorIsAllowed) {
  std::mt19937 random(static_cast<uint32_t>(Seed()));
  for (const size_t n : {1u, 3u, 40u, 1000u, 30000u}) {
    for (const float spread : {0.3f, 1.5f, 4.0f}) {
      std::vector<float> scores = RandomScores(n, spread, &random);
      scores[0] = 4;
      for (const float tolerance : {0.003f, 0.02f, 0.1f, 0.5f}) {
        for (const float closed : {0.0f, 0.5f, 3.0f}) {
          SCOPED_TRACE(::testing::Message() << n << " tokens of spread " << spread << ", tolerated "
                                            << tolerance << ", closed " << closed);
          CutCase in = Input(scores, 0);
          in.allowed = tolerance * MassOf(in);
          in.closed = closed * in.allowed;
          ExpectRightCut(in, scores);
        }
      }
    }
  }
}

TEST(ErrorCutTest, ATopThatIsNotTheLargestScoreIsNearEnough) {
  std::mt19937 random(static_cast<uint32_t>(Seed()));
  const std::vector<float> scores = RandomScores(5000, 2, &random);
  for (const float above : {0.3f, 2.0f, 6.0f}) {
    CutCase in = Input(scores, 0);
    ScoreHistogram higher;
    higher.top = std::ceil(in.tokens.top + above);
    in.tokens.Add(higher);
    in.allowed = 0.03f * MassOf(in);
    ExpectRightCut(in, scores);
  }
}

TEST(ErrorCutTest, NoMoreTokensAreReadThanTheCap) {
  std::mt19937 random(static_cast<uint32_t>(Seed()));
  for (const float spread : {0.5f, 3.0f}) {
    const std::vector<float> scores = RandomScores(4000, spread, &random);
    for (const uint32_t most : {0u, 1u, 10u, 300u, 2000u, 100000u}) {
      for (const float tolerance : {0.002f, 0.02f}) {
        CutCase in = Input(scores, 0);
        in.allowed = tolerance * MassOf(in);
        const ErrorCut free = FindErrorCut(in);
        in.most_tokens = most;
        const ErrorCut cut = FindErrorCut(in);
        ASSERT_LE(CountFrom(scores, cut.refine), most);
        const double left = ErrorLeft(in, cut.refine, cut.exact);
        EXPECT_LE(left, kTrue * cut.error + Rounding(in));
        EXPECT_GE(left, cut.error / kTrue - Rounding(in));
        if (CountFrom(scores, free.refine) <= most) {
          EXPECT_EQ(cut.refine, free.refine);
          EXPECT_EQ(cut.exact, free.exact);
          continue;
        }
        // As many as it lets, and if that is not enough, all of them exactly.
        EXPECT_GT(CountFrom(scores, std::min(in.tokens.top, cut.refine) - 1.01f * kBin), most);
        EXPECT_TRUE(cut.error <= in.allowed || cut.exact == cut.refine);
      }
    }
  }
}

TEST(ErrorCutTest, TheBestAreReadExactlyWhateverIsAllowed) {
  std::mt19937 random(static_cast<uint32_t>(Seed()));
  const std::vector<float> scores = RandomScores(4000, 2, &random);
  CutCase in = Input(scores, 0);
  in.allowed = 10 * MassOf(in);
  EXPECT_EQ(FindErrorCut(in).exact, kAll);
  for (const uint32_t most : {0u, 5u, 64u, 100000u}) {
    for (const float below : {0.5f, 3.0f}) {
      for (const float tolerance : {0.002f, 0.03f, 10.0f}) {
        in.allowed = tolerance * MassOf(in);
        in.surely_from = in.tokens.top - below;
        in.surely_most = most;
        const ErrorCut cut = FindErrorCut(in);
        // To a bin, and as far as all of a bin are few enough.
        const size_t wanted = CountFrom(scores, in.surely_from + kBin);
        if (wanted <= most) {
          EXPECT_GE(CountFrom(scores, cut.exact), wanted);
        }
        EXPECT_LE(cut.refine, cut.exact);
        const double left = ErrorLeft(in, cut.refine, cut.exact);
        EXPECT_LE(left, kTrue * cut.error + Rounding(in));
        EXPECT_GE(left, cut.error / kTrue - Rounding(in));
        EXPECT_LE(cut.error, in.allowed * 1.0001);
        if (tolerance == 10) {
          EXPECT_LE(CountFrom(scores, cut.refine), most);
          EXPECT_EQ(cut.refine, cut.exact);
        }
      }
    }
  }
}

TEST(ErrorCutTest, NothingAllowedReadsEverythingExactly) {
  std::mt19937 random(static_cast<uint32_t>(Seed()));
  const std::vector<float> scores = RandomScores(3000, 1.5f, &random);
  const CutCase in = Input(scores, 0);
  const ErrorCut cut = FindErrorCut(in);
  EXPECT_EQ(CountFrom(scores, cut.exact), CountFrom(scores, std::numeric_limits<float>::lowest()));
  EXPECT_LE(cut.refine, cut.exact);
  EXPECT_LT(cut.error, Rounding(in));
}

TEST(ErrorCutTest, WithoutTokensNothingIsReadAndGroupsMakeTheError) {
  for (const std::vector<float>& scores : {std::vector<float>{}, std::vector<float>(70, kNone)}) {
    for (const float allowed : {0.0f, 0.1f}) {
      CutCase in = Input(scores, allowed);
      in.tokens.top = 1;  // of groups
      in.closed = 0.25f;
      const ErrorCut cut = FindErrorCut(in);
      EXPECT_EQ(cut.refine, kAll);
      EXPECT_EQ(cut.exact, kAll);
      EXPECT_FLOAT_EQ(cut.error, 0.25f);
    }
  }
}

TEST(ErrorCutTest, AllTokensAlikeAreReadTogetherOrNotAtAll) {
  const std::vector<float> scores(500, 2.0f);
  CutCase in = Input(scores, 1000);
  EXPECT_EQ(FindErrorCut(in).refine, kAll);
  in.allowed = 1;
  EXPECT_LE(FindErrorCut(in).refine, 2.0f);
  in.most_tokens = 499;
  EXPECT_EQ(FindErrorCut(in).refine, kAll);
}

double MassBelow(const std::vector<float>& weights, double least) {
  double mass = 0;
  for (const float x : weights) mass += x < least ? std::exp(double{x}) : 0;
  return mass;
}

TEST(ShareTokensTest, TheBestOfAllSearchesAreReadAndNoMoreThanTheCap) {
  const ScoreHistogram wanted[] = {ScoreHistogram::Of(std::vector<float>{9.0f, 7.0f, 5.0f, 1.0f}),
                                   ScoreHistogram::Of(std::vector<float>{8.0f, 6.0f, 2.0f}),
                                   ScoreHistogram{}};
  using Shares = std::vector<uint32_t>;
  EXPECT_EQ(ShareTokens(wanted, 0), (Shares{0, 0, 0}));
  EXPECT_EQ(ShareTokens(wanted, 1), (Shares{1, 0, 0}));
  EXPECT_EQ(ShareTokens(wanted, 4), (Shares{2, 2, 0}));
  EXPECT_EQ(ShareTokens(wanted, 5), (Shares{3, 2, 0}));
  EXPECT_EQ(ShareTokens(wanted, ~0u), (Shares{4, 3, 0}));
  // Equal ones are read together or not at all.
  const ScoreHistogram alike[] = {ScoreHistogram::Of(std::vector<float>{3.0f, 3.0f, 1.0f}),
                                  ScoreHistogram::Of(std::vector<float>{4.0f, 3.0f})};
  EXPECT_EQ(ShareTokens(alike, 3), (Shares{0, 1}));
  EXPECT_EQ(ShareTokens(alike, 4), (Shares{2, 2}));
}

TEST(OpenFromTest, WhatStaysClosedWeighsWhatIsAllowedAndHardlyLess) {
  std::mt19937 random(static_cast<uint32_t>(Seed()));
  for (const size_t n : {1u, 20u, 3000u}) {
    for (const float spread : {0.2f, 2.0f, 5.0f}) {
      const std::vector<float> weights = RandomScores(n, spread, &random);
      for (const float share : {1e-4f, 0.01f, 0.3f, 0.9f, 2.0f}) {
        const double most = share * MassBelow(weights, kAll);
        if (most == 0) continue;
        const auto allowed = static_cast<float>(std::log(most));
        const float least = OpenFrom(ScoreHistogram::Of(weights), allowed);
        EXPECT_LE(MassBelow(weights, least), kTrue * most + 1e-6 * std::exp(double{allowed}));
        EXPECT_TRUE(least == kAll ||
                    MassBelow(weights, double{least} + 1.01 * kBin) > most / kTrue);
        EXPECT_EQ(least == kAll, share > 1);
      }
    }
  }
}

TEST(OpenFromTest, WithoutWeightsNothingIsOpened) {
  EXPECT_EQ(OpenFrom({}, 1), kAll);
  EXPECT_EQ(OpenFrom(ScoreHistogram::Of(std::vector<float>(40, kNone)), 1), kAll);
}

TEST(OpenFromTest, WhatIsFarAboveIsOpenedAlone) {
  const std::vector<float> weights = {90, -3, 0, -2, 120};
  const float least = OpenFrom(ScoreHistogram::Of(weights), 1);
  EXPECT_GT(least, 0);
  EXPECT_LE(least, 90);
}

}  // namespace
}  // namespace quarry

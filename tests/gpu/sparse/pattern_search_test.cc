// The search finds what heads were made to do.
#include "gpu/sparse/pattern_search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <vector>

#include "tests/gpu/sparse/sparse_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::SparseCase;

constexpr uint32_t kRows = 4096, kDim = 128, kPairs = 48, kContent = 2 * kPairs;

// A layer of four heads with keys of their own, each of which attends in one way. Most dimensions
// turn with the position as rotary ones do, so that a query can look at a distance; the others hold
// what keys are.
class PlantedHeads : public ::testing::Test {
 protected:
  PlantedHeads() : case_({DType::kFp32, 4, 4, kDim, 0, kRows}, &random_) {
    for (double& w : speed_) {
      w = std::uniform_real_distribution<double>(0.3, std::numbers::pi)(random_);
    }
    for (uint32_t h = 0; h < 4; ++h) {
      for (uint32_t j = 0; j < kRows; ++j) {
        for (uint32_t i = 0; i < kPairs; ++i) {
          case_.SetKey(h, j, 2 * i, static_cast<float>(std::cos(speed_[i] * j)));
          case_.SetKey(h, j, 2 * i + 1, static_cast<float>(std::sin(speed_[i] * j)));
        }
        for (uint32_t i = kContent; i < kDim; ++i) case_.SetKey(h, j, i, 0);
        std::fill_n(case_.Query(j, h), kDim, 0.0f);
      }
    }
    PlantWindow(0);
    PlantSlashes(1);
    PlantColumns(2);
    PlantBlocks(3);
  }

  void LookBack(uint32_t head, uint32_t row, double distance, double score) {
    const double size = score * std::sqrt(double{kDim}) / kPairs;
    for (uint32_t i = 0; i < kPairs; ++i) {
      const double at = speed_[i] * (row - distance);
      case_.Query(row, head)[2 * i] += static_cast<float>(size * std::cos(at));
      case_.Query(row, head)[2 * i + 1] += static_cast<float>(size * std::sin(at));
    }
  }
  // Every row looks at some of the 400 tokens before it, the last queries at the nearest alone:
  // they do not tell what the others need.
  void PlantWindow(uint32_t head) {
    for (uint32_t row = 0; row < kRows; ++row) {
      const uint32_t window = row + kLastQueries >= kRows ? 20 : 400;
      for (int n = 0; n < 3; ++n) LookBack(head, row, static_cast<double>(random_() % window), 16);
    }
  }
  void PlantSlashes(uint32_t head) {
    for (uint32_t row = 0; row < kRows; ++row) {
      for (const double distance : {1450.0, 2600.0}) LookBack(head, row, distance, 16);
    }
  }
  // 400 keys anywhere that all rows attend.
  void PlantColumns(uint32_t head) {
    const double size = std::sqrt(14 * std::sqrt(double{kDim}));
    for (uint32_t n = 0; n < 400; ++n) {
      case_.SetKey(head, static_cast<uint32_t>(random_() % kRows), kContent,
                   static_cast<float>(size));
    }
    for (uint32_t row = 0; row < kRows; ++row) {
      case_.Query(row, head)[kContent] = static_cast<float>(size);
    }
  }
  // Each block of keys is about one of 16 things, and so is each 128 rows.
  void PlantBlocks(uint32_t head) {
    const double size = std::sqrt(14 * std::sqrt(double{kDim}));
    std::vector<uint32_t> things;
    for (uint32_t b = 0; b < kRows / 64; ++b) things.push_back(b % 16);
    std::shuffle(things.begin(), things.end(), random_);
    for (uint32_t b = 0; b < kRows / 64; ++b) {
      const uint32_t thing = things[b];
      for (uint32_t j = b * 64; j < (b + 1) * 64; ++j) {
        case_.SetKey(head, j, kContent + thing, static_cast<float>(size));
      }
    }
    for (uint32_t t = 0; t < kRows / 128; ++t) {
      const auto thing = static_cast<uint32_t>(random_() % 16);
      for (uint32_t row = t * 128; row < (t + 1) * 128; ++row) {
        case_.Query(row, head)[kContent + thing] = static_cast<float>(size);
      }
    }
  }

  std::vector<SearchedHead> Search(const PatternSearchOptions& options) {
    tokens_.clear();
    for (uint32_t row = 1000 + static_cast<uint32_t>(random_() % 40); row < kRows; row += 37) {
      tokens_.push_back(row);
    }
    const std::vector<Pattern> candidates = PatternCandidates();
    return SearchPatterns({case_.layer(), {0, kRows}, case_.q().data(), tokens_}, candidates,
                          options, &team_);
  }

  std::mt19937_64 random_{SteadySeed()};
  ThreadTeam team_{2};
  double speed_[kPairs];
  SparseCase case_;
  std::vector<uint32_t> tokens_;
};

TEST_F(PlantedHeads, AreFoundAtEqualCost) {
  const double share = 0.3;
  const std::vector<SearchedHead> found = Search({share, std::numeric_limits<double>::infinity()});
  ASSERT_EQ(found.size(), 4u);
  for (uint32_t h = 0; h < 4; ++h) {
    ASSERT_FALSE(found[h].candidates.empty());
    double best = 1e9;
    for (const SearchedCandidate& c : found[h].candidates) {
      EXPECT_LE(c.tiles_share, share) << PatternText(c.pattern);
      best = std::min(best, c.error);
    }
    EXPECT_EQ(found[h].best.error, best);
    EXPECT_LE(found[h].best.error, 0.4) << h << " " << PatternText(found[h].best.pattern);
  }
  EXPECT_EQ(PatternName(found[0].best.pattern), "a_shape") << PatternText(found[0].best.pattern);
  EXPECT_EQ(PatternName(found[1].best.pattern), "vertical_slash");
  EXPECT_EQ(PatternName(found[2].best.pattern), "vertical_slash");
  EXPECT_EQ(PatternName(found[3].best.pattern).substr(0, 5), "block")
      << PatternText(found[3].best.pattern);
  const auto* columns = std::get_if<VerticalSlashPattern>(&found[2].best.pattern);
  ASSERT_NE(columns, nullptr);
  EXPECT_GT(columns->columns, columns->slashes);
}

TEST_F(PlantedHeads, ThatErrTooMuchStayDense) {
  for (const SearchedHead& head : Search({0.06, 1e-9})) {
    EXPECT_TRUE(IsDense(head.best.pattern));
    EXPECT_EQ(head.best.tiles_share, 1);
  }
}

TEST(PatternSearchTest, StepsNeverCostLess) {
  std::mt19937_64 random(SteadySeed());
  ThreadTeam team(2);
  const SparseCase c({DType::kFp32, 1, 1, 64, 100, 1500}, &random);
  for (const Pattern& candidate : PatternCandidates()) {
    uint64_t before = 0;
    for (uint32_t step = 1; step <= kMostStep; step *= 2) {
      const std::vector<HeadPattern> patterns = {{Adjusted(candidate, step, c.tokens())}};
      EXPECT_TRUE(ValidatePattern(patterns[0].pattern).ok());
      const auto plans =
          PlanHeads({c.layer(), c.prefill(), patterns, c.last_q(), DenseFallback::kNever}, &team);
      const uint64_t cost =
          BuildIndex(plans, {c.layer(), 100, 1500, c.q().data(), DenseFallback::kNever}, &team)
              .Cost();
      EXPECT_GE(cost, before) << PatternText(patterns[0].pattern);
      before = cost;
    }
  }
}

TEST(PatternSearchTest, OptionsAreChecked) {
  EXPECT_TRUE(ValidatePatternSearch({}).ok());
  EXPECT_FALSE(ValidatePatternSearch({0, 1}).ok());
  EXPECT_FALSE(ValidatePatternSearch({1.1, 1}).ok());
  EXPECT_FALSE(ValidatePatternSearch({0.5, -1}).ok());
  EXPECT_FALSE(ValidatePatternSearch({0.5, std::nan("")}).ok());
}

}  // namespace
}  // namespace quarry

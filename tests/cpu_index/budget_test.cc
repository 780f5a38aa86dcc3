#include "cpu_index/budget.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <vector>

namespace quarry {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

uint32_t Seed() {
  static const uint32_t seed = std::random_device{}();
  return seed;
}

Budget FixedK(uint32_t k) { return {Budget::Kind::kFixedK, k, 1.0f}; }
Budget TopP(float mass, uint32_t cap = 0) { return {Budget::Kind::kTopP, cap, mass}; }

// Scores of one query, cut into runs of `run_nodes` nodes; row 1 of two, so that a wrong row shows.
struct Cut {
  std::vector<CoarseScores> coarse;
  std::vector<RunScores> runs;
  std::vector<RunShare> shares;

  Cut(const std::vector<float>& score, const std::vector<uint32_t>& weight, size_t run_nodes) {
    for (size_t lo = 0; lo < score.size(); lo += run_nodes) {
      const size_t n = std::min(run_nodes, score.size() - lo);
      CoarseScores c;
      c.nodes = static_cast<uint32_t>(n);
      c.tokens = {static_cast<uint32_t>(lo), static_cast<uint32_t>(lo + n)};
      c.score.assign(n, 1e9f);
      c.score.insert(c.score.end(), score.begin() + lo, score.begin() + lo + n);
      for (uint32_t i = 0; i < n && !weight.empty(); ++i) {
        c.stretches.push_back({i + 1, weight[lo + i]});
      }
      coarse.push_back(std::move(c));
    }
    for (const CoarseScores& c : coarse) runs.push_back({&c, 1});
    shares.resize(runs.size());
  }

  // The same as lists of the nodes that are not masked.
  void MakeLists() {
    for (CoarseScores& c : coarse) {
      const CoarseScores dense = c;
      c.score.clear();
      c.first = {0};
      for (uint32_t row = 0; row < 2; ++row) {
        for (uint32_t i = 0; i < dense.nodes; ++i) {
          if (dense.Row(row)[i] == kMasked) continue;
          c.score.push_back(dense.Row(row)[i]);
          c.node.push_back(i);
        }
        c.first.push_back(static_cast<uint32_t>(c.score.size()));
      }
    }
  }

  // What a run takes, as KeyIndex::Refine does: above the threshold, and the first ties.
  std::set<uint32_t> Selected() const {
    std::set<uint32_t> out;
    for (size_t r = 0; r < runs.size(); ++r) {
      uint32_t ties = shares[r].ties;
      const std::span<const float> row = coarse[r].Row(1);
      for (uint32_t i = 0; i < row.size(); ++i) {
        const float s = row[i];
        if (s > shares[r].threshold || (s == shares[r].threshold && ties > 0 && ties-- > 0)) {
          out.insert(coarse[r].tokens.lo + coarse[r].NodeOf(1, i));
        }
      }
    }
    return out;
  }
};

struct Best {
  std::set<uint32_t> nodes;
  double captured = 1;
};

// By a full sort: highest score first, lowest token first among equals.
Best BruteForce(const std::vector<float>& score, const std::vector<uint32_t>& weight,
                const Budget& budget) {
  std::vector<uint32_t> order;
  for (uint32_t i = 0; i < score.size(); ++i) {
    if (score[i] != kMasked) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return score[a] > score[b]; });
  const auto weight_of = [&](uint32_t i) { return weight.empty() ? 1u : weight[i]; };
  const auto mass_of = [&](uint32_t i) {
    return weight_of(i) * std::exp(double{score[i]} - score[order[0]]);
  };
  double total = 0, mass = 0;
  for (uint32_t i : order) total += mass_of(i);
  Best best;
  uint64_t tokens = 0;
  for (uint32_t i : order) {
    const bool capped = budget.kind == Budget::Kind::kFixedK || budget.k > 0;
    if (budget.kind != Budget::Kind::kUnlimited && capped && tokens >= budget.k) break;
    if (budget.kind == Budget::Kind::kTopP && budget.mass < 1 && mass >= budget.mass * total) break;
    best.nodes.insert(i);
    tokens += weight_of(i);
    mass += mass_of(i);
  }
  if (!order.empty()) best.captured = mass / total;
  return best;
}

// Scores of whole and half numbers tie often; every seventh token is outside the range.
std::vector<float> RandomScores(size_t n, float spread, bool with_ties, std::mt19937* random) {
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> out(n);
  for (float& s : out) {
    s = normal(*random);
    if (with_ties) s = std::round(s * 2) / 2;
    if ((*random)() % 7 == 0) s = kMasked;
  }
  return out;
}

TEST(BudgetTest, EqualsAFullSortHoweverTheRunsAreCut) {
  SCOPED_TRACE(::testing::Message() << "seed " << Seed());
  std::mt19937 random(Seed());
  for (float spread : {0.2f, 2.0f, 20.0f}) {
    for (bool with_ties : {false, true}) {
      for (size_t n : {1u, 2u, 17u, 1024u}) {
        const std::vector<float> score = RandomScores(n, spread, with_ties, &random);
        for (const Budget& budget :
             {Budget{}, FixedK(1), FixedK(7), FixedK(100), FixedK(100000), TopP(0.1f), TopP(0.5f),
              TopP(0.9f), TopP(0.99f), TopP(1.0f), TopP(0.9f, 5), TopP(1.0f, 50)}) {
          const Best best = BruteForce(score, {}, budget);
          for (size_t run_nodes : {n, (n + 15) / 16, (n + 127) / 128}) {
            Cut cut(score, {}, run_nodes);
            const double captured = AllocateBudget(budget, cut.runs, cut.shares);
            EXPECT_NEAR(captured, best.captured, 1e-5);
            const std::set<uint32_t> got = cut.Selected();
            // A mass that lands on the sought one within rounding may take one token more or less.
            if (budget.kind == Budget::Kind::kTopP && budget.mass < 1 && got != best.nodes) {
              ASSERT_LE(
                  std::max(got.size(), best.nodes.size()) - std::min(got.size(), best.nodes.size()),
                  1u);
              ASSERT_TRUE(
                  std::includes(got.begin(), got.end(), best.nodes.begin(), best.nodes.end()) ||
                  std::includes(best.nodes.begin(), best.nodes.end(), got.begin(), got.end()));
            } else {
              ASSERT_EQ(got, best.nodes) << n << " nodes in runs of " << run_nodes << ", kind "
                                         << static_cast<int>(budget.kind) << ", k " << budget.k
                                         << ", mass " << budget.mass;
            }
          }
        }
      }
    }
  }
}

TEST(BudgetTest, GroupsOfTokensAreTakenWholeUntilTheirTokensReachTheBudget) {
  SCOPED_TRACE(::testing::Message() << "seed " << Seed());
  std::mt19937 random(Seed() + 1);
  for (int round = 0; round < 20; ++round) {
    const std::vector<float> score = RandomScores(300, 3.0f, false, &random);
    std::vector<uint32_t> weight(score.size());
    for (uint32_t& w : weight) w = 1 + random() % 32;
    for (const Budget& budget : {FixedK(1), FixedK(64), FixedK(1000), FixedK(100000)}) {
      const Best best = BruteForce(score, weight, budget);
      for (size_t run_nodes : {300u, 20u, 3u}) {
        Cut cut(score, weight, run_nodes);
        EXPECT_NEAR(AllocateBudget(budget, cut.runs, cut.shares), best.captured, 1e-5);
        ASSERT_EQ(cut.Selected(), best.nodes) << "k " << budget.k;
      }
    }
  }
}

TEST(BudgetTest, ListsOfTheTokensInRangeShareOutLikeAllTokens) {
  SCOPED_TRACE(::testing::Message() << "seed " << Seed());
  std::mt19937 random(Seed() + 3);
  const std::vector<float> score = RandomScores(700, 2.0f, true, &random);
  for (const Budget& budget : {Budget{}, FixedK(1), FixedK(64), FixedK(100000), TopP(0.9f)}) {
    for (size_t run_nodes : {700u, 50u, 3u}) {
      Cut dense(score, {}, run_nodes), lists(score, {}, run_nodes);
      lists.MakeLists();
      const double captured = AllocateBudget(budget, dense.runs, dense.shares);
      EXPECT_EQ(AllocateBudget(budget, lists.runs, lists.shares), captured);
      ASSERT_EQ(lists.Selected(), dense.Selected()) << "runs of " << run_nodes;
    }
  }
}

TEST(BudgetTest, AllTokensAlikeGoToTheLowestTokensFirst) {
  const std::vector<float> score(1000, 0.125f);
  for (size_t run_nodes : {1000u, 63u, 8u}) {
    Cut cut(score, {}, run_nodes);
    EXPECT_NEAR(AllocateBudget(FixedK(100), cut.runs, cut.shares), 0.1, 1e-6);
    std::set<uint32_t> want;
    for (uint32_t i = 0; i < 100; ++i) want.insert(i);
    EXPECT_EQ(cut.Selected(), want);
  }
}

TEST(BudgetTest, AShareOfMassIsNeverPromisedButMissed) {
  SCOPED_TRACE(::testing::Message() << "seed " << Seed());
  std::mt19937 random(Seed() + 2);
  for (float mass : {0.01f, 0.3f, 0.95f, 0.9999f}) {
    const std::vector<float> score = RandomScores(5000, 4.0f, false, &random);
    Cut cut(score, {}, 512);
    const double captured = AllocateBudget(TopP(mass), cut.runs, cut.shares);
    EXPECT_GE(captured, mass - 1e-6);
    EXPECT_LE(captured, 1.0);
  }
}

TEST(BudgetTest, EverythingMaskedOrNothingThereSelectsNothing) {
  for (const Budget& budget : {Budget{}, FixedK(4), TopP(0.5f)}) {
    Cut masked(std::vector<float>(40, kMasked), {}, 16);
    EXPECT_EQ(AllocateBudget(budget, masked.runs, masked.shares), 1.0);
    EXPECT_TRUE(masked.Selected().empty());
    EXPECT_EQ(AllocateBudget(budget, {}, {}), 1.0);
    Cut empty_run({1.0f, 2.0f}, {}, 1);
    empty_run.coarse[0] = CoarseScores{};  // a run of no nodes beside one of one
    EXPECT_EQ(AllocateBudget(budget, empty_run.runs, empty_run.shares), 1.0);
    EXPECT_EQ(empty_run.Selected(), std::set<uint32_t>{1});
  }
}

TEST(BudgetTest, ExtremeScoresStayFinite) {
  const float big = std::numeric_limits<float>::max();
  Cut cut({-big, big, 0.0f, -big, big}, {}, 2);
  const double captured = AllocateBudget(FixedK(1), cut.runs, cut.shares);
  EXPECT_NEAR(captured, 0.5, 1e-6);
  EXPECT_EQ(cut.Selected(), std::set<uint32_t>{1});
}

}  // namespace
}  // namespace quarry

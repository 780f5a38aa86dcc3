#include "cpu_index/budget.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "cpu_index/sample_lift.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

Budget FixedK(uint32_t k) { return {Budget::Kind::kFixedK, k, 1.0f}; }
Budget TopP(float mass, uint32_t cap = 0) { return {Budget::Kind::kTopP, cap, mass}; }
Budget Dipr(float beta, uint32_t cap = 0) {
  return {.kind = Budget::Kind::kDipr, .k = cap, .beta = beta};
}
Budget Lift(uint32_t k) { return {.kind = Budget::Kind::kSoftmaxLift, .k = k}; }

// Scores of one query, cut into runs of `run_nodes` nodes; row 1 of two, so that a wrong row shows.
struct Cut {
  std::vector<CoarseScores> coarse;
  std::vector<RunScores> runs;
  std::vector<RunShare> shares;

  Cut(const std::vector<float>& score, size_t run_nodes) {
    for (size_t lo = 0; lo < score.size(); lo += run_nodes) {
      const size_t n = std::min(run_nodes, score.size() - lo);
      CoarseScores c;
      c.nodes = static_cast<uint32_t>(n);
      c.tokens = {static_cast<uint32_t>(lo), static_cast<uint32_t>(lo + n)};
      c.score.assign(n, 1e9f);
      c.score.insert(c.score.end(), score.begin() + lo, score.begin() + lo + n);
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

  // What a run takes, as TokenIndex::Refine does, with the logs of what it weighs.
  std::map<uint32_t, float> Weights(uint64_t lift_key = 0) const {
    std::map<uint32_t, float> out;
    for (size_t r = 0; r < runs.size(); ++r) {
      AllottedTokens allotted(
          {{shares[r].threshold}, {shares[r].ties}, {shares[r].floor}, {lift_key}}, 0);
      const std::span<const float> row = coarse[r].Row(1);
      for (uint32_t i = 0; i < row.size(); ++i) {
        const uint32_t token = coarse[r].tokens.lo + coarse[r].NodeOf(1, i);
        if (allotted.Take(token, row[i])) out[token] = allotted.Weight(row[i]);
      }
    }
    return out;
  }
  std::set<uint32_t> Selected() const {
    std::set<uint32_t> out;
    for (const auto& [token, weight] : Weights()) out.insert(token);
    return out;
  }
};

struct Best {
  std::set<uint32_t> nodes;
  double captured = 1;
};

// By a full sort: highest score first, lowest token first among equals.
Best BruteForce(const std::vector<float>& score, const Budget& budget) {
  std::vector<uint32_t> order;
  for (uint32_t i = 0; i < score.size(); ++i) {
    if (score[i] != kMasked) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return score[a] > score[b]; });
  const auto mass_of = [&](uint32_t i) { return std::exp(double{score[i]} - score[order[0]]); };
  double total = 0, mass = 0;
  const bool dipr = budget.kind == Budget::Kind::kDipr;
  for (uint32_t i : order) total += mass_of(i);
  Best best;
  uint64_t tokens = 0;
  for (uint32_t i : order) {
    const bool capped = budget.kind == Budget::Kind::kFixedK || budget.k > 0;
    if (budget.kind != Budget::Kind::kUnlimited && capped && tokens >= budget.k) break;
    if (budget.kind == Budget::Kind::kTopP && budget.mass < 1 && mass >= budget.mass * total) break;
    if (dipr && score[i] < score[order[0]] - budget.beta) break;
    best.nodes.insert(i);
    ++tokens;
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
  std::mt19937 random(Seed());
  for (float spread : {0.2f, 2.0f, 20.0f}) {
    for (bool with_ties : {false, true}) {
      for (size_t n : {1u, 2u, 17u, 1024u, 9000u}) {
        const std::vector<float> score = RandomScores(n, spread, with_ties, &random);
        for (const Budget& budget :
             {Budget{}, FixedK(1), FixedK(7), FixedK(100), FixedK(100000), TopP(0.1f), TopP(0.5f),
              TopP(0.9f), TopP(0.99f), TopP(1.0f), TopP(0.9f, 5), TopP(1.0f, 50), Dipr(0), Dipr(1),
              Dipr(1, 9), Dipr(1000)}) {
          const Best best = BruteForce(score, budget);
          for (size_t run_nodes : {n, (n + 15) / 16, (n + 127) / 128}) {
            Cut cut(score, run_nodes);
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

TEST(BudgetTest, ListsOfTheTokensInRangeShareOutLikeAllTokens) {
  std::mt19937 random(Seed() + 3);
  const std::vector<float> score = RandomScores(700, 2.0f, true, &random);
  for (const Budget& budget :
       {Budget{}, FixedK(1), FixedK(64), FixedK(100000), TopP(0.9f), Dipr(2)}) {
    for (size_t run_nodes : {700u, 50u, 3u}) {
      Cut dense(score, run_nodes), lists(score, run_nodes);
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
    Cut cut(score, run_nodes);
    EXPECT_NEAR(AllocateBudget(FixedK(100), cut.runs, cut.shares), 0.1, 1e-6);
    std::set<uint32_t> want;
    for (uint32_t i = 0; i < 100; ++i) want.insert(i);
    EXPECT_EQ(cut.Selected(), want);
  }
}

TEST(BudgetTest, AShareOfMassIsNeverPromisedButMissed) {
  std::mt19937 random(Seed() + 2);
  for (float mass : {0.01f, 0.3f, 0.95f, 0.9999f}) {
    const std::vector<float> score = RandomScores(5000, 4.0f, false, &random);
    Cut cut(score, 512);
    const double captured = AllocateBudget(TopP(mass), cut.runs, cut.shares);
    EXPECT_GE(captured, mass - 1e-6);
    EXPECT_LE(captured, 1.0);
  }
}

constexpr uint64_t kKey = 77;

TEST(BudgetTest, EverythingMaskedOrNothingThereSelectsNothing) {
  for (const Budget& budget : {Budget{}, FixedK(4), TopP(0.5f), Dipr(1), Lift(4)}) {
    Cut masked(std::vector<float>(40, kMasked), 16);
    EXPECT_EQ(AllocateBudget(budget, masked.runs, masked.shares, kKey), 1.0);
    EXPECT_TRUE(masked.Selected().empty());
    EXPECT_EQ(AllocateBudget(budget, {}, {}, kKey), 1.0);
    Cut empty_run({1.0f, 2.0f}, 1);
    empty_run.coarse[0] = CoarseScores{};  // a run of no nodes beside one of one
    EXPECT_EQ(AllocateBudget(budget, empty_run.runs, empty_run.shares, kKey), 1.0);
    EXPECT_EQ(empty_run.Selected(), std::set<uint32_t>{1});
  }
}

TEST(BudgetTest, ExtremeScoresStayFinite) {
  const float big = std::numeric_limits<float>::max();
  Cut cut({-big, big, 0.0f, -big, big}, 2);
  const double captured = AllocateBudget(FixedK(1), cut.runs, cut.shares);
  EXPECT_NEAR(captured, 0.5, 1e-6);
  EXPECT_EQ(cut.Selected(), std::set<uint32_t>{1});
}

TEST(BudgetTest, ScoresThatOverflowedAreSurvived) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  std::mt19937 random(Seed());
  for (const std::vector<float>& values :
       {std::vector<float>{kNaN}, {kInfinity}, {kNaN, 1.0f}, {kNaN, kInfinity, kMasked}}) {
    for (const size_t n : {1u, 700u, 40000u}) {
      std::vector<float> score(n);
      for (float& z : score) z = values[random() % values.size()];
      for (const Budget& budget :
           {FixedK(10), TopP(0.9f), TopP(0.9f, 20), Dipr(3), Dipr(3, 20), Lift(10)}) {
        Cut dense(score, 300), lists(score, 300);
        lists.MakeLists();
        for (Cut* cut : {&dense, &lists}) {
          AllocateBudget(budget, cut->runs, cut->shares, 7);
          EXPECT_LE(cut->Weights(budget.kind == Budget::Kind::kSoftmaxLift ? 7 : 0).size(), n);
        }
      }
    }
  }
}

TEST(BudgetTest, EveryKindSelectsTheSameHoweverTheRunsAreCut) {
  std::mt19937 random(Seed() + 4);
  for (float spread : {0.5f, 3.0f}) {
    const std::vector<float> score = RandomScores(40000, spread, spread < 1, &random);
    for (const Budget& budget : {FixedK(100), FixedK(20000), TopP(0.5f), TopP(0.99f),
                                 TopP(0.999f, 300), Dipr(2), Dipr(2, 20), Lift(1), Lift(500)}) {
      Cut whole(score, score.size());
      const double estimate =
          AllocateBudget(budget, whole.runs, whole.shares, kKey);
      const bool lifted = budget.kind == Budget::Kind::kSoftmaxLift;
      const auto want = whole.Weights(lifted ? kKey : 0);
      for (size_t run_nodes : {2500u, 313u}) {  // 16 and 128 runs
        Cut cut(score, run_nodes);
        EXPECT_NEAR(AllocateBudget(budget, cut.runs, cut.shares, kKey), estimate, 1e-12);
        ASSERT_EQ(cut.Weights(lifted ? kKey : 0), want) << "kind " << static_cast<int>(budget.kind);
      }
    }
  }
}

// By a full sort of the priorities, which are TokenLift's.
TEST(BudgetTest, SamplingTakesTheBestPrioritiesAndWeighsByTheNext) {
  std::mt19937 random(Seed() + 5);
  for (uint32_t n : {5u, 100u, 5000u}) {
    const std::vector<float> score = RandomScores(n, 2.0f, true, &random);
    const uint64_t key = LiftKey(random(), 1, 2, 3);
    std::vector<std::pair<float, uint32_t>> order;
    for (uint32_t i = 0; i < n; ++i) {
      if (score[i] != kMasked) order.push_back({score[i] + TokenLift(key, i), i});
    }
    std::stable_sort(order.begin(), order.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    for (uint32_t k : {1u, 3u, 64u, 100000u}) {
      std::map<uint32_t, float> want;
      for (uint32_t i = 0; i < order.size() && i < k; ++i) {
        const float own = score[order[i].second];
        want[order[i].second] = k < order.size() ? std::max(own, order[k].first) : own;
      }
      for (size_t run_nodes : {n, (n + 15) / 16}) {
        Cut cut(score, run_nodes);
        AllocateBudget(Lift(k), cut.runs, cut.shares, key);
        ASSERT_EQ(cut.Weights(key), want) << n << " tokens, k " << k;
        Cut lists(score, run_nodes);
        lists.MakeLists();
        AllocateBudget(Lift(k), lists.runs, lists.shares, key);
        ASSERT_EQ(lists.Weights(key), want) << n << " listed tokens, k " << k;
      }
    }
  }
}

// Sums over samples of many seeds are those over all tokens; their spread falls with the root of k
// and is what the estimate says.
TEST(BudgetTest, SampledSumsAreUnbiasedAndAsFarOffAsPredicted) {
  std::mt19937 random(Seed() + 6);
  constexpr uint32_t kTokens = 3000, kDraws = 2000;
  std::vector<float> score(kTokens), value(kTokens);
  std::normal_distribution<float> normal(0, 1);
  for (float& s : score) s = 1.5f * normal(random);
  for (float& v : value) v = normal(random);
  double mass = 0, sum = 0;
  for (uint32_t i = 0; i < kTokens; ++i) {
    mass += std::exp(double{score[i]});
    sum += value[i] * std::exp(double{score[i]});
  }
  std::vector<double> errors;
  for (uint32_t k : {32u, 128u, 512u}) {
    double mean_mass = 0, mean_sum = 0, square_mass = 0, square_sum = 0, predicted = 0;
    for (uint32_t draw = 0; draw < kDraws; ++draw) {
      const uint64_t key = LiftKey(Seed(), 0, 0, draw);
      Cut cut(score, 200);
      const double error = 1 - AllocateBudget(Lift(k), cut.runs, cut.shares, key);
      double drawn_mass = 0, drawn_sum = 0;
      for (const auto& [token, weight] : cut.Weights(key)) {
        drawn_mass += std::exp(double{weight});
        drawn_sum += value[token] * std::exp(double{weight});
      }
      mean_mass += drawn_mass / kDraws;
      mean_sum += drawn_sum / kDraws;
      square_mass += (drawn_mass - mass) * (drawn_mass - mass) / kDraws;
      square_sum += (drawn_sum - sum) * (drawn_sum - sum) / kDraws;
      predicted += error * error * drawn_mass * drawn_mass / kDraws;
    }
    // Five standard errors of the means.
    EXPECT_LE(std::abs(mean_mass - mass), 5 * std::sqrt(square_mass / kDraws)) << "k " << k;
    EXPECT_LE(std::abs(mean_sum - sum), 5 * std::sqrt(square_sum / kDraws)) << "k " << k;
    EXPECT_NEAR(std::sqrt(square_mass / predicted), 1, 0.15) << "k " << k;
    errors.push_back(std::sqrt(square_sum));
  }
  for (size_t i = 1; i < errors.size(); ++i) {  // four times the tokens halve the error, or better
    EXPECT_LE(errors[i], 0.6 * errors[i - 1]);
  }
}

// Scores so large that priorities are whole numbers: hundreds tie with the best that is left out.
TEST(BudgetTest, TheErrorOfSamplingIsThatOfTheTiesTaken) {
  constexpr float kScore = 1 << 23;
  constexpr uint32_t kTaken = 400;
  std::vector<float> score(1000, kScore);
  score[0] += 3;
  const uint64_t key = LiftKey(7, 0, 0, 0);
  std::map<float, uint32_t> priorities;
  for (uint32_t i = 0; i < score.size(); ++i) ++priorities[score[i] + TokenLift(key, i)];
  uint32_t above = 0;
  for (const auto& [priority, count] : priorities) above += priority > kScore + 1 ? count : 0;
  ASSERT_LT(above, kTaken - 100);
  ASSERT_GT(above + priorities[kScore + 1], kTaken + 100);
  // All but the first weigh as the best left out, at 2 below the largest score, are 3 below it.
  const double floor = std::exp(-2.0), mass = std::exp(-3.0), others = kTaken - 1;
  const double wanted = std::sqrt(others * floor * (floor - mass)) / (1 + others * floor);
  for (size_t run_nodes : {1000u, 130u}) {
    Cut cut(score, run_nodes);
    EXPECT_NEAR(1 - AllocateBudget(Lift(kTaken), cut.runs, cut.shares, key), wanted, 1e-5);
    EXPECT_EQ(cut.Weights(key).size(), kTaken);
  }
}

TEST(TokenLiftTest, IsExponentialAndDiffersByEverythingInItsKey) {
  double sum = 0, squares = 0;
  float least = 100, most = 0;
  constexpr uint32_t kDraws = 1 << 20;
  const uint64_t key = LiftKey(1, 2, 3, 4);
  for (uint32_t t = 0; t < kDraws; ++t) {
    const float lift = TokenLift(key, t);
    sum += lift;
    squares += double{lift} * lift;
    least = std::min(least, lift);
    most = std::max(most, lift);
  }
  EXPECT_NEAR(sum / kDraws, 1, 0.01);
  EXPECT_NEAR(squares / kDraws, 2, 0.03);
  EXPECT_GT(least, 0);
  EXPECT_LT(most, kMostTokenLift);
  EXPECT_GT(most, 11);
  std::set<uint64_t> keys = {key, LiftKey(0, 2, 3, 4), LiftKey(1, 0, 3, 4), LiftKey(1, 2, 0, 4),
                             LiftKey(1, 2, 3, 0), LiftKey(1, 3, 2, 4), LiftKey(1, 2, 4, 3)};
  EXPECT_EQ(keys.size(), 7u);
}

}  // namespace
}  // namespace quarry

#include "cpu_index/budget.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_index/budget_cut.h"
#include "cpu_index/simd.h"
#include "proto/check.h"

namespace quarry {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
constexpr uint64_t kAnyTokens = std::numeric_limits<uint64_t>::max();
constexpr double kAnyMass = std::numeric_limits<double>::infinity();

struct Gathered {
  std::vector<RankedNode> nodes;
  double mass = 0;
  bool all = false;  // there are no others
};

// Nodes above a falling rank, from `guess` on, until they hold the tokens or the mass.
Gathered GatherEnough(const RankedNodes& ranked, float guess, uint64_t tokens, double mass) {
  Gathered got;
  float to = std::numeric_limits<float>::infinity(), from = guess, step = 1;
  for (;;) {
    const size_t first = got.nodes.size();
    ranked.Gather(from, to, &got.nodes);
    for (size_t i = first; i < got.nodes.size(); ++i) got.mass += got.nodes[i].mass;
    got.all = from == kMasked;
    if (got.all || got.nodes.size() >= tokens || got.mass >= mass) return got;
    to = from;
    from = step < 30 ? from - step : kMasked;
    step *= 4;
  }
}

// Ties go to the earlier runs.
void ShareOut(const RankedNodes& ranked, float threshold, uint32_t ties, bool all_ties,
              std::span<RunShare> shares) {
  for (RunShare& share : shares) {
    share.threshold = threshold;
    share.ties = ties;  // no run has more, if all are taken
  }
  if (all_ties) return;
  const std::vector<uint32_t> equal = ranked.CountEqual(threshold);
  for (size_t r = 0; r < shares.size(); ++r) {
    shares[r].ties = std::min(equal[r], ties);
    ties -= shares[r].ties;
  }
}

// The best nodes up to so many tokens and so much of the mass.
double AllocateBest(const RankedNodes& ranked, uint64_t tokens, float share_of_mass,
                    std::span<RunShare> shares) {
  const double total = ranked.TotalMass();
  const double mass = share_of_mass >= 1.0f ? kAnyMass : share_of_mass * total;
  float guess = ranked.GuessRank(tokens);
  if (mass < kAnyMass) guess = std::max(guess, ranked.GuessFloor(total - mass));
  Gathered got = GatherEnough(ranked, guess, tokens, mass);
  if (got.all && got.nodes.size() <= tokens && got.mass < mass) return 1.0;  // threshold -infinity
  if (got.nodes.empty()) return 1.0;  // every score is NaN: sums of products overflowed
  const Cut cut = FindCut(&got.nodes, tokens, mass);
  ShareOut(ranked, cut.threshold, cut.ties, cut.all_ties, shares);
  return std::min(1.0, cut.mass / total);
}

// Every node whose score is at least the largest less beta; of more than a cap, the best.
double AllocateDipr(const RankedNodes& ranked, const Budget& budget, std::span<RunShare> shares) {
  const float below = std::nextafter(ranked.largest_score() - budget.beta, kMasked);
  Gathered got;
  ranked.Gather(below, std::numeric_limits<float>::infinity(), &got.nodes);
  for (const RankedNode& node : got.nodes) got.mass += node.mass;
  const double total = ranked.TotalMass();
  if (budget.k == 0 || got.nodes.size() <= budget.k) {
    for (RunShare& share : shares) share.threshold = below;
    return std::min(1.0, got.mass / total);
  }
  const Cut cut = FindCut(&got.nodes, budget.k, kAnyMass);
  ShareOut(ranked, cut.threshold, cut.ties, cut.all_ties, shares);
  return std::min(1.0, cut.mass / total);
}

// The k nodes of largest priority, none of which weighs less than the best priority left out.
// Returns the standard error of the sum of their weights, relative to it.
double AllocateLift(const RankedNodes& ranked, uint32_t k, std::span<RunShare> shares) {
  const uint64_t tokens = uint64_t{k} + 1;
  Gathered got = GatherEnough(ranked, ranked.GuessRank(tokens), tokens, kAnyMass);
  if (got.nodes.size() < tokens) return 0;  // everything, as it is
  const Cut cut = FindCut(&got.nodes, tokens, kAnyMass);
  ShareOut(ranked, cut.threshold, cut.ties - 1, cut.all_ties && cut.ties == 1, shares);
  for (RunShare& share : shares) share.floor = cut.threshold;
  const double floor = std::exp(double{cut.threshold} - ranked.largest_score());
  double sum = 0, variance = 0;
  uint32_t ties = cut.ties - 1;
  for (const RankedNode& node : got.nodes) {
    if (node.rank < cut.threshold) continue;
    if (node.rank == cut.threshold) {
      if (ties == 0) continue;
      --ties;
    }
    sum += std::max(floor, double{node.mass});
    variance += floor * std::max(0.0, floor - node.mass);
  }
  return std::sqrt(variance) / sum;
}

}  // namespace

double AllocateBudget(const Budget& budget, std::span<const RunScores> runs,
                      std::span<RunShare> shares, uint64_t lift_key) {
  QUARRY_CHECK(runs.size() == shares.size());
  std::fill(shares.begin(), shares.end(), RunShare{});
  if (budget.kind == Budget::Kind::kUnlimited) return 1.0;
  QUARRY_CHECK(budget.kind != Budget::Kind::kError);
  const bool sampled = budget.kind == Budget::Kind::kSoftmaxLift;
  QUARRY_CHECK(!sampled || lift_key != 0);
  const RankedNodes ranked(runs, sampled ? lift_key : 0);
  if (ranked.largest_score() == kMasked) return 1.0;
  switch (budget.kind) {
    case Budget::Kind::kDipr:
      return AllocateDipr(ranked, budget, shares);
    case Budget::Kind::kSoftmaxLift:
      return 1.0 - AllocateLift(ranked, budget.k, shares);
    case Budget::Kind::kTopP:
      return AllocateBest(ranked, budget.k > 0 ? budget.k : kAnyTokens, budget.mass, shares);
    default:
      return AllocateBest(ranked, budget.k, 1.0f, shares);
  }
}

}  // namespace quarry

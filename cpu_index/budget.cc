#include "cpu_index/budget.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu_index/simd.h"
#include "proto/check.h"

namespace quarry {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

struct Node {
  float score;
  float mass;  // relative to e^(largest score)
  uint32_t weight;
};

std::span<const float> RowOf(const RunScores& run) {
  return std::span(run.coarse->score)
      .subspan(size_t{run.query} * run.coarse->nodes, run.coarse->nodes);
}

uint32_t WeightOf(const CoarseScores& coarse, size_t node) {
  return coarse.weight.empty() ? 1 : coarse.weight[node];
}

float LargestScore(std::span<const RunScores> runs) {
  float largest = kMasked;
  for (const RunScores& run : runs) {
    std::span<const float> row = RowOf(run);
    largest = std::max(largest, Kernels().max(row.data(), row.size()));
  }
  return largest;
}

// The nodes that are not masked, with their masses.
std::vector<Node> NodesInRange(std::span<const RunScores> runs, float largest) {
  std::vector<Node> nodes;
  size_t total = 0;
  for (const RunScores& run : runs) total += run.coarse->nodes;
  nodes.reserve(total);
  std::vector<float> mass;
  for (const RunScores& run : runs) {
    std::span<const float> row = RowOf(run);
    mass.assign(row.begin(), row.end());
    Kernels().exp_sum(mass.data(), mass.size(), largest);
    for (size_t i = 0; i < row.size(); ++i) {
      if (row[i] == kMasked) continue;
      const uint32_t weight = WeightOf(*run.coarse, i);
      nodes.push_back({row[i], mass[i] * static_cast<float>(weight), weight});
    }
  }
  return nodes;
}

struct Cut {
  float threshold = kMasked;
  uint32_t ties = 0;  // nodes of exactly the threshold that are still taken
  double mass = 0;    // of what is taken
};

// The fewest nodes, best first, whose weights reach `tokens` and whose mass reaches `mass`
// (whichever comes first). A quickselect that keeps what is surely taken on the left.
Cut FindCut(std::vector<Node>* nodes, uint64_t tokens, double mass) {
  const auto better = [](const Node& a, const Node& b) { return a.score > b.score; };
  auto lo = nodes->begin(), hi = nodes->end();
  uint64_t tokens_left = tokens;
  double mass_left = mass;
  // [begin, lo) is taken; the cut lies in [lo, hi).
  while (hi - lo > 1) {
    auto middle = lo + (hi - lo) / 2;
    std::nth_element(lo, middle, hi, better);
    uint64_t left_tokens = 0;
    double left_mass = 0;
    for (auto it = lo; it != middle; ++it) {
      left_tokens += it->weight;
      left_mass += it->mass;
    }
    if (left_tokens >= tokens_left || left_mass >= mass_left) {
      hi = middle;
    } else {
      tokens_left -= left_tokens;
      mass_left -= left_mass;
      lo = middle;
    }
  }
  Cut cut{lo->score};
  for (auto it = nodes->begin(); it <= lo; ++it) {
    cut.ties += it->score == cut.threshold ? 1 : 0;
    cut.mass += it->mass;
  }
  return cut;
}

}  // namespace

double AllocateBudget(const Budget& budget, std::span<const RunScores> runs,
                      std::span<RunShare> shares) {
  QUARRY_CHECK(runs.size() == shares.size());
  std::fill(shares.begin(), shares.end(), RunShare{kMasked, 0});
  std::vector<Node> nodes = NodesInRange(runs, LargestScore(runs));
  if (nodes.empty()) return 1.0;
  uint64_t available = 0;
  double total = 0;  // in double: a hundred thousand floats add up
  for (const Node& n : nodes) {
    available += n.weight;
    total += n.mass;
  }
  uint64_t tokens = std::numeric_limits<uint64_t>::max();
  double mass = std::numeric_limits<double>::infinity();
  if (budget.kind == Budget::Kind::kFixedK) tokens = budget.k;
  if (budget.kind == Budget::Kind::kTopP) {
    if (budget.k > 0) tokens = budget.k;
    mass = budget.mass >= 1.0f ? mass : budget.mass * total;
  }
  if (tokens >= available && mass >= total) return 1.0;  // everything: threshold -infinity
  const Cut cut = FindCut(&nodes, tokens, mass);
  uint32_t ties_left = cut.ties;
  for (size_t r = 0; r < runs.size(); ++r) {
    shares[r].threshold = cut.threshold;
    std::span<const float> row = RowOf(runs[r]);
    const auto equal = static_cast<uint32_t>(std::count(row.begin(), row.end(), cut.threshold));
    shares[r].ties = std::min(equal, ties_left);
    ties_left -= shares[r].ties;
  }
  return std::min(1.0, cut.mass / total);
}

}  // namespace quarry

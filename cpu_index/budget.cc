#include "cpu_index/budget.h"

#include <algorithm>
#include <cmath>
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

std::span<const float> RowOf(const RunScores& run) { return run.coarse->Row(run.query); }

// Tokens of the row's i-th node.
uint32_t WeightOf(const RunScores& run, size_t i) {
  const CoarseScores& coarse = *run.coarse;
  if (coarse.weight.empty()) return 1;
  return coarse.dense() ? coarse.weight[i] : coarse.weight[coarse.first[run.query] + i];
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
  for (const RunScores& run : runs) total += RowOf(run).size();
  nodes.reserve(total);
  std::vector<float> mass;
  for (const RunScores& run : runs) {
    std::span<const float> row = RowOf(run);
    mass.assign(row.begin(), row.end());
    Kernels().exp_sum(mass.data(), mass.size(), largest);
    for (size_t i = 0; i < row.size(); ++i) {
      if (row[i] == kMasked) continue;
      const uint32_t weight = WeightOf(run, i);
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

// Under Budget::kError: runs without doubts are attended whole, and of the others the nodes of the
// largest scores are refined, until the doubts of those left add up to at most what is allowed. A
// histogram of the scores: no sort, and the cut is true to kBinNats.
class ErrorCut {
 public:
  // top: a log near the largest of all scores and lengths.
  explicit ErrorCut(float top) : top_(top) {}

  void Add(const RunScores& run) {
    const std::span<const float> row = RowOf(run);
    const auto first = run.coarse->doubt.begin() + run.coarse->first[run.query];
    doubt_.assign(first, first + static_cast<ptrdiff_t>(row.size()));
    Kernels().exp_sum(doubt_.data(), doubt_.size(), top_);
    for (size_t i = 0; i < row.size(); ++i) {
      if (row[i] == kMasked) continue;
      const uint32_t weight = WeightOf(run, i);
      Bin& bin = bins_[std::clamp(static_cast<int>((top_ - row[i]) / kBinNats), 0, kBins - 1)];
      bin.tokens += weight;
      if (weight == 1) {
        bin.squares += double{doubt_[i]} * doubt_[i];
        bin.groups += run.coarse->common_doubt * doubt_[i];
      } else {
        bin.groups += doubt_[i];
      }
    }
  }

  // Returns the threshold, and the error that is left: as lengths relative to e^top.
  float Find(double allowed, uint64_t most_tokens, double* error) const {
    double squares = 0, groups = 0;
    for (const Bin& bin : bins_) {
      squares += bin.squares;
      groups += bin.groups;
    }
    uint64_t tokens = 0;
    int cut = 0;  // the first bin that is not refined
    for (; cut < kBins && squares + groups * groups > allowed * allowed; ++cut) {
      if (tokens + bins_[cut].tokens > most_tokens) break;
      tokens += bins_[cut].tokens;
      squares -= bins_[cut].squares;
      groups -= bins_[cut].groups;
    }
    *error = std::sqrt(std::max(0.0, squares) + groups * groups);
    return cut == kBins ? kMasked : top_ - static_cast<float>(cut) * kBinNats;
  }

 private:
  static constexpr int kBins = 256;
  static constexpr float kBinNats = 0.125f;
  struct Bin {
    double squares = 0, groups = 0;  // sums of squares; of what adds up
    uint64_t tokens = 0;
  };
  const float top_;
  Bin bins_[kBins];
  std::vector<float> doubt_;
};

double AllocateByError(const Budget& budget, std::span<const RunScores> runs,
                       std::span<RunShare> shares, float other_length) {
  float top = LargestScore(runs);
  for (const RunScores& run : runs) {
    if (!run.coarse->length.empty()) top = std::max(top, run.coarse->length[run.query]);
  }
  ErrorCut cut(top);
  double length = 0;
  for (const RunScores& run : runs) {
    if (run.coarse->doubt.empty()) continue;
    cut.Add(run);
    length += std::exp(double{run.coarse->length[run.query]} - top);
  }
  // What is merged with points elsewhere.
  length = std::hypot(length, std::exp(double{other_length} - top));
  double error = 0;
  const uint64_t most = budget.k > 0 ? budget.k : std::numeric_limits<uint64_t>::max();
  const float threshold = cut.Find(budget.error * length, most, &error);
  for (size_t r = 0; r < runs.size(); ++r) {
    if (!runs[r].coarse->doubt.empty()) shares[r].threshold = threshold;
  }
  return length > 0 ? error / length : 0;
}

}  // namespace

double AllocateBudget(const Budget& budget, std::span<const RunScores> runs,
                      std::span<RunShare> shares, float other_length) {
  QUARRY_CHECK(runs.size() == shares.size());
  std::fill(shares.begin(), shares.end(), RunShare{kMasked, 0});
  if (budget.kind == Budget::Kind::kError)
    return 1.0 - AllocateByError(budget, runs, shares, other_length);
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

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

// Calls f(scores, weight, stretch) for each stretch of the row's nodes.
template <typename F>
void ForStretches(const RunScores& run, F&& f) {
  const std::span<const float> row = RowOf(run);
  const std::span<const CoarseScores::Stretch> stretches = run.coarse->stretches;
  if (stretches.empty()) return f(row, 1u, size_t{0});
  for (size_t s = 0, begin = 0; s < stretches.size(); begin = stretches[s++].end) {
    if (stretches[s].end == begin) continue;
    f(row.subspan(begin, stretches[s].end - begin), stretches[s].weight, s);
  }
}

bool HasDoubts(const RunScores& run) { return !run.coarse->doubt.empty(); }

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
    ForStretches(run, [&](std::span<const float> scores, uint32_t weight, size_t) {
      mass.assign(scores.begin(), scores.end());
      Kernels().exp_sum(mass.data(), mass.size(), largest);
      for (size_t i = 0; i < scores.size(); ++i) {
        if (scores[i] == kMasked) continue;
        nodes.push_back({scores[i], mass[i] * static_cast<float>(weight), weight});
      }
    });
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

// Under Budget::kError: runs without doubts are attended whole, and of the others the tokens of the
// largest scores are refined, until the doubts of those left, and of groups, add up to at most what
// is allowed. Groups stay closed: whether to open them was decided when they were scored. A histogram
// of the scores: no sort, no exponential for a node, and the cut is true to kBinNats.
class ErrorCut {
 public:
  // top: a log near the largest of all scores and lengths.
  explicit ErrorCut(float top) : top_(top) {}

  void Add(const RunScores& run) {
    const CoarseScores& coarse = *run.coarse;
    const std::span<const float> doubt =
        std::span(coarse.doubt).subspan(run.query * coarse.stretches.size());
    ForStretches(run, [&](std::span<const float> scores, uint32_t weight, size_t stretch) {
      AddAlike(scores, weight, doubt[stretch], coarse);
    });
    exact_bins_ = std::max(exact_bins_, static_cast<int>(coarse.exact_above / kBinNats));
  }

  struct Result {
    float threshold, exact;  // of what is refined, and of that what is read exactly
    double error;            // that is left: a length relative to e^top
  };
  Result Find(double allowed, uint64_t most_tokens) const {
    double squares = 0, common = closed_, refined = 0;
    for (const Bin& bin : bins_) {
      squares += bin.squares;
      common += bin.common;
    }
    // Where groups alone come near to what is allowed, tokens need not be much better than they.
    allowed = std::max(allowed, kBesideGroups * closed_);
    uint64_t tokens = 0;
    int cut = 0, exact = 0;  // the first bins that are not refined, and not read exactly
    const auto squared_error = [&] { return squares + refined + common * common; };
    for (; cut < kBins && squared_error() > allowed * allowed; ++cut) {
      if (tokens + bins_[cut].tokens > most_tokens) break;
      tokens += bins_[cut].tokens;
      squares -= bins_[cut].squares;
      common -= bins_[cut].common;
      refined += bins_[cut].refined;
      if (cut >= exact_bins_) refined -= bins_[exact++].refined;
    }
    for (; exact < cut && squared_error() > allowed * allowed; ++exact) {
      refined -= bins_[exact].refined;
    }
    return {EdgeOf(cut), EdgeOf(exact),
            std::sqrt(std::max(0.0, squares + refined) + common * common)};
  }

 private:
  static constexpr int kBins = 256;
  static constexpr float kBinNats = 0.125f;
  static constexpr double kBesideGroups = 1.4;
  struct Bin {
    double squares = 0, common = 0;  // sums of squares; of what adds up
    double refined = 0;              // squares that are left when they are refined
    uint64_t tokens = 0;
  };

  float EdgeOf(int bin) const {
    return bin == kBins ? kMasked : top_ - static_cast<float>(bin) * kBinNats;
  }

  // A bin for masked nodes is behind the others.
  int BinOf(float score) const {
    const float depth = (top_ - score) * (1 / kBinNats);
    return static_cast<int>(std::clamp(depth, 0.0f, score == kMasked ? float{kBins} : kBins - 1.0f));
  }

  void AddAlike(std::span<const float> scores, uint32_t weight, float doubt,
                const CoarseScores& coarse) {
    // Neighbours often share a bin: four tables, lest each waits for the one before.
    uint32_t count[4][kBins + 1] = {};
    size_t i = 0;
    for (; i + 4 <= scores.size(); i += 4) {
      for (size_t j = 0; j < 4; ++j) ++count[j][BinOf(scores[i + j])];
    }
    for (; i < scores.size(); ++i) ++count[0][BinOf(scores[i])];
    for (int b = 0; b < kBins; ++b) {
      const uint32_t n = count[0][b] + count[1][b] + count[2][b] + count[3][b];
      if (n == 0) continue;
      const double one = std::exp(doubt - (b + 0.5) * kBinNats), all = one * n;
      if (weight > 1) {
        closed_ += all;
        continue;
      }
      Bin& bin = bins_[b];
      bin.tokens += n;
      bin.squares += one * all;
      bin.common += coarse.common_doubt * all;
      bin.refined += one * all * coarse.refined_doubt * coarse.refined_doubt;
    }
  }

  const float top_;
  int exact_bins_ = 0;
  double closed_ = 0;  // what groups add up to
  Bin bins_[kBins];
};

double AllocateByError(const Budget& budget, std::span<const RunScores> runs,
                       std::span<RunShare> shares, float other_length) {
  float top = LargestScore(runs);
  for (const RunScores& run : runs) {
    if (HasDoubts(run)) top = std::max(top, run.coarse->length[run.query]);
  }
  if (top == kMasked) return 0;  // the query sees nothing
  ErrorCut cut(top);
  double length = 0;
  for (const RunScores& run : runs) {
    if (!HasDoubts(run)) continue;
    cut.Add(run);
    length += std::exp(double{run.coarse->length[run.query]} - top);
  }
  // What is merged with points elsewhere.
  length = std::hypot(length, std::exp(double{other_length} - top));
  const uint64_t most = budget.k > 0 ? budget.k : std::numeric_limits<uint64_t>::max();
  const ErrorCut::Result found = cut.Find(budget.error * length, most);
  for (size_t r = 0; r < runs.size(); ++r) {
    if (!HasDoubts(runs[r])) continue;
    shares[r].threshold = found.threshold;
    shares[r].exact = found.exact;
  }
  return length > 0 ? found.error / length : 0;
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

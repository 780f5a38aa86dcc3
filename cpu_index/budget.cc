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

struct Gathered {
  std::vector<RankedNode> nodes;
  uint64_t tokens = 0;
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
    for (size_t i = first; i < got.nodes.size(); ++i) {
      got.tokens += got.nodes[i].weight;
      got.mass += got.nodes[i].mass;
    }
    got.all = from == kMasked;
    if (got.all || got.tokens >= tokens || got.mass >= mass) return got;
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
  if (got.all && got.tokens <= tokens && got.mass < mass) return 1.0;  // threshold -infinity
  const Cut cut = FindCut(&got.nodes, tokens, mass);
  ShareOut(ranked, cut.threshold, cut.ties, cut.all_ties, shares);
  return std::min(1.0, cut.mass / total);
}

// Every node whose score is at least the largest less beta; of more than a cap, the best.
double AllocateDipr(const RankedNodes& ranked, const Budget& budget, std::span<RunShare> shares) {
  const float below = std::nextafter(ranked.largest_score() - budget.beta, kMasked);
  Gathered got;
  ranked.Gather(below, std::numeric_limits<float>::infinity(), &got.nodes);
  for (const RankedNode& node : got.nodes) {
    got.tokens += node.weight;
    got.mass += node.mass;
  }
  const double total = ranked.TotalMass();
  if (budget.k == 0 || got.tokens <= budget.k) {
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
  if (got.tokens < tokens) return 0;  // everything, as it is
  const Cut cut = FindCut(&got.nodes, tokens, kAnyMass);
  ShareOut(ranked, cut.threshold, cut.ties - 1, cut.all_ties && cut.ties == 1, shares);
  for (RunShare& share : shares) share.floor = cut.threshold;
  const double floor = std::exp(double{cut.threshold} - ranked.largest_score());
  double sum = 0, variance = 0;
  uint32_t ties = cut.ties - 1;
  for (const RankedNode& node : got.nodes) {
    if (node.rank < cut.threshold || (node.rank == cut.threshold && ties-- == 0)) continue;
    sum += std::max(floor, double{node.mass});
    variance += floor * std::max(0.0, floor - node.mass);
  }
  return std::sqrt(variance) / sum;
}

float LargestOf(std::span<const RunScores> runs) {
  float largest = kMasked;
  for (const RunScores& run : runs) {
    std::span<const float> row = RowOf(run);
    largest = std::max(largest, Kernels().max(row.data(), row.size()));
  }
  return largest;
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
  float top = LargestOf(runs);
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
                      std::span<RunShare> shares, float other_length, uint64_t lift_key) {
  QUARRY_CHECK(runs.size() == shares.size());
  std::fill(shares.begin(), shares.end(), RunShare{});
  if (budget.kind == Budget::Kind::kUnlimited) return 1.0;
  if (budget.kind == Budget::Kind::kError) {
    return 1.0 - AllocateByError(budget, runs, shares, other_length);
  }
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

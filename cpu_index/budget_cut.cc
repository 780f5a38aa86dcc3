#include "cpu_index/budget_cut.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "cpu_index/sample_lift.h"
#include "cpu_index/simd.h"

namespace quarry {
namespace {

// Nodes looked at together: most blocks have none that is wanted, and one comparison shows it.
constexpr size_t kBlock = 64;
// Nodes of a sample. As many are gathered without asking one.
constexpr size_t kSample = 1024;

std::span<const float> RowOf(const RunScores& run) { return run.coarse->Row(run.query); }

uint32_t TokenOf(const RunScores& run, size_t i) {
  return run.coarse->tokens.lo + run.coarse->NodeOf(run.query, i);
}

// The ranks of a block of one row's scores.
void Lift(uint64_t key, const RunScores& run, size_t first, std::span<const float> scores,
          float* ranks) {
  if (run.coarse->dense()) {
    const uint32_t token = TokenOf(run, first);
    for (uint32_t i = 0; i < scores.size(); ++i) ranks[i] = scores[i] + TokenLift(key, token + i);
    return;
  }
  for (size_t i = 0; i < scores.size(); ++i) {
    ranks[i] = scores[i] + TokenLift(key, TokenOf(run, first + i));
  }
}

// In four sums, so that additions need not wait for one another.
double SumInDouble(const float* x, size_t n) {
  double sum[4] = {};
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (size_t j = 0; j < 4; ++j) sum[j] += double{x[i + j]};
  }
  for (; i < n; ++i) sum[0] += double{x[i]};
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace

RankedNodes::RankedNodes(std::span<const RunScores> runs, uint64_t lift_key)
    : runs_(runs), lift_key_(lift_key) {
  for (const RunScores& run : runs_) {
    const std::span<const float> row = RowOf(run);
    nodes_ += row.size();
    largest_ = std::max(largest_, Kernels().max(row.data(), row.size()));
  }
}

// f(run, first, scores, ranks) for each block of at most kBlock nodes.
template <typename F>
void RankedNodes::ForBlocks(F&& f) const {
  std::array<float, kBlock> lifted;
  for (size_t r = 0; r < runs_.size(); ++r) {
    const std::span<const float> row = RowOf(runs_[r]);
    for (size_t at = 0; at < row.size(); at += kBlock) {
      const std::span<const float> scores = row.subspan(at, std::min(kBlock, row.size() - at));
      std::span<const float> ranks = scores;
      if (lift_key_ != 0) {
        Lift(lift_key_, runs_[r], at, scores, lifted.data());
        ranks = std::span(lifted).first(scores.size());
      }
      f(r, at, scores, ranks);
    }
  }
}

template <typename F>
void RankedNodes::ForSample(F&& f) const {
  const size_t stride = nodes_ / kSample + 1;
  size_t next = stride / 2;  // of all nodes
  size_t before = 0;         // nodes of earlier runs
  for (const RunScores& run : runs_) {
    const std::span<const float> row = RowOf(run);
    for (; next < before + row.size(); next += stride) {
      const size_t i = next - before;
      const float lift = lift_key_ == 0 ? 0 : TokenLift(lift_key_, TokenOf(run, i));
      f(row[i] + lift, row[i]);
    }
    before += row.size();
  }
}

double RankedNodes::TotalMass() const {
  constexpr size_t kTile = 1024;
  std::array<float, kTile> mass;
  double total = 0;
  for (const RunScores& run : runs_) {
    const std::span<const float> row = RowOf(run);
    for (size_t at = 0; at < row.size(); at += kTile) {
      const size_t n = std::min(kTile, row.size() - at);
      std::copy_n(row.data() + at, n, mass.data());
      Kernels().exp_sum(mass.data(), n, largest_);
      total += SumInDouble(mass.data(), n);
    }
  }
  return total;
}

float RankedNodes::GuessRank(uint64_t count) const {
  if (nodes_ <= kSample || count >= nodes_) return kNone;
  std::vector<float> ranks;
  ranks.reserve(kSample);
  ForSample([&](float rank, float) {
    if (!std::isnan(rank)) ranks.push_back(rank);  // which has no place in an order
  });
  // Four standard deviations of how many of the best `count` are in the sample.
  const double expected =
      static_cast<double>(count) * static_cast<double>(ranks.size()) / static_cast<double>(nodes_);
  const double place = expected + 4 * std::sqrt(expected) + 4;
  if (place >= static_cast<double>(ranks.size())) return kNone;
  const auto nth = ranks.begin() + static_cast<ptrdiff_t>(place);
  std::nth_element(ranks.begin(), nth, ranks.end(), std::greater<>());
  return *nth;
}

float RankedNodes::GuessFloor(double mass) const {
  if (nodes_ <= kSample) return kNone;
  constexpr int kBins = 256;
  constexpr float kPerNat = 8;
  // The mass of each eighth of a nat, of the sample alone.
  std::array<double, kBins> bins{};
  size_t sampled = 0;
  ForSample([&](float, float score) {
    ++sampled;
    const float below = (largest_ - score) * kPerNat;
    if (!(below < kBins)) return;  // 32 nats: no mass; or NaN
    const int bin = std::max(0, static_cast<int>(below));
    bins[bin] += std::exp(-double{below} / kPerNat);
  });
  const double share = static_cast<double>(sampled) / static_cast<double>(nodes_);
  const double allowed = 0.8 * mass * share;
  double sum = 0;
  for (int bin = kBins - 1; bin >= 0; --bin) {
    sum += bins[bin];
    if (sum > allowed) return largest_ - static_cast<float>(bin + 1) / kPerNat;
  }
  return largest_ - 1.0f / kPerNat;
}

void RankedNodes::Gather(float from, float to, std::vector<RankedNode>* out) const {
  const size_t first = out->size();
  ForBlocks([&](size_t, size_t, std::span<const float> scores, std::span<const float> ranks) {
    if (!(Kernels().max(ranks.data(), ranks.size()) > from)) return;
    for (size_t i = 0; i < ranks.size(); ++i) {
      if (!(ranks[i] > from) || ranks[i] > to) continue;
      out->push_back({ranks[i], scores[i], 0.0f});
    }
  });
  std::array<float, kBlock> mass;
  for (size_t at = first; at < out->size(); at += kBlock) {
    const size_t n = std::min(kBlock, out->size() - at);
    for (size_t i = 0; i < n; ++i) mass[i] = (*out)[at + i].score;
    Kernels().exp_sum(mass.data(), n, largest_);
    for (size_t i = 0; i < n; ++i) (*out)[at + i].mass = mass[i];
  }
}

std::vector<uint32_t> RankedNodes::CountEqual(float rank) const {
  std::vector<uint32_t> equal(runs_.size());
  ForBlocks([&](size_t r, size_t, std::span<const float>, std::span<const float> ranks) {
    equal[r] += static_cast<uint32_t>(std::count(ranks.begin(), ranks.end(), rank));
  });
  return equal;
}

// A quickselect that keeps what is surely taken on the left.
Cut FindCut(std::vector<RankedNode>* nodes, uint64_t tokens, double mass) {
  const auto better = [](const RankedNode& a, const RankedNode& b) { return a.rank > b.rank; };
  auto lo = nodes->begin(), hi = nodes->end();
  uint64_t tokens_left = tokens;
  double mass_left = mass;
  // [begin, lo) is taken; the cut lies in [lo, hi).
  while (hi - lo > 1) {
    auto middle = lo + (hi - lo) / 2;
    std::nth_element(lo, middle, hi, better);
    const auto left_tokens = static_cast<uint64_t>(middle - lo);
    double left_mass = 0;
    for (auto it = lo; it != middle; ++it) left_mass += it->mass;
    if (left_tokens >= tokens_left || left_mass >= mass_left) {
      hi = middle;
    } else {
      tokens_left -= left_tokens;
      mass_left -= left_mass;
      lo = middle;
    }
  }
  Cut cut{lo->rank};
  for (auto it = nodes->begin(); it <= lo; ++it) {
    cut.ties += it->rank == cut.threshold ? 1 : 0;
    cut.mass += it->mass;
  }
  cut.all_ties = std::none_of(lo + 1, nodes->end(), [&](const RankedNode& node) {
    return node.rank == cut.threshold;
  });
  return cut;
}

}  // namespace quarry

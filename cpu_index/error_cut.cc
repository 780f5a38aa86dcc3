#include "cpu_index/error_cut.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cpu_index/simd.h"

namespace quarry {
namespace {

constexpr int kBins = ScoreHistogram::kBins;
constexpr float kPerNat = ScoreHistogram::kPerNat;
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kAll = std::numeric_limits<float>::infinity();
// Where groups alone come near to what is allowed, tokens need not be much better than they.
constexpr double kBesideGroups = 1.4;

// e^(-(b + 0.5) / kPerNat)
const std::array<float, kBins>& MassOfBin() {
  static const std::array<float, kBins> mass = [] {
    std::array<float, kBins> out;
    for (int b = 0; b < kBins; ++b) out[b] = std::exp(-(static_cast<float>(b) + 0.5f) / kPerNat);
    return out;
  }();
  return mass;
}

// How much more than the least that is refined a token has to weigh to be read exactly. A byte should
// take away as much of the squared error wherever it is read: of a token that is refined a row takes
// away 1, of one that is read exactly key and value, four times as long, refined_part^2.
int ExactAboveBins(float refined_part) {
  return static_cast<int>(kPerNat * std::max(0.0f, std::log(2 / std::max(refined_part, 1e-4f))));
}

}  // namespace

ScoreHistogram ScoreHistogram::Of(std::span<const float> scores) {
  ScoreHistogram out;
  const float most = Kernels().max(scores.data(), scores.size());
  if (most == kNone) {
    out.count.back() = static_cast<uint32_t>(scores.size());
    return out;
  }
  out.top = std::ceil(most * kPerNat) / kPerNat;
  Kernels().histogram(scores.data(), scores.size(), out.top, kPerNat, out.count.data());
  return out;
}

void ScoreHistogram::Add(const ScoreHistogram& other) {
  if (other.top > top) {
    const ScoreHistogram mine = *this;
    *this = other;
    return Add(mine);
  }
  // In this order what is no number, of two tops that are none, is far below.
  const int lower = static_cast<int>(std::min(float{kBins}, (top - other.top) * kPerNat));
  for (int b = 0; b < kBins; ++b) count[std::min(b + lower, kBins - 1)] += other.count[b];
}

float ScoreHistogram::Below(int bins) const {
  return bins == 0 ? kAll : std::nextafter(top - static_cast<float>(bins) / kPerNat, kAll);
}

uint64_t ScoreHistogram::CountFrom(float least) const {
  uint64_t from = 0;
  for (int b = 0; b < kBins - 1 && Below(b + 1) >= least; ++b) from += count[b];
  return from;
}

std::vector<uint32_t> ShareTokens(std::span<const ScoreHistogram> wanted, uint32_t most) {
  ScoreHistogram all;
  for (const ScoreHistogram& one : wanted) all.Add(one);
  uint64_t tokens = 0;
  int cut = 0;  // the first bin of which none is read
  while (cut < kBins - 1 && tokens + all.count[cut] <= most) tokens += all.count[cut++];
  std::vector<uint32_t> shares;
  for (const ScoreHistogram& one : wanted) {
    shares.push_back(static_cast<uint32_t>(one.CountFrom(all.Below(cut))));
  }
  return shares;
}

ErrorCut FindErrorCut(const ErrorCutInput& in) {
  const std::array<float, kBins>& mass = MassOfBin();
  const std::array<uint32_t, kBins>& count = in.tokens.count;
  const double doubt = double{in.token_doubt} * in.token_doubt;
  const double refined_part = double{in.refined_part} * in.refined_part;
  const auto squares_of = [&](int b) { return doubt * mass[b] * mass[b] * count[b]; };
  const auto common_of = [&](int b) {
    return double{in.token_doubt} * in.common_part * mass[b] * count[b];
  };
  double squares = 0, common = in.closed, refined = 0;
  for (int b = 0; b < kBins - 1; ++b) {  // the last one holds what cannot be seen
    squares += squares_of(b);
    common += common_of(b);
  }
  const double allowed = std::max<double>(in.allowed, kBesideGroups * in.closed);
  const auto left = [&] { return squares + refined + common * common; };
  const int exact_above = ExactAboveBins(in.refined_part);
  uint64_t tokens = 0;
  int cut = 0;  // the first bin that is not refined
  for (const uint32_t most = std::min(in.surely_most, in.most_tokens); cut < kBins - 1; ++cut) {
    if (in.tokens.Below(cut + 1) < in.surely_from || tokens + count[cut] > most) break;
    tokens += count[cut];
    squares -= squares_of(cut);
    common -= common_of(cut);
  }
  int exact = cut;  // the first bin that is not read exactly
  for (; cut < kBins - 1 && left() > allowed * allowed; ++cut) {
    if (tokens + count[cut] > in.most_tokens) break;
    tokens += count[cut];
    squares -= squares_of(cut);
    common -= common_of(cut);
    refined += refined_part * squares_of(cut);
    if (cut - exact >= exact_above) refined -= refined_part * squares_of(exact++);
  }
  for (; exact < cut && left() > allowed * allowed; ++exact) {
    refined -= refined_part * squares_of(exact);
  }
  return {in.tokens.Below(cut), in.tokens.Below(exact),
          static_cast<float>(std::sqrt(std::max(0.0, squares + refined) + common * common)),
          static_cast<float>(common), tokens};
}

float OpenFrom(const ScoreHistogram& weights, float allowed) {
  if (weights.top == kNone) return kAll;
  const std::array<float, kBins>& mass = MassOfBin();
  const double most = std::exp(double{allowed} - weights.top);
  double sum = 0;
  for (int b = kBins - 2; b >= 0; --b) {
    sum += double{mass[b]} * weights.count[b];
    if (sum > most) return weights.Below(b + 1);
  }
  return kAll;
}

}  // namespace quarry

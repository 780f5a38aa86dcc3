#include "perf/retrieval/truth.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "proto/check.h"

namespace quarry::perf {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();
constexpr uint32_t kBest = 100;
constexpr uint32_t kEveryToken = 1024;  // the oracle's error is known at each up to here
constexpr uint32_t kStepShare = 256;    // then at every 256th part of what there is already
// The oracle stops where what is left could not move the answer visibly.
constexpr double kNegligibleMass = 1e-9;

double Dot(const float* a, const float* b, uint32_t n) {
  double sum[4] = {};
  for (uint32_t d = 0; d < n; d += 4) {
    for (uint32_t j = 0; j < 4 && d + j < n; ++j) sum[j] += double{a[d + j]} * b[d + j];
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Softmax attention over some tokens; scores is by token.
struct Sum {
  std::vector<double> o;
  double lse = kNothing;
};

// Weighs tokens by e^(z - shift), so that sums of several sets can be added.
class Accumulator {
 public:
  Accumulator(const WideHead& head, double shift) : head_(head), shift_(shift), acc_(head.head_dim) {}
  void Add(uint32_t token, double z) {
    const double w = std::exp(z - shift_);
    const float* v = head_.v + size_t{token} * head_.head_dim;
    for (uint32_t d = 0; d < head_.head_dim; ++d) acc_[d] += w * v[d];
    weight_ += w;
  }
  Sum Finish() const {
    Sum out{acc_, kNothing};
    if (weight_ == 0) return out;
    for (double& x : out.o) x /= weight_;
    out.lse = shift_ + std::log(weight_);
    return out;
  }
  double weight() const { return weight_; }

 private:
  const WideHead& head_;
  const double shift_;
  std::vector<double> acc_;
  double weight_ = 0;
};

std::vector<double> Merge(std::span<const double> a, double lse_a, std::span<const double> b,
                          double lse_b) {
  std::vector<double> out(a.size(), 0.0);
  const double largest = std::max(lse_a, lse_b);
  if (largest == kNothing) return out;
  const double wa = std::exp(lse_a - largest), wb = std::exp(lse_b - largest);
  for (size_t d = 0; d < out.size(); ++d) out[d] = (wa * a[d] + wb * b[d]) / (wa + wb);
  return out;
}

double Length(std::span<const double> a) {
  double squares = 0;
  for (double x : a) squares += x * x;
  return std::sqrt(squares);
}

// |a - b| / |b|; of nothing, |a|.
double RelativeError(std::span<const double> a, std::span<const double> b) {
  double difference = 0, norm = 0;
  for (size_t d = 0; d < b.size(); ++d) {
    difference += (a[d] - b[d]) * (a[d] - b[d]);
    norm += b[d] * b[d];
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

// The curve of the oracle: its first tokens, best first, merged with the window.
std::vector<OraclePoint> OracleCurve(const WideHead& head, std::span<const double> z,
                                     std::span<const uint32_t> order, const QueryTruth& truth) {
  std::vector<OraclePoint> out;
  const auto offer = [&](uint32_t tokens, const Sum& sum) {
    const double error =
        RelativeError(Merge(truth.window_o, truth.window_lse, sum.o, sum.lse), truth.full_o);
    if (!out.empty() && error >= out.back().error) return;
    out.push_back({tokens, error, RelativeError(sum.o, truth.rest_o)});
  };
  offer(0, Sum{std::vector<double>(head.head_dim, 0.0), kNothing});
  if (order.empty()) return out;
  Accumulator taken(head, truth.rest_lse);
  uint32_t next = 1;
  for (uint32_t i = 0; i < order.size(); ++i) {
    taken.Add(order[i], z[order[i] - truth.rest.lo]);
    const bool last = i + 1 == order.size() || 1.0 - taken.weight() < kNegligibleMass;
    if (i + 1 >= next || last) {
      offer(i + 1, taken.Finish());
      next = i + 1 < kEveryToken ? i + 2 : i + 1 + (i + 1) / kStepShare;
    }
    if (last) break;
  }
  return out;
}

// Of all the softmax mass, what a token of the rest holds.
double ShareOf(const QueryTruth& truth, uint32_t token) {
  const double largest = std::max(truth.window_lse, truth.rest_lse);
  const double all =
      largest + std::log(std::exp(truth.window_lse - largest) + std::exp(truth.rest_lse - largest));
  return std::exp(truth.log_share[token - truth.rest.lo] + truth.rest_lse - all);
}

// `attended(token, i)`: whether the i-th best token was.
template <typename Attended>
void JudgeHeavy(const QueryTruth& truth, const Attended& attended, Quality* quality) {
  for (uint32_t i = 0; i < truth.best.size(); ++i) {
    const double share = ShareOf(truth, truth.best[i]);
    const bool heavy = share >= kHeavyShare, missed = !attended(truth.best[i], i);
    quality->heavy += heavy ? 1 : 0;
    quality->heavy_missed += heavy && missed ? 1 : 0;
    if (missed) quality->missed_share = std::max(quality->missed_share, share);
  }
}

}  // namespace

QueryTruth ComputeTruth(const WideHead& head, std::span<const float> q, double scale,
                        uint32_t visible, const Window& window) {
  QUARRY_CHECK(q.size() == head.head_dim);
  QueryTruth truth;
  truth.rest = window.Rest(visible);
  std::vector<double> z(visible);
  for (uint32_t t = 0; t < visible; ++t) {
    z[t] = Dot(q.data(), head.k + size_t{t} * head.head_dim, head.head_dim) * scale;
  }
  const double largest = visible == 0 ? 0 : *std::max_element(z.begin(), z.end());
  Accumulator window_sum(head, largest), rest_sum(head, largest);
  for (uint32_t t = 0; t < visible; ++t) {
    (t >= truth.rest.lo && t < truth.rest.hi ? rest_sum : window_sum).Add(t, z[t]);
  }
  Sum in_window = window_sum.Finish(), in_rest = rest_sum.Finish();
  truth.window_lse = in_window.lse;
  truth.rest_lse = in_rest.lse;
  truth.full_o = Merge(in_window.o, in_window.lse, in_rest.o, in_rest.lse);
  truth.window_o = std::move(in_window.o);
  truth.rest_o = std::move(in_rest.o);

  const std::span<const double> rest_z =
      std::span(z).subspan(truth.rest.empty() ? 0 : truth.rest.lo, truth.rest.size());
  for (double score : rest_z) {
    truth.log_share.push_back(static_cast<float>(score - truth.rest_lse));
  }
  std::vector<uint32_t> order(truth.rest.size());
  std::iota(order.begin(), order.end(), truth.rest.lo);
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return z[a] > z[b] || (z[a] == z[b] && a < b); });
  truth.best.assign(order.begin(), order.begin() + std::min<size_t>(kBest, order.size()));
  truth.oracle = OracleCurve(head, rest_z, order, truth);
  order.resize(truth.oracle.back().tokens);
  truth.order = std::move(order);
  return truth;
}

float WindowLength(const WideHead& head, std::span<const float> q, double scale, uint32_t visible,
                   const Window& window) {
  const TokenRange rest = window.Rest(visible);
  std::vector<std::pair<uint32_t, double>> scores;
  double largest = kNothing;
  for (uint32_t t = 0; t < visible; ++t) {
    if (t >= rest.lo && t < rest.hi) continue;
    const double z = Dot(q.data(), head.k + size_t{t} * head.head_dim, head.head_dim) * scale;
    scores.emplace_back(t, z);
    largest = std::max(largest, z);
  }
  Accumulator sum(head, largest);
  for (const auto& [token, z] : scores) sum.Add(token, z);
  const Sum in_window = sum.Finish();
  return static_cast<float>(in_window.lse + std::log(Length(in_window.o)));
}

double ShareOfMerged(const QueryTruth& truth, std::span<const float> o, float lse) {
  const std::vector<double> mine(o.begin(), o.end());
  const double largest = std::max(truth.window_lse, double{lse});
  if (lse == -std::numeric_limits<float>::infinity()) return 0;
  const double all = std::exp(truth.window_lse - largest) + std::exp(lse - largest);
  const double merged = Length(Merge(truth.window_o, truth.window_lse, mine, double{lse}));
  return std::exp(lse - largest) / all * Length(mine) / std::max(merged, 1e-30);
}

Quality Judge(const QueryTruth& truth, std::span<const uint32_t> attended, std::span<const float> o,
              float lse) {
  QUARRY_CHECK(o.size() == truth.full_o.size());
  Quality quality;
  std::vector<uint32_t> sorted(attended.begin(), attended.end());
  std::sort(sorted.begin(), sorted.end());
  QUARRY_CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end());
  const auto was_attended = [&sorted](uint32_t token, uint32_t) {
    return std::binary_search(sorted.begin(), sorted.end(), token);
  };
  const auto hits = std::count_if(truth.best.begin(), truth.best.end(),
                                  [&](uint32_t token) { return was_attended(token, 0); });
  JudgeHeavy(truth, was_attended, &quality);
  quality.recall_at_100 =
      truth.best.empty() ? 1.0 : static_cast<double>(hits) / static_cast<double>(truth.best.size());
  for (uint32_t token : sorted) {
    QUARRY_CHECK(token >= truth.rest.lo && token < truth.rest.hi);
    quality.mass += std::exp(double{truth.log_share[token - truth.rest.lo]});
  }
  if (truth.rest.empty()) quality.mass = 1.0;
  const std::vector<double> mine(o.begin(), o.end());
  quality.partial_rel_l2 = RelativeError(mine, truth.rest_o);
  quality.rel_l2 =
      RelativeError(Merge(truth.window_o, truth.window_lse, mine, double{lse}), truth.full_o);
  return quality;
}

Quality OracleQuality(const QueryTruth& truth, uint32_t tokens) {
  const auto point = std::find_if(truth.oracle.begin(), truth.oracle.end(),
                                  [&](const OraclePoint& p) { return p.tokens == tokens; });
  QUARRY_CHECK(point != truth.oracle.end());
  Quality quality;
  quality.rel_l2 = point->error;
  quality.partial_rel_l2 = point->partial;
  const size_t best = truth.best.size();
  quality.recall_at_100 =
      best == 0 ? 1.0
                : static_cast<double>(std::min<size_t>(tokens, best)) / static_cast<double>(best);
  for (uint32_t i = 0; i < tokens; ++i) {
    quality.mass += std::exp(double{truth.log_share[truth.order[i] - truth.rest.lo]});
  }
  if (truth.rest.empty()) quality.mass = 1.0;
  JudgeHeavy(
      truth, [tokens](uint32_t, uint32_t i) { return i < tokens; }, &quality);
  return quality;
}

uint32_t OracleTokens(const QueryTruth& truth, double error) {
  const auto enough = std::find_if(truth.oracle.begin(), truth.oracle.end(),
                                   [&](const OraclePoint& p) { return p.error <= error; });
  return enough == truth.oracle.end() ? truth.oracle.back().tokens : enough->tokens;
}

}  // namespace quarry::perf

// What a clustered index learns from its run and from sampled queries: how far its estimates can be
// trusted, and what makes them better.
#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_index/balanced_tree.h"
#include "cpu_index/cluster_index.h"
#include "cpu_index/run_rows.h"
#include "cpu_index/simd.h"
#include "proto/half.h"

namespace quarry {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr uint32_t kWidth = KeyCodes::kCoordinates;
constexpr uint32_t kInsideTokens = 4096;  // that say how tokens lie in their nodes
constexpr uint32_t kSlopeTokens = 8192;   // that say how values go with keys
constexpr uint32_t kAttendedBy = 32;      // sampled queries that say which tokens these are
constexpr double kEvenShare = 0.2;        // of them, whether attended or not
// Codes may be right for most tokens; of one that holds much of the mass they are not believed.
constexpr float kLeastTokenDoubt = 0.7f;
constexpr uint32_t kToldQueries = 16;     // that say what estimates are worth

// Some of the queries [][head_dim], evenly spread.
std::vector<float> Spread(std::span<const float> queries, uint32_t head_dim, uint32_t most) {
  const size_t n = queries.size() / head_dim, taken = std::min<size_t>(n, most);
  std::vector<float> out;
  for (size_t i = 0; i < taken; ++i) {
    const auto row = queries.subspan((2 * i + 1) * n / (2 * taken) * head_dim, head_dim);
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

// About `count` places of the order, each as often as its token's share says.
std::vector<uint32_t> Draw(std::span<const double> share, std::span<const uint32_t> order,
                           uint32_t count) {
  std::vector<uint32_t> out;
  double sum = 0;
  for (uint32_t at = 0; at < order.size(); ++at) {
    sum += share[order[at]] * count;
    while (sum >= static_cast<double>(out.size()) + 0.5) out.push_back(at);
  }
  return out;
}

}  // namespace

ClusterIndex::Inside ClusterIndex::LookInside(std::span<const float> rows, uint32_t node_rows,
                                              float lost_variance) {
  const auto n = static_cast<uint32_t>(rows.size() / kWidth);
  const uint32_t nodes = (n + node_rows - 1) / node_rows;
  const uint32_t taken = std::min(nodes, std::max(1u, kInsideTokens / node_rows));
  Matrix covariance = Matrix::Zero(kWidth, kWidth);
  double tokens = 0;
  for (uint32_t i = 0; i < taken; ++i) {
    const uint32_t lo = static_cast<uint32_t>(uint64_t{i} * nodes / taken) * node_rows;
    const uint32_t count = std::min(node_rows, n - lo);
    Matrix dy = Eigen::Map<const Matrix>(rows.data() + size_t{lo} * kWidth, count, kWidth);
    dy.rowwise() -= dy.colwise().mean().eval();
    covariance += dy.transpose() * dy;
    tokens += count;
  }
  covariance /= static_cast<float>(tokens);
  Inside inside;
  inside.covariance.assign(covariance.data(), covariance.data() + covariance.size());
  inside.lost_variance = lost_variance;
  inside.variance = covariance.trace() + lost_variance;
  return inside;
}

// How often the sampled queries attend each token, and a little of every token: [tokens], sums
// to 1.
std::vector<double> ClusterIndex::AttendedShare(const KvView& run,
                                                std::span<const float> queries) const {
  const std::vector<float> q = Spread(queries, run.head_dim, kAttendedBy);
  std::vector<double> share(tokens(), 1.0 / tokens());
  const auto told = static_cast<uint32_t>(q.size() / run.head_dim);
  if (told == 0) return share;
  const std::vector<TokenRange> ranges(told, run.tokens());
  const QueryBlock block{q.data(), DType::kFp32, told, run.head_dim, 1.0f, ranges};
  CoarseScores scores;
  ExactScan().Score(run, block, &scores);
  for (double& x : share) x *= kEvenShare;
  std::vector<float> w;
  for (uint32_t i = 0; i < told; ++i) {
    w.assign(scores.Row(i).begin(), scores.Row(i).end());
    const double sum = Kernels().exp_sum(w.data(), w.size(), Kernels().max(w.data(), w.size()));
    for (uint32_t t = 0; t < w.size(); ++t) share[t] += (1 - kEvenShare) * w[t] / sum / told;
  }
  return share;
}

// slopes: how values go with what is missed of keys, where queries look.
void ClusterIndex::LearnSlopes(const KvView& run, std::span<const float> queries) {
  const RunRows keys(run, KvPart::kKey), values(run, KvPart::kValue);
  const uint32_t d = run.head_dim, rank = basis_.rank;
  const std::vector<uint32_t> chosen = Draw(AttendedShare(run, queries), order_, kSlopeTokens);
  const auto m = static_cast<Eigen::Index>(chosen.size());
  Matrix v(m, d), missed(m, d), codes(m, rank), leaf(m, rank), super(m, rank);
  std::vector<float> centre(kWidth);
  for (Eigen::Index i = 0; i < m; ++i) {
    const uint32_t at = chosen[i];
    keys.Widen(order_[at], missed.row(i).data());
    values.Widen(order_[at], v.row(i).data());
    leaves_.Centre(at / kLeafRows, centre);
    std::copy_n(centre.begin(), rank, leaf.row(i).data());
    supers_.Centre(at / kSuperRows, centre);
    std::copy_n(centre.begin(), rank, super.row(i).data());
    codes_.Decode(at, std::span(codes.row(i).data(), rank));
    codes.row(i) *= Bf16ToFloat(scale_[at]);
  }
  const Eigen::Map<const Eigen::RowVectorXf> mean(basis_.mean.data(), d);
  const Eigen::Map<const Matrix> dual(basis_.query_map.data(), rank, d);
  missed.rowwise() -= mean;
  missed.noalias() -= (leaf + codes) * dual;
  v.rowwise() -= v.colwise().mean().eval();
  missed.rowwise() -= missed.colwise().mean().eval();
  v /= static_cast<float>(m);
  Matrix slope = v.transpose() * missed;
  const auto keep = [&](std::vector<float>* out) {
    out->assign(slope.data(), slope.data() + slope.size());
  };
  keep(&token_slope_);
  slope.noalias() += (v.transpose() * codes) * dual;
  keep(&inside_leaf_.slope);
  slope.noalias() += (v.transpose() * (leaf - super)) * dual;
  keep(&inside_super_.slope);
}

void ClusterIndex::LearnDoubts(const KvView& run, std::span<const float> queries) {
  const std::vector<float> q = Spread(queries, run.head_dim, kToldQueries);
  const auto told = static_cast<uint32_t>(q.size() / run.head_dim);
  if (told == 0) return;
  std::vector<float> acc(q.size()), answers(q.size());
  const std::vector<TokenRange> ranges(told, run.tokens());
  std::vector<Partial> partials(told);
  for (uint32_t i = 0; i < told; ++i) {
    partials[i].acc = std::span(acc).subspan(size_t{i} * run.head_dim, run.head_dim);
  }
  const QueryBlock block{q.data(), DType::kFp32, told, run.head_dim, 1.0f, ranges};
  ExactScan().AttendAll(run, block, partials);
  for (uint32_t i = 0; i < told; ++i) {
    partials[i].Finish(std::span(answers).subspan(size_t{i} * run.head_dim, run.head_dim));
  }
  Calibrate(run, block, answers);
}

// What estimates are worth where nothing is refined: root mean squares over sampled queries of
// errors by the answers' lengths; those of tokens also by the square root of the sum of their
// weights' squares, since they are independent.
void ClusterIndex::Calibrate(const KvView& run, const QueryBlock& queries,
                             std::span<const float> answers) {
  const uint32_t head_dim = queries.head_dim;
  std::vector<float> acc(size_t{queries.queries} * head_dim), o(head_dim);
  const RunAllotment none{std::vector<float>(queries.queries, HUGE_VALF),
                          std::vector<uint32_t>(queries.queries, 0)};
  CoarseScores coarse;
  double lengths = 0;
  const auto error_at = [&](Depth depth) {
    Look(run, queries, depth, &coarse);
    std::fill(acc.begin(), acc.end(), 0.0f);
    std::vector<Partial> partials(queries.queries);
    for (uint32_t i = 0; i < queries.queries; ++i) {
      partials[i].acc = std::span(acc).subspan(size_t{i} * head_dim, head_dim);
    }
    Estimate(queries, coarse, none, partials);
    double errors = 0;
    lengths = 0;
    for (uint32_t i = 0; i < queries.queries; ++i) {
      const float lse = partials[i].Finish(o);
      double difference = 0, length = 0, squares = 1;
      for (uint32_t d = 0; d < head_dim; ++d) {
        const double exact = answers[size_t{i} * head_dim + d];
        difference += (o[d] - exact) * (o[d] - exact);
        length += exact * exact;
      }
      if (depth == Depth::kTokens) {
        squares = 0;
        for (float z : coarse.Row(i)) squares += std::exp(2.0 * (z - lse));
      }
      lengths += length;
      errors += difference / std::max(length * squares, 1e-20);
    }
    return static_cast<float>(std::sqrt(errors / queries.queries));
  };
  super_doubt_ = std::clamp(error_at(Depth::kSupers), 1e-4f, 2.0f);
  leaf_doubt_ = std::clamp(error_at(Depth::kLeaves), 1e-4f, 2.0f);
  token_doubt_ = std::clamp(error_at(Depth::kTokens), kLeastTokenDoubt, 20.0f);
  log_length_ = static_cast<float>(0.5 * std::log(lengths / queries.queries + 1e-30));
}

}  // namespace quarry

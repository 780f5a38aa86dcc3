// What a clustered index learns from its run and from sampled queries: how far its estimates can be
// trusted, and what makes them better.
#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "cpu_index/balanced_tree.h"
#include "cpu_index/budget.h"
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
constexpr float kTried = 0.05f;  // a tolerated error
constexpr float kLeastRowDoubt = 0.15f;  // 4 bits of a value alone miss 0.11 of it
constexpr uint32_t kRefinedTokens = 256;  // that single out what is common to the others
constexpr uint32_t kToldQueries = 32;     // that say what estimates are worth

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

float RootMean(std::span<const double> squares) {
  const double sum = std::accumulate(squares.begin(), squares.end(), 0.0);
  return static_cast<float>(std::sqrt(sum / static_cast<double>(squares.size())));
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
  const uint32_t d = run.head_dim, rank = p_.codes.basis().rank;
  const std::vector<uint32_t> chosen = Draw(AttendedShare(run, queries), p_.order, kSlopeTokens);
  const auto m = static_cast<Eigen::Index>(chosen.size());
  Matrix v(m, d), missed(m, d), codes(m, rank), leaf(m, rank), super(m, rank);
  std::vector<float> centre(kWidth);
  for (Eigen::Index i = 0; i < m; ++i) {
    const uint32_t at = chosen[i];
    keys.Widen(p_.order[at], missed.row(i).data());
    values.Widen(p_.order[at], v.row(i).data());
    p_.leaves.Centre(at / kLeafRows, centre);
    std::copy_n(centre.begin(), rank, leaf.row(i).data());
    p_.supers.Centre(at / kSuperRows, centre);
    std::copy_n(centre.begin(), rank, super.row(i).data());
    p_.codes.Decode(at, std::span(codes.row(i).data(), rank));
    codes.row(i) *= Bf16ToFloat(p_.scale[at]);
  }
  const Eigen::Map<const Eigen::RowVectorXf> mean(p_.basis.mean.data(), d);
  const Eigen::Map<const Matrix> dual(p_.basis.query_map.data(), rank, d);
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

// Sampled queries and their exact answers.
struct ClusterIndex::Sampled {
  const KvView& run;
  std::vector<float> q;
  std::vector<TokenRange> ranges;
  QueryBlock queries;
  std::vector<float> answers;  // [queries][head_dim]
  double mean_square = 0;      // of the answers' lengths

  QueryBlock Query(uint32_t i) const {
    QueryBlock one = queries;
    one.q += size_t{i} * queries.head_dim;
    one.queries = 1;
    one.ranges = one.ranges.subspan(i, 1);
    return one;
  }
};

void ClusterIndex::LearnDoubts(const KvView& run, std::span<const float> queries) {
  Sampled s{run, Spread(queries, run.head_dim, kToldQueries), {}, {}, {}, 0};
  const auto told = static_cast<uint32_t>(s.q.size() / run.head_dim);
  if (told == 0) return;
  s.ranges.assign(told, run.tokens());
  s.queries = {s.q.data(), DType::kFp32, told, run.head_dim, 1.0f, s.ranges};
  s.answers.resize(s.q.size());
  std::vector<float> acc(s.q.size());
  std::vector<Partial> partials(told);
  for (uint32_t i = 0; i < told; ++i) {
    partials[i].acc = std::span(acc).subspan(size_t{i} * run.head_dim, run.head_dim);
  }
  ExactScan().AttendAll(run, s.queries, partials);
  for (uint32_t i = 0; i < told; ++i) {
    partials[i].Finish(std::span(s.answers).subspan(size_t{i} * run.head_dim, run.head_dim));
  }
  for (float x : s.answers) s.mean_square += double{x} * x / told;
  Calibrate(s);
}

std::vector<float> ClusterIndex::Answers(const Sampled& sampled, const CoarseScores& coarse,
                                         Refined refined) const {
  std::vector<float> out(sampled.answers.size()), scores, acc(head_dim());
  CoarseScores one = coarse;  // of each query alone: a block's queries share what is refined
  for (uint32_t i = 0; i < sampled.queries.queries; ++i) {
    const QueryBlock query = sampled.Query(i);
    one.score.assign(coarse.Row(i).begin(), coarse.Row(i).end());
    RunAllotment allotment{{HUGE_VALF}, {0}, {}};
    if (!refined.exactly) allotment.exact = {HUGE_VALF};
    if (refined.tokens > 0 && one.score.size() > refined.tokens) {
      scores = one.score;
      std::nth_element(scores.begin(), scores.begin() + refined.tokens, scores.end(),
                       std::greater<>());
      allotment.threshold[0] = scores[refined.tokens];
    }
    std::fill(acc.begin(), acc.end(), 0.0f);
    Partial partial{.acc = acc};
    Refine(sampled.run, query, one, allotment, {&partial, 1});
    partial.Finish(std::span(out).subspan(size_t{i} * head_dim(), head_dim()));
  }
  return out;
}

std::vector<double> ClusterIndex::Errors(const Sampled& sampled, std::span<const float> answers,
                                         std::span<const float> wanted) const {
  std::vector<double> errors;
  for (size_t lo = 0; lo < answers.size(); lo += head_dim()) {
    double difference = 0, length = 1e-30;
    for (size_t at = lo; at < lo + head_dim(); ++at) {
      const double from = double{answers[at]} - wanted[at];
      difference += from * from;
      length += double{sampled.answers[at]} * sampled.answers[at];
    }
    errors.push_back(difference / length);
  }
  return errors;
}

void ClusterIndex::Calibrate(const Sampled& sampled) {
  log_length_ = static_cast<float>(0.5 * std::log(sampled.mean_square + 1e-30));
  std::vector<Unrest> unrest;
  const QueryBasis::Coordinates at = p_.basis.EncodeQueries(sampled.queries);
  for (uint32_t i = 0; i < sampled.queries.queries; ++i) {
    unrest.push_back(UnrestOf(at.Row(i).first(p_.codes.basis().rank)));
  }
  const auto of_level = [&](Depth depth, float Unrest::*part) {
    CoarseScores coarse;
    Look(sampled.run, sampled.queries, depth, &coarse);
    std::vector<double> squares =
        Errors(sampled, Answers(sampled, coarse, {}), sampled.answers);
    for (size_t i = 0; i < squares.size(); ++i) {
      squares[i] /= double{unrest[i].*part} * (unrest[i].*part);
    }
    return std::clamp<float>(RootMean(squares), 1e-4f, 2.0f);
  };
  super_doubt_ = of_level(Depth::kSupers, &Unrest::super);
  leaf_doubt_ = of_level(Depth::kLeaves, &Unrest::leaf);
  CalibrateTokens(sampled, unrest);
  ChooseDepth(sampled);
}

// Where estimates of groups are not to be trusted, every code is read.
void ClusterIndex::ChooseDepth(const Sampled& sampled) {
  const auto missed = [&](bool open_all) {
    open_all_ = open_all;
    std::vector<double> errors = Errors(sampled, AnswersWithin(sampled, kTried), sampled.answers);
    for (double& square : errors) square *= square;  // what is seldom but large counts
    return std::sqrt(RootMean(errors));
  };
  const float all = missed(true), groups = missed(false);
  open_all_ = groups > 1.5f * kTried && groups > 1.5f * all;
}

// Answers of an error that is tolerated, [queries][head_dim].
std::vector<float> ClusterIndex::AnswersWithin(const Sampled& sampled, float tolerance) const {
  std::vector<float> out(sampled.answers.size()), acc(head_dim());
  Budget budget;
  budget.kind = Budget::Kind::kError;
  budget.error = tolerance;
  for (uint32_t i = 0; i < sampled.queries.queries; ++i) {
    QueryBlock query = sampled.Query(i);
    query.tolerance = tolerance;
    CoarseScores coarse;
    Score(sampled.run, query, &coarse);
    const RunScores scores{&coarse, 0};
    RunShare share;
    AllocateBudget(budget, {&scores, 1}, {&share, 1});
    std::fill(acc.begin(), acc.end(), 0.0f);
    Partial partial{.acc = acc};
    Refine(sampled.run, query, coarse, {{share.threshold}, {share.ties}, {share.exact}},
           {&partial, 1});
    partial.Finish(std::span(out).subspan(size_t{i} * head_dim(), head_dim()));
  }
  return out;
}

// Without the best tokens, what is common to the others is left; the rest is the single tokens'.
void ClusterIndex::CalibrateTokens(const Sampled& sampled, std::span<const Unrest> unrest) {
  CoarseScores coarse;
  Look(sampled.run, sampled.queries, Depth::kTokens, &coarse);
  const std::vector<float> refined = Answers(sampled, coarse, {kRefinedTokens, true});
  std::vector<double> single = Errors(sampled, Answers(sampled, coarse, {}), sampled.answers);
  std::vector<double> common = Errors(sampled, refined, sampled.answers);
  std::vector<double> by_rows =
      Errors(sampled, Answers(sampled, coarse, {kRefinedTokens, false}), refined);
  std::vector<double> share;  // of the squares of single tokens' masses
  std::vector<float> scores;
  for (uint32_t i = 0; i < sampled.queries.queries; ++i) {
    scores.assign(coarse.Row(i).begin(), coarse.Row(i).end());
    std::sort(scores.begin(), scores.end(), std::greater<>());
    double mass = 0, squares = 0, tail = 0, tail_squares = 0;
    for (size_t t = 0; t < scores.size(); ++t) {
      const double w = std::exp(double{scores[t]} - scores[0]);
      mass += w;
      squares += w * w;
      tail += t < kRefinedTokens ? 0 : w;
      tail_squares += t < kRefinedTokens ? 0 : w * w;
    }
    const double usual = double{unrest[i].token} * unrest[i].token;
    by_rows[i] *= mass * mass / ((squares - tail_squares) * usual);
    common[i] = tail > 0 ? common[i] * (mass / tail) * (mass / tail) / usual : 0;
    share.push_back(squares * usual / (mass * mass));
  }
  common_doubt_ = std::clamp<float>(RootMean(common), 1e-4f, 2.0f);
  for (size_t i = 0; i < share.size(); ++i) {
    const double shared = double{common_doubt_} * unrest[i].token;
    single[i] = std::max(0.0, single[i] - shared * shared) / share[i];
  }
  token_doubt_ = std::clamp<float>(RootMean(single), kLeastTokenDoubt, 20.0f);
  row_doubt_ = std::clamp<float>(RootMean(by_rows), kLeastRowDoubt, token_doubt_);
}

}  // namespace quarry

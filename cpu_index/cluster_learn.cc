#include "cpu_index/cluster_learn.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/balanced_tree.h"
#include "cpu_index/cluster_calibrate.h"
#include "cpu_index/cluster_rows.h"
#include "cpu_index/run_rows.h"
#include "cpu_index/simd.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr uint32_t kWidth = KeyCodes::kCoordinates;
constexpr uint32_t kTrials = 2;           // runs that tell how runs of the head are
constexpr uint32_t kInsideTokens = 4096;  // that say how tokens lie in their nodes
constexpr uint32_t kSlopeTokens = 8192;   // that say how values go with keys
constexpr uint32_t kAttendedBy = 32;      // sampled queries that say which tokens these are
constexpr double kEvenShare = 0.2;        // of them, whether attended or not

// A run that the model is learned from.
struct Trial {
  const KvView* run;
  std::vector<uint32_t> order;     // TreeOrder
  std::vector<float> coordinates;  // [tokens][head_dim], in that order
  std::unique_ptr<ClusterIndex> index;
};

Trial MakeTrial(const KvView& run, const QueryBasis& basis) {
  Trial trial{&run, TreeOrder(run, basis), {}, nullptr};
  const auto tokens = static_cast<uint32_t>(trial.order.size());
  trial.coordinates.resize(size_t{tokens} * run.head_dim);
  OrderedKeys(run, trial.order, basis).Read(0, tokens, trial.coordinates.data());
  return trial;
}

// About `count` places of the order, each as often as its token's share says.
std::vector<uint32_t> Draw(std::span<const double> share, std::span<const uint32_t> order,
                           double count) {
  std::vector<uint32_t> out;
  double sum = 0;
  for (uint32_t at = 0; at < order.size(); ++at) {
    sum += share[order[at]] * count;
    while (sum >= static_cast<double>(out.size()) + 0.5) out.push_back(at);
  }
  return out;
}

ClusterModel::Inside LookInside(std::span<const Trial> trials, uint32_t node_rows,
                                float lost_variance) {
  Matrix covariance = Matrix::Zero(kWidth, kWidth);
  double tokens = 0;
  for (const Trial& trial : trials) {
    const auto n = static_cast<uint32_t>(trial.order.size());
    const uint32_t d = trial.run->head_dim, width = std::min(d, kWidth);
    const uint32_t nodes = (n + node_rows - 1) / node_rows;
    const uint32_t taken = std::min(nodes, std::max(1u, kInsideTokens / node_rows));
    for (uint32_t i = 0; i < taken; ++i) {
      const uint32_t lo = static_cast<uint32_t>(uint64_t{i} * nodes / taken) * node_rows;
      const uint32_t count = std::min(node_rows, n - lo);
      Matrix dy = Eigen::Map<const Matrix>(trial.coordinates.data() + size_t{lo} * d, count, d)
                      .leftCols(width);
      dy.rowwise() -= dy.colwise().mean().eval();
      covariance.topLeftCorner(width, width) += dy.transpose() * dy;
      tokens += count;
    }
  }
  covariance /= static_cast<float>(tokens);
  ClusterModel::Inside inside;
  inside.covariance.assign(covariance.data(), covariance.data() + covariance.size());
  inside.variance = covariance.trace() + lost_variance;
  return inside;
}

// How often the sampled queries attend each token of a trial, and a little of every token: [tokens],
// sums to 1.
std::vector<double> AttendedShare(const KvView& run, std::span<const float> queries) {
  const std::vector<float> q = SpreadQueries(queries, run.head_dim, kAttendedBy);
  const uint32_t tokens = run.tokens().size();
  std::vector<double> share(tokens, 1.0 / tokens);
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

// What tokens of the trials have, as they are attended, a row each.
struct SlopeRows {
  Matrix values, missed, codes, leaf, super;
  SlopeRows(Eigen::Index rows, uint32_t head_dim, uint32_t rank)
      : values(rows, head_dim), missed(rows, head_dim), codes(rows, rank), leaf(rows, rank),
        super(rows, rank) {}
};

SlopeRows GatherRows(const ClusterModel& m, std::span<const Trial> trials,
                     std::span<const float> queries) {
  std::vector<std::vector<uint32_t>> chosen;
  Eigen::Index rows = 0;
  for (const Trial& trial : trials) {
    chosen.push_back(Draw(AttendedShare(*trial.run, queries), trial.order,
                          static_cast<double>(kSlopeTokens) / static_cast<double>(trials.size())));
    rows += static_cast<Eigen::Index>(chosen.back().size());
  }
  SlopeRows out(rows, m.head_dim(), m.rank());
  std::vector<float> centre(kWidth);
  Eigen::Index row = 0;
  for (size_t t = 0; t < trials.size(); ++t) {
    const ClusterIndex::Parts& p = trials[t].index->parts();
    const RunRows keys(*trials[t].run, KvPart::kKey), values(*trials[t].run, KvPart::kValue);
    for (uint32_t at : chosen[t]) {
      keys.Widen(p.order[at], out.missed.row(row).data());
      values.Widen(p.order[at], out.values.row(row).data());
      p.leaves.Centre(at / kLeafRows, m.centre_step, centre);
      std::copy_n(centre.begin(), m.rank(), out.leaf.row(row).data());
      p.supers.Centre(at / kSuperRows, m.centre_step, centre);
      std::copy_n(centre.begin(), m.rank(), out.super.row(row).data());
      p.codes.Decode(at, std::span(out.codes.row(row).data(), m.rank()));
      out.codes.row(row++) *= Bf16ToFloat(p.scale[at]);
    }
  }
  return out;
}

// How values go with what is missed of keys, where queries look.
void LearnSlopes(std::span<const Trial> trials, std::span<const float> queries, ClusterModel* m) {
  SlopeRows r = GatherRows(*m, trials, queries);
  const uint32_t d = m->head_dim();
  const Eigen::Map<const Eigen::RowVectorXf> mean(m->basis.mean.data(), d);
  const Eigen::Map<const Matrix> dual(m->basis.query_map.data(), m->rank(), d);
  r.missed.rowwise() -= mean;
  r.missed.noalias() -= (r.leaf + r.codes) * dual;
  r.values.rowwise() -= r.values.colwise().mean().eval();
  r.missed.rowwise() -= r.missed.colwise().mean().eval();
  r.values /= static_cast<float>(r.values.rows());
  Matrix slope = r.values.transpose() * r.missed;
  const std::span<const float> numbers(slope.data(), static_cast<size_t>(slope.size()));
  m->token_slope = RoundedToBf16(numbers);
  slope.noalias() += (r.values.transpose() * r.codes) * dual;
  m->leaf.slope = RoundedToBf16(numbers);
  slope.noalias() += (r.values.transpose() * (r.leaf - r.super)) * dual;
  m->super.slope = RoundedToBf16(numbers);
}

// Means over the trials.
void AddMean(std::span<const float> of_one, size_t trials, std::vector<float>* mean) {
  mean->resize(of_one.size());
  for (size_t i = 0; i < of_one.size(); ++i) (*mean)[i] += of_one[i] / static_cast<float>(trials);
}

// [head_dim] root mean squares of leaves' means around their super's, and of tokens' values around
// their leaf's.
void LearnDeviations(std::span<const Trial> trials, ClusterModel* m) {
  const uint32_t d = m->head_dim();
  std::vector<double> of_leaves(d), of_tokens(d);
  const auto add = [d](const float* x, const float* mean, std::vector<double>* squares) {
    for (uint32_t i = 0; i < d; ++i) (*squares)[i] += (x[i] - mean[i]) * (x[i] - mean[i]);
  };
  double leaves = 0, tokens = 0;
  for (const Trial& trial : trials) {
    OrderedValues values(*trial.run, trial.order);
    const uint32_t apart = trial.order.size() < kSuperRows ? 1 : 4;
    for (uint32_t super = 0; super * kSuperRows < trial.order.size(); ++super) {
      values.Read(super);
      for (uint32_t leaf = 0; leaf < values.leaves(); ++leaf, ++leaves) {
        add(values.LeafMean(leaf), values.mean().data(), &of_leaves);
        for (uint32_t t = 0; t < values.leaf_tokens(leaf); t += apart, ++tokens) {
          add(values.Leaf(leaf) + size_t{t} * d, values.LeafMean(leaf), &of_tokens);
        }
      }
    }
  }
  for (uint32_t i = 0; i < d; ++i) {
    m->leaf_deviation.push_back(static_cast<float>(std::sqrt(of_leaves[i] / leaves)));
    m->token_deviation.push_back(static_cast<float>(std::sqrt(of_tokens[i] / tokens)));
  }
}

// Quantisers for what the trials' tokens differ in from their leaves.
void LearnQuantisers(std::span<const Trial> trials, ClusterModel* m) {
  const uint32_t d = m->head_dim();
  m->centre_step.assign(kWidth, 0.0f);
  for (const Trial& trial : trials) {
    const std::vector<float> step = NodeLevel::StepFor(trial.coordinates, d, kLeafRows);
    for (uint32_t c = 0; c < kWidth; ++c) m->centre_step[c] = std::max(m->centre_step[c], step[c]);
  }
  std::vector<std::vector<float>> differences;
  for (const Trial& trial : trials) {
    std::vector<float>& rows = differences.emplace_back(trial.coordinates);
    NodeLevel leaves(static_cast<uint32_t>(trial.order.size()), kLeafRows);
    for (uint32_t leaf = 0; leaf < leaves.nodes(); ++leaf) {
      StoreLeaf(leaf, d, m->centre_step, m->lost_variance, rows.data() + size_t{leaf} * kLeafRows * d,
                &leaves);
    }
    AddMean(SecondMoments(rows, d), trials.size(), &m->difference_variance);
  }
  const Equaliser equaliser(m->difference_variance);
  for (std::vector<float>& rows : differences) {
    std::vector<uint16_t> scale(rows.size() / d);
    equaliser.Equalise(rows, scale);
    AddMean(SecondMoments(rows, d), trials.size(), &m->row_variance);
  }
  for (const std::vector<float>& rows : differences) {
    KeyCodes codes(m->CodeBasis(), static_cast<uint32_t>(rows.size() / d));
    codes.Store(0, rows, d);
    AddMean(codes.ErrorVariance(rows, d), trials.size(), &m->code_error);
  }
  LearnDeviations(trials, m);
}

absl::Status LearnBasis(std::span<const KvView> runs, std::span<const float> queries,
                        ClusterModel* m) {
  // One behind another, whatever lies between them.
  std::vector<KvSegment> all;
  uint32_t tokens = 0;
  for (const KvView& run : runs) {
    for (KvSegment segment : run.segments) {
      const uint32_t size = segment.tokens.size();
      segment.tokens = {tokens, tokens + size};
      tokens += size;
      all.push_back(segment);
    }
  }
  const KvView whole{all, runs.front().head_dim, runs.front().dtype};
  QUARRY_ASSIGN_OR_RETURN(m->basis, FitQueryBasis(whole, queries, whole.head_dim));
  m->lost_variance =
      std::accumulate(m->basis.variance.begin() + m->rank(), m->basis.variance.end(), 0.0f);
  m->query_map = RoundedToBf16(m->basis.query_map);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<LearnedClusters> LearnClusters(std::span<const KvView> runs,
                                              std::span<const float> queries,
                                              CodeReading reading, uint32_t group) {
  for (const KvView& run : runs) {
    if (!run.tokens().empty() && run.head_dim == runs.front().head_dim && run.head_dim % 16 == 0) {
      continue;
    }
    return absl::InvalidArgumentError(
        absl::StrCat("clusters of ", run.tokens().size(), " tokens, of head_dim ", run.head_dim,
                     ": wanted are tokens and a multiple of 16, the same for all runs"));
  }
  if (runs.empty()) return absl::InvalidArgumentError("clusters of no runs");
  if (group == 0 || queries.size() % (size_t{group} * runs.front().head_dim) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("clusters by ", queries.size(), " numbers of queries: no groups of ", group,
                     " of head_dim ", runs.front().head_dim));
  }
  auto model = std::make_shared<ClusterModel>();
  QUARRY_RETURN_IF_ERROR(LearnBasis(runs, queries, model.get()));
  std::vector<Trial> trials;
  const size_t count = std::min<size_t>(kTrials, runs.size());
  for (size_t i = 0; i < count; ++i) {
    const KvView& run = runs[(2 * i + 1) * runs.size() / (2 * count)];
    trials.push_back(MakeTrial(run, model->basis));
  }
  LearnQuantisers(trials, model.get());
  model->leaf = LookInside(trials, kLeafRows, model->lost_variance);
  model->super = LookInside(trials, kSuperRows, model->lost_variance);
  for (Trial& trial : trials) trial.index = ClusterIndex::Build(*trial.run, model, trial.order);
  LearnSlopes(trials, queries, model.get());
  LearnedClusters out;
  for (const KvView& run : runs) {
    const auto trial = std::find_if(trials.begin(), trials.end(),
                                    [&](const Trial& t) { return t.run == &run; });
    if (trial != trials.end()) {
      out.indexes.push_back(std::move(trial->index));
      continue;
    }
    QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<ClusterIndex> index, ClusterIndex::Build(run, model));
    out.indexes.push_back(std::move(index));
  }
  CalibrateClusters(runs, out.indexes, queries, group, reading, model.get());
  out.model = std::move(model);
  return out;
}

}  // namespace quarry

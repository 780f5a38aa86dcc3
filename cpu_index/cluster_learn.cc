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
constexpr uint32_t kLookedTokens = 4096;  // of each, that say how tokens lie in their nodes
constexpr uint32_t kSlopeTokens = 8192;   // that say how values go with keys
constexpr uint32_t kAttendedBy = 32;      // sampled queries that say which tokens these are
constexpr double kEvenShare = 0.2;        // of them, whether attended or not

// A run that the model is learned from.
struct Trial {
  const KvView* run;
  std::vector<uint32_t> order;     // TreeOrder
  std::vector<uint32_t> looked;    // those of some supers, evenly spread
  std::vector<float> coordinates;  // [looked][head_dim]
  std::unique_ptr<ClusterIndex> index;
};

Trial MakeTrial(const KvView& run, const QueryBasis& basis) {
  Trial trial{&run, TreeOrder(run, basis), {}, {}, nullptr};
  const size_t tokens = trial.order.size(), supers = (tokens + kSuperRows - 1) / kSuperRows;
  const size_t taken = std::min<size_t>(supers, kLookedTokens / kSuperRows);
  for (size_t i = 0; i < taken; ++i) {
    const size_t lo = (i + 1) * supers / taken * kSuperRows - kSuperRows;
    const std::span<const uint32_t> rest = std::span<const uint32_t>(trial.order).subspan(lo);
    const auto super = rest.first(std::min<size_t>(rest.size(), kSuperRows));
    trial.looked.insert(trial.looked.end(), super.begin(), super.end());
  }
  trial.coordinates.resize(trial.looked.size() * run.head_dim);
  OrderedKeys(run, trial.looked, basis)
      .Read(0, static_cast<uint32_t>(trial.looked.size()), trial.coordinates.data());
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
    const auto n = static_cast<uint32_t>(trial.looked.size());
    const uint32_t d = trial.run->head_dim, width = std::min(d, kWidth);
    for (uint32_t lo = 0; lo < n; lo += node_rows) {
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

// Sums of products of tokens' values, and what goes with them, as the tokens are attended.
class Products {
 public:
  // What stands in a row beside a value: the key but for the mean one, and in the codes'
  // coordinates its code, its leaf's centre and its super's.
  explicit Products(const ClusterModel& model)
      : m_(model),
        d_(model.head_dim()),
        width_(d_ + 3 * Padded(model.rank())),
        sums_(Matrix::Zero(d_, width_)),
        value_sum_(Eigen::VectorXd::Zero(d_)),
        row_sum_(Eigen::RowVectorXd::Zero(width_)),
        value_(d_),
        centre_(kWidth),
        values_(d_, kTileRows),
        rows_(Matrix::Zero(kTileRows, width_)) {}

  // Places of a trial's order.
  void Add(const Trial& trial, std::span<const uint32_t> places) {
    const ClusterIndex::Parts& p = trial.index->parts();
    const RunRows keys(*trial.run, KvPart::kKey), values(*trial.run, KvPart::kValue);
    for (uint32_t at : places) {
      float* const row = rows_.row(tile_rows_).data();
      keys.Widen(p.order[at], row);
      for (uint32_t i = 0; i < d_; ++i) row[i] -= m_.basis.mean[i];
      p.codes.Decode(at, std::span(row + Column(0), m_.rank()));
      for (uint32_t c = 0; c < m_.rank(); ++c) row[Column(0) + c] *= Bf16ToFloat(p.scale[at]);
      p.leaves.Centre(at / kLeafRows, m_.centre_step, centre_);
      std::copy_n(centre_.begin(), m_.rank(), row + Column(1));
      p.supers.Centre(at / kSuperRows, m_.centre_step, centre_);
      std::copy_n(centre_.begin(), m_.rank(), row + Column(2));
      values.Widen(p.order[at], value_.data());
      values_.col(tile_rows_) = Eigen::Map<const Eigen::VectorXf>(value_.data(), d_);
      if (++tile_rows_ == kTileRows) AddTile();
    }
  }

  // [head_dim][] means of the products of what values and these differ in from their means.
  struct Means {
    Matrix keys, codes, leaves, supers;
  };
  Means Finish() {
    AddTile();
    const Matrix means =
        ((sums_.cast<double>() - value_sum_ * row_sum_ / count_) / count_).cast<float>();
    const auto part = [&](uint32_t i) { return means.middleCols(Column(i), m_.rank()); };
    return {means.leftCols(d_), part(0), part(1), part(2)};
  }

 private:
  static constexpr uint32_t kTileRows = 128;
  static uint32_t Padded(uint32_t rank) { return (rank + 15) / 16 * 16; }
  uint32_t Column(uint32_t part) const { return d_ + part * Padded(m_.rank()); }

  void AddTile() {
    kernels::AccumulateTile tile{};
    tile.p = values_.data();
    tile.ld_p = kTileRows;
    tile.queries = d_;
    tile.head_dim = width_;
    tile.v = rows_.data();
    tile.tokens = tile_rows_;
    tile.dtype = kernels::kFp32;
    tile.acc = sums_.data();
    if (tile_rows_ > 0) Kernels().accumulate(tile);
    value_sum_ += values_.leftCols(tile_rows_).cast<double>().rowwise().sum();
    row_sum_ += rows_.topRows(tile_rows_).cast<double>().colwise().sum();
    count_ += tile_rows_;
    tile_rows_ = 0;
  }

  const ClusterModel& m_;
  const uint32_t d_, width_;
  Matrix sums_;  // [head_dim][width]
  Eigen::VectorXd value_sum_;
  Eigen::RowVectorXd row_sum_;
  double count_ = 0;
  std::vector<float> value_, centre_;
  Matrix values_, rows_;  // [head_dim][kTileRows], [kTileRows][width]
  uint32_t tile_rows_ = 0;
};

// How values go with what is missed of keys, where queries look.
void LearnSlopes(std::span<const Trial> trials, std::span<const float> queries, ClusterModel* m) {
  Products products(*m);
  for (const Trial& trial : trials) {
    products.Add(trial,
                 Draw(AttendedShare(*trial.run, queries), trial.order,
                      static_cast<double>(kSlopeTokens) / static_cast<double>(trials.size())));
  }
  const Products::Means mean = products.Finish();
  const Eigen::Map<const Matrix> dual(m->basis.query_map.data(), m->rank(), m->head_dim());
  const auto slope = [&](const Matrix& known) {
    const Matrix missed = mean.keys - known * dual;
    return RoundedToBf16({missed.data(), static_cast<size_t>(missed.size())});
  };
  m->token_slope = slope(mean.leaves + mean.codes);
  m->leaf.slope = slope(mean.leaves);
  m->super.slope = slope(mean.supers);
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
    OrderedValues values(*trial.run, trial.looked);
    const uint32_t apart = trial.looked.size() < kSuperRows ? 1 : 4;
    for (uint32_t super = 0; super * kSuperRows < trial.looked.size(); ++super) {
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

// Quantisers for what the trials' tokens differ in from their leaves, which is left in place of the
// coordinates.
void LearnQuantisers(std::span<Trial> trials, ClusterModel* m) {
  const uint32_t d = m->head_dim();
  m->centre_step.assign(kWidth, 0.0f);
  for (const Trial& trial : trials) {
    const std::vector<float> step = NodeLevel::StepFor(trial.coordinates, d, kLeafRows);
    for (uint32_t c = 0; c < kWidth; ++c) m->centre_step[c] = std::max(m->centre_step[c], step[c]);
  }
  for (Trial& trial : trials) {
    std::vector<float>& rows = trial.coordinates;
    NodeLevel leaves(static_cast<uint32_t>(trial.looked.size()), kLeafRows);
    for (uint32_t leaf = 0; leaf < leaves.nodes(); ++leaf) {
      StoreLeaf(leaf, d, m->centre_step, m->lost_variance,
                rows.data() + size_t{leaf} * kLeafRows * d, &leaves);
    }
    AddMean(SecondMoments(rows, d), trials.size(), &m->difference_variance);
  }
  const Equaliser equaliser(m->difference_variance);
  for (Trial& trial : trials) {
    std::vector<uint16_t> scale(trial.looked.size());
    equaliser.Equalise(trial.coordinates, scale);
    AddMean(SecondMoments(trial.coordinates, d), trials.size(), &m->row_variance);
  }
  for (const Trial& trial : trials) {
    KeyCodes codes(m->CodeBasis(), static_cast<uint32_t>(trial.looked.size()));
    codes.Store(0, trial.coordinates, d);
    AddMean(codes.ErrorVariance(trial.coordinates, d), trials.size(), &m->code_error);
  }
  LearnDeviations(trials, m);
}

// Without rows, of one position each, that are far longer than most: one of them would outweigh all
// others in what is learned.
std::vector<float> WithoutOutliers(std::span<const float> queries, size_t row) {
  constexpr float kMost = 16;  // times as long as the median
  std::vector<float> squares;
  for (size_t at = 0; at < queries.size(); at += row) {
    float sum = 0;
    for (float x : queries.subspan(at, row)) sum += x * x;
    squares.push_back(sum);
  }
  std::vector<float> sorted = squares, out;
  const auto middle = sorted.begin() + static_cast<ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  for (size_t i = 0; i < squares.size(); ++i) {
    if (!(squares[i] <= kMost * kMost * *middle)) continue;
    const std::span<const float> one = queries.subspan(i * row, row);
    out.insert(out.end(), one.begin(), one.end());
  }
  return out;
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
                                              std::span<const float> sampled,
                                              const ClusterChoice& choice) {
  const uint32_t group = choice.group;
  for (const KvView& run : runs) {
    if (!run.tokens().empty() && run.head_dim == runs.front().head_dim && run.head_dim % 16 == 0) {
      continue;
    }
    return absl::InvalidArgumentError(
        absl::StrCat("clusters of ", run.tokens().size(), " tokens, of head_dim ", run.head_dim,
                     ": wanted are tokens and a multiple of 16, the same for all runs"));
  }
  if (runs.empty()) return absl::InvalidArgumentError("clusters of no runs");
  if (group == 0 || sampled.size() % (size_t{group} * runs.front().head_dim) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("clusters by ", sampled.size(),
                                                   " numbers of queries: no groups of ", group,
                                                   " of head_dim ", runs.front().head_dim));
  }
  const std::vector<float> queries =
      WithoutOutliers(sampled, size_t{group} * runs.front().head_dim);
  auto model = std::make_shared<ClusterModel>();
  QUARRY_RETURN_IF_ERROR(LearnBasis(runs, queries, model.get()));
  std::vector<Trial> trials;
  const size_t count = std::min<size_t>(kTrials, runs.size());
  for (size_t i = 0; i < count; ++i) {
    const KvView& run = runs[(2 * i + 1) * runs.size() / (2 * count)];
    trials.push_back(MakeTrial(run, model->basis));
  }
  model->leaf = LookInside(trials, kLeafRows, model->lost_variance);
  model->super = LookInside(trials, kSuperRows, model->lost_variance);
  LearnQuantisers(trials, model.get());
  for (Trial& trial : trials) {
    QUARRY_ASSIGN_OR_RETURN(trial.index, ClusterIndex::Build(*trial.run, model, trial.order));
  }
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
  CalibrateClusters(runs, out.indexes, queries, choice, model.get());
  model->scan_if_faster = choice.scan_if_faster;
  QUARRY_RETURN_IF_ERROR(model->Check());
  out.model = std::move(model);
  return out;
}

}  // namespace quarry

#include "cpu_index/cluster_calibrate.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "cpu_index/cluster_search.h"

namespace quarry {
namespace {

// Codes may be right for most tokens; of one that holds much of the mass they are not believed.
constexpr float kLeastTokenDoubt = 0.7f;
constexpr float kTried = 0.05f;           // a tolerated error
constexpr float kLeastRowDoubt = 0.15f;   // 4 bits of a value alone miss 0.11 of it
constexpr uint32_t kRefinedTokens = 256;  // that single out what is common to the others
constexpr uint32_t kToldQueries = 32;     // that say what estimates of groups are worth
constexpr uint32_t kTokenQueries = 12;    // and of tokens, over at most so many runs
constexpr size_t kTokenRuns = 4;

float RootMean(std::span<const double> squares) {
  const double sum = std::accumulate(squares.begin(), squares.end(), 0.0);
  return static_cast<float>(std::sqrt(sum / static_cast<double>(squares.size())));
}

// Sampled queries, and their exact answers over some runs.
class Sampled {
 public:
  Sampled(std::span<const KvView* const> views, std::span<const ClusterIndex* const> indexes,
          std::vector<float> queries)
      : q_(std::move(queries)), head_dim_(views.front()->head_dim) {
    count_ = static_cast<uint32_t>(q_.size() / head_dim_);
    for (size_t r = 0; r < views.size(); ++r) {
      ranges_.emplace_back(count_, views[r]->tokens());
      runs_.push_back({indexes[r], views[r], {}});
    }
    for (size_t r = 0; r < runs_.size(); ++r) runs_[r].ranges = ranges_[r];
    wanted_ = Exact();
    for (float x : wanted_) mean_square_ += double{x} * x / count_;
  }

  uint32_t count() const { return count_; }
  const std::vector<float>& wanted() const { return wanted_; }
  double mean_square() const { return mean_square_; }
  std::span<const float> Query(uint32_t i) const {
    return std::span(q_).subspan(size_t{i} * head_dim_, head_dim_);
  }

  // [queries][head_dim]: of each query alone, for a block's queries share what is refined.
  // predicted: may be null; [queries] the errors that the searches promise, by the answers' lengths.
  std::vector<float> Answers(const ClusterLimits& limits,
                             std::vector<double>* predicted = nullptr) const {
    std::vector<float> out(q_.size()), acc(head_dim_);
    for (uint32_t i = 0; i < count_; ++i) {
      std::vector<ClusterRun> runs = runs_;
      for (size_t r = 0; r < runs.size(); ++r) runs[r].ranges = runs[r].ranges.subspan(i, 1);
      const QueryBlock one{Query(i).data(), DType::kFp32, 1, head_dim_, 1.0f, {}};
      std::fill(acc.begin(), acc.end(), 0.0f);
      Partial partial{.acc = acc};
      SearchClusters(runs, one, limits, {&partial, 1});
      partial.Finish(std::span(out).subspan(size_t{i} * head_dim_, head_dim_));
      if (predicted != nullptr) predicted->push_back(partial.RelativeError());
    }
    return out;
  }

  // Per query, the squared distance between two answers, by the square of the exact one's length.
  std::vector<double> Errors(std::span<const float> answers, std::span<const float> from) const {
    std::vector<double> errors;
    for (size_t lo = 0; lo < answers.size(); lo += head_dim_) {
      double difference = 0, length = 1e-30;
      for (size_t at = lo; at < lo + head_dim_; ++at) {
        const double missed = double{answers[at]} - from[at];
        difference += missed * missed;
        length += double{wanted_[at]} * wanted_[at];
      }
      errors.push_back(difference / length);
    }
    return errors;
  }

  // Per query: the sums of what tokens weigh, of its square, and of both but for the best ones; by
  // the largest weight.
  struct Weights {
    double mass = 0, squares = 0, tail = 0, tail_squares = 0;
  };
  std::vector<Weights> TokenWeights() const {
    std::vector<std::vector<float>> scores(count_);
    for (const ClusterRun& run : runs_) {
      const QueryBlock block{q_.data(), DType::kFp32, count_, head_dim_, 1.0f, run.ranges};
      CoarseScores coarse;
      ExactScan().Score(*run.view, block, &coarse);
      for (uint32_t i = 0; i < count_; ++i) {
        scores[i].insert(scores[i].end(), coarse.Row(i).begin(), coarse.Row(i).end());
      }
    }
    std::vector<Weights> out;
    for (std::vector<float>& all : scores) {
      const size_t best = std::min<size_t>(kRefinedTokens, all.size() - 1);
      std::nth_element(all.begin(), all.begin() + static_cast<ptrdiff_t>(best), all.end(),
                       std::greater<>());
      const double top = *std::max_element(all.begin(), all.begin() + static_cast<ptrdiff_t>(best) + 1);
      Weights& w = out.emplace_back();
      for (size_t t = 0; t < all.size(); ++t) {
        const double weight = std::exp(all[t] - top);
        w.mass += weight;
        w.squares += weight * weight;
        if (t < best) continue;
        w.tail += weight;
        w.tail_squares += weight * weight;
      }
    }
    return out;
  }

 private:
  std::vector<float> Exact() const {
    std::vector<float> out(q_.size()), acc(q_.size());
    std::vector<Partial> partials(count_);
    for (uint32_t i = 0; i < count_; ++i) {
      partials[i].acc = std::span(acc).subspan(size_t{i} * head_dim_, head_dim_);
    }
    for (const ClusterRun& run : runs_) {
      const QueryBlock block{q_.data(), DType::kFp32, count_, head_dim_, 1.0f, run.ranges};
      ExactScan().AttendAll(*run.view, block, partials);
    }
    for (uint32_t i = 0; i < count_; ++i) {
      partials[i].Finish(std::span(out).subspan(size_t{i} * head_dim_, head_dim_));
    }
    return out;
  }

  const std::vector<float> q_;
  const uint32_t head_dim_;
  uint32_t count_ = 0;
  std::vector<std::vector<TokenRange>> ranges_;
  std::vector<ClusterRun> runs_;
  std::vector<float> wanted_;
  double mean_square_ = 0;  // of the answers' lengths
};

std::vector<ClusterModel::Unrest> UnrestOf(const Sampled& sampled, const ClusterModel& m) {
  std::vector<ClusterModel::Unrest> out;
  std::vector<float> y(m.head_dim());
  for (uint32_t i = 0; i < sampled.count(); ++i) {
    m.basis.EncodeQuery(sampled.Query(i), y);
    out.push_back(m.UnrestOf(m.CodeVariance(y, 1)[0], m.Breadth(m.leaf, y, 1)[0],
                             m.Breadth(m.super, y, 1)[0]));
  }
  return out;
}

ClusterLimits Forced(ClusterLimits::Depth depth, uint32_t best_tokens) {
  ClusterLimits limits;
  limits.depth = depth;
  limits.best_tokens = best_tokens;
  return limits;
}

// Of all groups of a level, where none is opened.
float GroupDoubt(const Sampled& sampled, ClusterLimits::Depth depth,
                 std::span<const ClusterModel::Unrest> unrest, float ClusterModel::Unrest::*part) {
  std::vector<double> squares =
      sampled.Errors(sampled.Answers(Forced(depth, 0)), sampled.wanted());
  for (size_t i = 0; i < squares.size(); ++i) squares[i] /= double{unrest[i].*part} * (unrest[i].*part);
  return std::clamp<float>(RootMean(squares), 1e-4f, 2.0f);
}

// Without the best tokens, what is common to the others is left; the rest is the single tokens'.
void CalibrateTokens(const Sampled& sampled, ClusterModel* m) {
  using Depth = ClusterLimits::Depth;
  const std::vector<ClusterModel::Unrest> unrest = UnrestOf(sampled, *m);
  const std::vector<float> refined = sampled.Answers(Forced(Depth::kExact, kRefinedTokens));
  std::vector<double> single =
      sampled.Errors(sampled.Answers(Forced(Depth::kCodes, 0)), sampled.wanted());
  std::vector<double> common = sampled.Errors(refined, sampled.wanted());
  std::vector<double> by_rows =
      sampled.Errors(sampled.Answers(Forced(Depth::kRows, kRefinedTokens)), refined);
  const std::vector<Sampled::Weights> weights = sampled.TokenWeights();
  for (size_t i = 0; i < weights.size(); ++i) {
    const Sampled::Weights& w = weights[i];
    const double usual = double{unrest[i].token} * unrest[i].token;
    const double refined_squares = w.squares - w.tail_squares;
    by_rows[i] =
        refined_squares > 0 ? by_rows[i] * w.mass * w.mass / (refined_squares * usual) : 0;
    common[i] = w.tail > 0 ? common[i] * (w.mass / w.tail) * (w.mass / w.tail) / usual : 0;
  }
  m->common_doubt = std::clamp<float>(RootMean(common), 1e-4f, 2.0f);
  for (size_t i = 0; i < weights.size(); ++i) {
    const double shared = double{m->common_doubt} * unrest[i].token;
    const double usual = double{unrest[i].token} * unrest[i].token;
    single[i] = std::max(0.0, single[i] - shared * shared) /
                (weights[i].squares * usual / (weights[i].mass * weights[i].mass));
  }
  m->token_doubt = std::clamp<float>(RootMean(single), kLeastTokenDoubt, 20.0f);
  m->row_doubt = std::clamp<float>(RootMean(by_rows), kLeastRowDoubt, m->token_doubt);
}

// Where estimates of groups are not to be trusted, every code is read.
void ChooseDepth(const Sampled& sampled, ClusterModel* m) {
  ClusterLimits limits;
  limits.tolerance = kTried;
  const auto missed = [&](bool open_all) {
    m->open_all = open_all;
    std::vector<double> errors = sampled.Errors(sampled.Answers(limits), sampled.wanted());
    for (double& square : errors) square *= square;  // what is seldom but large counts
    return std::sqrt(RootMean(errors));
  };
  const float all = missed(true), groups = missed(false);
  m->open_all = groups > kTried && groups > all;
}

// Doubts were learned one by one; what they promise together is held against what is missed.
void ScaleDoubts(const Sampled& sampled, ClusterModel* m) {
  // With some room, and little less than they were: they are held against each other at one tolerance,
  // of the queries that they were learned from, and groups' doubts are true where all stay closed.
  constexpr float kRoom = 1.25f, kLeast = 0.85f, kMost = 4;
  ClusterLimits limits;
  limits.tolerance = kTried;
  std::vector<double> predicted;
  std::vector<double> errors =
      sampled.Errors(sampled.Answers(limits, &predicted), sampled.wanted());
  for (double& p : predicted) p *= p;
  const float promised = RootMean(predicted), missed = RootMean(errors);
  if (!(promised > 0)) return;
  const float factor = std::clamp(kRoom * missed / promised, kLeast, kMost);
  for (float* doubt : {&m->super_doubt, &m->leaf_doubt, &m->common_doubt, &m->token_doubt,
                       &m->row_doubt}) {
    *doubt *= factor;
  }
}

}  // namespace

std::vector<float> SpreadQueries(std::span<const float> queries, uint32_t head_dim,
                                 uint32_t most) {
  const size_t n = queries.size() / head_dim, taken = std::min<size_t>(n, most);
  std::vector<float> out;
  for (size_t i = 0; i < taken; ++i) {
    const auto row = queries.subspan((2 * i + 1) * n / (2 * taken) * head_dim, head_dim);
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

void CalibrateClusters(std::span<const KvView> runs,
                       std::span<const std::unique_ptr<ClusterIndex>> indexes,
                       std::span<const float> queries, CodeReading reading, ClusterModel* model) {
  model->open_all = reading == CodeReading::kAll;
  std::vector<const KvView*> views, some_views;
  std::vector<const ClusterIndex*> all, some;
  for (size_t r = 0; r < runs.size(); ++r) {
    views.push_back(&runs[r]);
    all.push_back(indexes[r].get());
    model->learned_tokens += runs[r].tokens().size();
  }
  const size_t taken = std::min(kTokenRuns, runs.size());
  for (size_t i = 0; i < taken; ++i) {
    some_views.push_back(views[(2 * i + 1) * runs.size() / (2 * taken)]);
    some.push_back(all[(2 * i + 1) * runs.size() / (2 * taken)]);
  }
  const uint32_t d = model->head_dim();
  model->learned_queries = static_cast<uint32_t>(queries.size() / d);
  if (model->learned_queries == 0) return;
  const Sampled sampled(views, all, SpreadQueries(queries, d, kToldQueries));
  model->log_length = static_cast<float>(0.5 * std::log(sampled.mean_square() + 1e-30));
  const std::vector<ClusterModel::Unrest> unrest = UnrestOf(sampled, *model);
  model->super_doubt = GroupDoubt(sampled, ClusterLimits::Depth::kSupers, unrest,
                                  &ClusterModel::Unrest::super);
  model->leaf_doubt =
      GroupDoubt(sampled, ClusterLimits::Depth::kLeaves, unrest, &ClusterModel::Unrest::leaf);
  CalibrateTokens(Sampled(some_views, some, SpreadQueries(queries, d, kTokenQueries)), model);
  if (reading == CodeReading::kLearned) ChooseDepth(sampled, model);
  ScaleDoubts(sampled, model);
}

}  // namespace quarry

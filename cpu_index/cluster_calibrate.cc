#include "cpu_index/cluster_calibrate.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>

#include "cpu_index/cluster_search.h"
#include "cpu_index/simd.h"

namespace quarry {
namespace {

// However well a few sampled queries were answered.
constexpr float kLeastTokenDoubt = 0.03f, kLeastRowDoubt = 0.01f;
constexpr uint32_t kRefinedTokens = 256;  // that single out what is common to the others
constexpr uint32_t kToldQueries = 32;     // that say what estimates of groups are worth
constexpr uint32_t kToldPositions = 16;   // that they are of at least
constexpr uint32_t kTokenQueries = 12;    // and of tokens, over at most so many runs
constexpr size_t kTokenRuns = 4;
constexpr uint32_t kMeasuredQueries = 256;  // that say how far queries go

float RootMean(std::span<const double> squares) {
  const double sum = std::accumulate(squares.begin(), squares.end(), 0.0);
  return static_cast<float>(std::sqrt(sum / static_cast<double>(squares.size())));
}

// The squares of what a search says that an answer may miss, by its length: of what errs independently,
// and of what adds up.
struct Promise {
  double apart, together;
  double Scaled(const Promise& factor) const {
    return factor.apart * apart + factor.together * together;
  }
};

// What a search says of an answer.
struct Told {
  Promise promise;
  ClusterSearch::Rows rows;
  float time = 0;  // of the search for it and others, by a scan's
};

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

  // [queries][head_dim], of `together` queries at once, which then share what they read.
  // told: may be null; of each query.
  std::vector<float> Answers(const ClusterLimits& limits, uint32_t together = 1,
                             std::vector<Told>* told = nullptr) const {
    std::vector<float> out(q_.size()), acc(q_.size());
    for (uint32_t lo = 0; lo < count_; lo += together) {
      const uint32_t n = std::min(together, count_ - lo);
      std::vector<ClusterRun> runs = runs_;
      for (size_t r = 0; r < runs.size(); ++r) runs[r].ranges = runs[r].ranges.subspan(lo, n);
      const QueryBlock block{Query(lo).data(), DType::kFp32, n, head_dim_, 1.0f, {}};
      std::vector<Partial> partials(n);
      for (uint32_t i = 0; i < n; ++i) partials[i].acc = Row(acc, lo + i);
      ClusterSearch search(runs, block, limits);
      do {
        search.RunPart(0);
      } while (search.Next());
      search.Finish(partials);
      const float time = search.Time();
      for (uint32_t i = 0; i < n; ++i) {
        partials[i].Finish(Row(out, lo + i));
        if (told == nullptr) continue;
        const double square = double{partials[i].RelativeError()} * partials[i].RelativeError();
        const double adds_up = square * search.TogetherShare(i);
        told->push_back({{square - adds_up, adds_up}, search.RowsOf(i), time});
      }
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
      const float top = Kernels().max(all.data(), best + 1);
      Kernels().exp_sum(all.data(), all.size(), top);
      const auto add = [&all](size_t lo, size_t hi, double* sum, double* squares) {
        for (size_t t = lo; t < hi; ++t) {
          *sum += all[t];
          *squares += double{all[t]} * all[t];
        }
      };
      Weights& w = out.emplace_back();
      add(best, all.size(), &w.tail, &w.tail_squares);
      w.mass = w.tail;
      w.squares = w.tail_squares;
      add(0, best, &w.mass, &w.squares);
    }
    return out;
  }

 private:
  std::span<float> Row(std::vector<float>& rows, uint32_t i) const {
    return std::span(rows).subspan(size_t{i} * head_dim_, head_dim_);
  }

  std::vector<float> Exact() const {
    std::vector<float> out(q_.size()), acc(q_.size());
    std::vector<Partial> partials(count_);
    for (uint32_t i = 0; i < count_; ++i) partials[i].acc = Row(acc, i);
    for (const ClusterRun& run : runs_) {
      const QueryBlock block{q_.data(), DType::kFp32, count_, head_dim_, 1.0f, run.ranges};
      ExactScan().AttendAll(*run.view, block, partials);
    }
    for (uint32_t i = 0; i < count_; ++i) partials[i].Finish(Row(out, i));
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
    const float code_variance = std::min(ClusterModel::kMostCodeVariance, m.CodeVariance(y, 1)[0]);
    out.push_back(
        m.UnrestOf(code_variance, m.Breadth(m.leaf, y, 1)[0], m.Breadth(m.super, y, 1)[0]));
  }
  return out;
}

float LargestVariance(std::span<const float> queries, const ClusterModel& m) {
  const uint32_t d = m.head_dim();
  float largest = 0;
  std::vector<float> y(d);
  for (size_t at = 0; at < queries.size(); at += d) {
    m.basis.EncodeQuery(queries.subspan(at, d), y);
    largest = std::max(largest, m.KeyVariance(y));
  }
  return largest;
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
  constexpr float kTolerated = ClusterModel::kTried[1];
  ClusterLimits limits;
  limits.tolerance = kTolerated;
  const auto missed = [&](bool open_all) {
    m->open_all = open_all;
    std::vector<double> errors = sampled.Errors(sampled.Answers(limits), sampled.wanted());
    for (double& square : errors) square *= square;  // what is seldom but large counts
    return std::sqrt(RootMean(errors));
  };
  const float all = missed(true), groups = missed(false);
  m->open_all = groups > kTolerated && groups > all;
}

// What answers missed, and what was promised with doubts as they were learned one by one.
struct Observed {
  double missed;
  Promise promise;
};

// Factors of both parts of a promise with the least mean square of the log of what was missed by what
// is promised, so that promises are right for most answers. A part that was hardly observed stays as
// it was learned.
Promise FitFactors(std::span<const Observed> observed) {
  constexpr double kWild = 2.2;    // a log, beyond which how far does not count
  constexpr double kPrior = 0.05;  // of all observations, that count for what was learned
  constexpr double kMost = 5;      // a log
  double apart = 0, together = 0;  // logs
  for (int round = 0; round < 6; ++round) {
    double aa = 0, at = 0, tt = 0, ay = 0, ty = 0, n = 0;
    for (const Observed& o : observed) {
      double a = std::exp(apart) * o.promise.apart, t = std::exp(together) * o.promise.together;
      const double all = a + t;
      if (!(all > 0)) continue;
      a /= all, t /= all;
      const double y = std::clamp(std::log(o.missed / all + 1e-9), -kWild, kWild);
      aa += a * a, at += a * t, tt += t * t, ay += a * y, ty += t * y, n += 1;
    }
    if (n == 0) break;
    aa += kPrior * n, ay -= kPrior * n * apart;
    tt += kPrior * n, ty -= kPrior * n * together;
    const double determinant = aa * tt - at * at;
    apart = std::clamp(apart + (ay * tt - ty * at) / determinant, -kMost, kMost);
    together = std::clamp(together + (ty * aa - ay * at) / determinant, -kMost, kMost);
  }
  return {std::exp(apart), std::exp(together)};
}

using Corrections = std::array<float, ClusterModel::kTried.size()>;

// observed: equally many at each tolerance. Of few positions little is believed.
Corrections CorrectionsOf(std::span<const Observed> observed, const Promise& factor,
                          uint32_t group) {
  constexpr double kPrior = 4;  // positions, that count for no correction
  constexpr double kMost = ClusterModel::kMostCorrection;
  Corrections out = {};
  const size_t each = observed.size() / out.size();
  for (size_t t = 0; t < out.size(); ++t) {
    double sum = 0, n = 0;
    for (const Observed& o : observed.subspan(t * each, each)) {
      const double promised = o.promise.Scaled(factor);
      if (!(promised > 0)) continue;
      sum += std::clamp(0.5 * std::log(o.missed / promised + 1e-9), -kMost, kMost);
      n += 1;
    }
    out[t] = static_cast<float>(sum / (n + kPrior * group));
  }
  // So much is left where most of an answer lies elsewhere, in a window, and there a prompt's
  // queries err less than those that are decoded, by half on a layer that attends what is near.
  out.front() = std::max(0.0f, out.front());
  return out;
}

float CautionOf(std::span<const Observed> observed, const Promise& factor,
                const Corrections& corrections) {
  constexpr double kWild = 9;  // a square, beyond which how far does not count
  constexpr float kMost = 2;
  const size_t each = observed.size() / corrections.size();
  double sum = 0;
  for (size_t i = 0; i < observed.size(); ++i) {
    const double promised =
        observed[i].promise.Scaled(factor) * std::exp(2.0 * corrections[i / each]);
    sum += promised > 0 ? std::min(observed[i].missed / promised, kWild) : 0;
  }
  return std::clamp(static_cast<float>(std::sqrt(sum / static_cast<double>(observed.size()))),
                    1.0f, kMost);
}

// What is decoded asks as the end of a prompt does, more or less: a quarter are of the last
// positions, the others are spread over all.
std::vector<float> ToldQueries(std::span<const float> queries, uint32_t row, uint32_t positions) {
  constexpr size_t kLate = 64;
  const size_t late = std::min(queries.size() / row / 4, kLate);
  const auto of_late = static_cast<uint32_t>(std::min<size_t>(late, positions / 4));
  std::vector<float> out = SpreadQueries(queries, row, positions - of_late);
  const std::vector<float> last = SpreadQueries(queries.last(late * row), row, of_late);
  out.insert(out.end(), last.begin(), last.end());
  return out;
}

// Doubts were learned one by one; what they promise together is held against what is missed, at
// tolerances between which budgets lie.
void ScaleDoubts(const Sampled& sampled, uint32_t group, ClusterModel* m) {
  const ClusterModel learned = *m;
  std::vector<Observed> observed;
  Promise factor{1, 1};
  // Where fewer of the expected rows are needed, centres tell nothing of single queries.
  constexpr double kTelling = 0.7;
  double expected = 0, needed = 0;  // rows
  float scans_from = 0;
  for (const float tolerance : ClusterModel::kTried) {
    ClusterLimits limits;
    limits.tolerance = tolerance;
    std::vector<Told> told;
    double time = 0;
    const std::vector<double> errors =
        sampled.Errors(sampled.Answers(limits, group, &told), sampled.wanted());
    for (size_t i = 0; i < errors.size(); ++i) {
      const Promise& promised = told[i].promise;
      observed.push_back(
          {errors[i], {promised.apart / factor.apart, promised.together / factor.together}});
      expected += static_cast<double>(told[i].rows.expected);
      needed += static_cast<double>(told[i].rows.needed);
      time += told[i].time;
    }
    // The smaller the error, the more is read. Doubts that are not fitted yet read too much.
    const bool fitted = tolerance < ClusterModel::kTried.front();
    if (fitted && scans_from == 0 &&
        time > ScanHistory::kWorthwhile * static_cast<double>(told.size())) {
      scans_from = tolerance;
    }
    factor = FitFactors(observed);
    const auto scaled = [](float doubt, double square) {
      return doubt * static_cast<float>(std::sqrt(square));
    };
    m->super_doubt = scaled(learned.super_doubt, factor.together);
    m->leaf_doubt = scaled(learned.leaf_doubt, factor.together);
    m->common_doubt = scaled(learned.common_doubt, factor.together);
    m->token_doubt = std::max(kLeastTokenDoubt, scaled(learned.token_doubt, factor.apart));
    m->row_doubt = std::max(kLeastRowDoubt, scaled(learned.row_doubt, factor.apart));
  }
  m->scans_from = scans_from;
  m->correction = CorrectionsOf(observed, factor, group);
  m->caution = CautionOf(observed, factor, m->correction);
  const double share = expected > 0 ? needed / expected : 0;
  m->needed_rows =
      share < kTelling ? 0 : std::min(static_cast<float>(share), ClusterModel::kMostNeededRows);
}

}  // namespace

std::vector<float> SpreadQueries(std::span<const float> queries, uint32_t row, uint32_t most) {
  const size_t n = queries.size() / row, taken = std::min<size_t>(n, most);
  std::vector<float> out;
  for (size_t i = 0; i < taken; ++i) {
    const auto one = queries.subspan((2 * i + 1) * n / (2 * taken) * row, row);
    out.insert(out.end(), one.begin(), one.end());
  }
  return out;
}

void CalibrateClusters(std::span<const KvView> runs,
                       std::span<const std::unique_ptr<ClusterIndex>> indexes,
                       std::span<const float> queries, const ClusterChoice& choice,
                       ClusterModel* model) {
  model->open_all = choice.codes == CodeReading::kAll;
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
  const uint32_t d = model->head_dim(), group = choice.group;
  model->learned_queries = static_cast<uint32_t>(queries.size() / d);
  if (model->learned_queries == 0) return;
  const uint32_t positions = std::max(kToldQueries / group, kToldPositions);
  const Sampled sampled(views, all, ToldQueries(queries, d * group, positions));
  model->log_length = static_cast<float>(0.5 * std::log(sampled.mean_square() + 1e-30));
  model->largest_variance = LargestVariance(SpreadQueries(queries, d, kMeasuredQueries), *model);
  const std::vector<ClusterModel::Unrest> unrest = UnrestOf(sampled, *model);
  model->super_doubt = GroupDoubt(sampled, ClusterLimits::Depth::kSupers, unrest,
                                  &ClusterModel::Unrest::super);
  model->leaf_doubt =
      GroupDoubt(sampled, ClusterLimits::Depth::kLeaves, unrest, &ClusterModel::Unrest::leaf);
  CalibrateTokens(Sampled(some_views, some, SpreadQueries(queries, d, kTokenQueries)), model);
  if (choice.codes == CodeReading::kLearned) ChooseDepth(sampled, model);
  ScaleDoubts(sampled, group, model);
}

}  // namespace quarry

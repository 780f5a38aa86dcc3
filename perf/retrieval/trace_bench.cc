#include "perf/retrieval/trace_bench.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/half.h"

namespace quarry::perf {
namespace {

// What the oracle is asked for.
constexpr double kOracleErrors[] = {0.1, 0.05, 0.02, 0.01, 0.005, 0.001};

std::vector<float> Widen(std::span<const std::byte> data, DType dtype) {
  std::vector<float> out(data.size() / DTypeBytes(dtype));
  for (size_t i = 0; i < out.size(); ++i) out[i] = LoadAsFloat(data.data(), i, dtype);
  return out;
}

void RoundTo(DType dtype, std::span<float> x) {
  if (dtype == DType::kFp32) return;
  for (float& f : x) {
    uint16_t bits = 0;
    StoreFromFloat(&bits, 0, dtype, f);
    f = LoadAsFloat(&bits, 0, dtype);
  }
}

uint32_t Processors() { return std::max(1u, std::thread::hardware_concurrency()); }

// f(thread, threads) on each of them, this one included.
template <typename F>
void OnThreads(uint32_t threads, F&& f) {
  std::vector<std::thread> others;
  for (uint32_t t = 1; t < threads; ++t) others.emplace_back(f, t, threads);
  f(0u, threads);
  for (std::thread& t : others) t.join();
}

double MeanOf(std::span<const double> x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

// Means and a quantile over the query heads of one KV head.
class QualityMeans {
 public:
  void Add(const Quality& quality, double tokens) {
    recall_ += quality.recall_at_100;
    mass_ += quality.mass;
    partial_ += quality.partial_rel_l2;
    tokens_ += tokens;
    heavy_ += quality.heavy;
    heavy_missed_ += quality.heavy_missed;
    missed_share_ = std::max(missed_share_, quality.missed_share);
    errors_.push_back(quality.rel_l2);
  }
  void Fill(Row* row) {
    const auto n = static_cast<double>(errors_.size());
    row->recall_at_100 = recall_ / n;
    row->mass = mass_ / n;
    row->partial_rel_l2 = partial_ / n;
    row->tokens_retrieved = tokens_ / n;
    for (double error : errors_) row->rel_l2 += error / n;
    std::sort(errors_.begin(), errors_.end());
    row->rel_l2_p95 = errors_[std::min(errors_.size() - 1, errors_.size() * 95 / 100)];
    row->rel_l2_max = errors_.back();
    row->queries = static_cast<uint32_t>(errors_.size());
    row->heavy = heavy_;
    row->heavy_missed = heavy_missed_;
    row->missed_share = missed_share_;
    row->lost = static_cast<uint32_t>(
        errors_.end() - std::upper_bound(errors_.begin(), errors_.end(), kLostError));
  }

 private:
  static constexpr double kLostError = 0.5;
  double recall_ = 0, mass_ = 0, partial_ = 0, tokens_ = 0;
  uint32_t heavy_ = 0, heavy_missed_ = 0;
  double missed_share_ = 0;
  std::vector<double> errors_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TraceBench>> TraceBench::Create(const Trace& trace,
                                                               const BenchSettings& settings) {
  std::unique_ptr<TraceBench> bench(new TraceBench(trace, settings));
  bench->ChooseQueries();
  if (bench->indexed_.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("trace ", trace.name, ": of ", trace.q_pos.size(), " test queries over ",
                     trace.tokens, " tokens none retrieves beside a window of ",
                     settings.window.first, " + ", settings.window.last));
  }
  const uint32_t heads =
      settings.kv_heads == 0 ? trace.kv_heads : std::min(settings.kv_heads, trace.kv_heads);
  bench->heads_.reserve(heads);
  for (uint32_t h = 0; h < heads; ++h) bench->AddHead(h);
  if (settings.samples == 0) return bench;
  size_t bytes = 0;
  for (const Head& head : bench->heads_) bytes += head.memory.bytes();
  bench->working_set_ = std::make_unique<WorkingSet>(bytes, settings.working_set_bytes);
  return bench;
}

void TraceBench::ChooseQueries() {
  std::vector<uint32_t> usable;
  for (uint32_t i = 0; i < trace_.q_pos.size(); ++i) {
    if (!settings_.window.Rest(trace_.q_pos[i] + 1).empty()) usable.push_back(i);
  }
  const auto choose = [this](const std::vector<uint32_t>& from) {
    const size_t count = std::min<size_t>(settings_.queries, from.size());
    for (size_t i = 0; i < count; ++i) chosen_.push_back(from[i * from.size() / count]);
    return static_cast<uint32_t>(count);
  };
  tests_ = choose(usable);
  indexed_ = {settings_.window.first, tests_ > 0 ? trace_.tokens : 0};
  for (uint32_t i = 0; i < tests_; ++i) {
    const TokenRange rest = settings_.window.Rest(trace_.q_pos[chosen_[i]] + 1);
    indexed_.hi = std::min(indexed_.hi, rest.hi);
    end_ = std::max(end_, rest.hi);
  }
  std::vector<uint32_t> others;
  std::set_difference(usable.begin(), usable.end(), chosen_.begin(), chosen_.end(),
                      std::back_inserter(others));
  choose(others);
}

void TraceBench::AddHead(uint32_t kv_head) {
  Head& head = heads_.emplace_back(Head{HeadMemory(trace_, kv_head), HeadClass::kUnknown, {}, {}});
  const std::vector<KvSegment> segments = head.memory.Segments({0, trace_.tokens});
  head.head_class = Classify(trace_, kv_head, head.memory.View(segments), settings_.window);
  for (uint32_t query : chosen_) {
    const std::span<const float> q = trace_.Queries(trace_.q, query, kv_head);
    head.q.insert(head.q.end(), q.begin(), q.end());
  }
  RoundTo(trace_.dtype, head.q);
  ComputeTruths(kv_head, &head);
}

void TraceBench::ComputeTruths(uint32_t kv_head, Head* head) const {
  const std::vector<float> k = Widen(trace_.Keys(kv_head), trace_.dtype);
  const std::vector<float> v = Widen(trace_.Values(kv_head), trace_.dtype);
  const WideHead wide{k.data(), v.data(), trace_.head_dim};
  head->truth.resize(tests_ * trace_.group());
  head->window.resize(chosen_.size() * trace_.group());
  OnThreads(Processors(), [&](uint32_t thread, uint32_t threads) {
    for (size_t i = thread; i < head->window.size(); i += threads) {
      const uint32_t visible = trace_.q_pos[chosen_[i / trace_.group()]] + 1;
      const auto q = std::span(head->q).subspan(i * trace_.head_dim, trace_.head_dim);
      head->window[i] = WindowLength(wide, q, trace_.scale, visible, settings_.window);
      if (i >= head->truth.size()) continue;
      head->truth[i] = ComputeTruth(wide, q, trace_.scale, visible, settings_.window);
    }
  });
}

absl::StatusOr<std::unique_ptr<IndexedHead>> TraceBench::BuildHead(const IndexSpec& spec,
                                                                   uint32_t runs,
                                                                   uint32_t kv_head) const {
  std::vector<float> train;
  for (uint32_t i = 0; i < trace_.q_train_pos.size(); ++i) {
    const std::span<const float> q = trace_.Queries(trace_.q_train, i, kv_head);
    train.insert(train.end(), q.begin(), q.end());
  }
  BuildInput input;
  input.train_queries = train;
  input.train_positions = trace_.q_train_pos;
  input.group = trace_.group();
  input.scale = trace_.scale;
  return IndexedHead::Build(spec, heads_[kv_head].memory, indexed_, end_, runs, input);
}

absl::StatusOr<TraceBench::Heads> TraceBench::BuildAll(const IndexSpec& spec,
                                                       uint32_t runs) const {
  Heads out(heads_.size());
  std::vector<absl::Status> statuses(heads_.size());
  OnThreads(spec.builds_on_one_thread ? Processors() : 1, [&](uint32_t thread, uint32_t threads) {
    for (uint32_t h = thread; h < heads_.size(); h += threads) {
      absl::StatusOr<std::unique_ptr<IndexedHead>> built = BuildHead(spec, runs, h);
      statuses[h] = built.status();
      if (built.ok()) out[h] = std::move(*built);
    }
  });
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return out;
}

std::vector<TokenRange> TraceBench::Ranges(uint32_t query) const {
  const TokenRange rest = settings_.window.Rest(trace_.q_pos[chosen_[query]] + 1);
  return std::vector<TokenRange>(trace_.group(), {rest.lo, std::min(rest.hi, end_)});
}

QueryBlock TraceBench::Queries(const Head& head, uint32_t query,
                               std::span<const TokenRange> ranges) const {
  return {head.q.data() + size_t{query} * trace_.group() * trace_.head_dim, trace_.dtype,
          trace_.group(), trace_.head_dim, trace_.scale, ranges};
}

// As the daemon, which holds the window's tokens too, can tell an index.
std::span<const float> TraceBench::Elsewhere(const Head& head, uint32_t query) const {
  return std::span(head.window).subspan(size_t{query} * trace_.group(), trace_.group());
}

Row TraceBench::RowOf(uint32_t kv_head) const {
  Row row;
  row.trace = trace_.name;
  row.layer = trace_.layer;
  row.head = kv_head;
  row.head_class = HeadClassName(heads_[kv_head].head_class);
  row.n = trace_.tokens;
  row.cache = "cold";
  return row;
}

void TraceBench::Teach(const Head& head, IndexedHead* indexed, const Budget& budget) const {
  if (!indexed->has_clusters()) return;
  indexed->Forget();
  HeadAnswer answer(/*lists=*/false);
  for (uint32_t i = tests_; i < chosen_.size(); ++i) {
    const std::vector<TokenRange> ranges = Ranges(i);
    answer.Answer(*indexed, Queries(head, i, ranges), Elsewhere(head, i), budget);
  }
}

void TraceBench::FillQuality(const Head& head, const IndexedHead& indexed, const SearchSpec& search,
                             Row* row) const {
  QualityMeans means;
  HeadAnswer answer;
  std::vector<float> o(trace_.head_dim);
  double predicted = 0, within = 0, bytes = 0;
  for (uint32_t i = 0; i < tests_; ++i) {
    const std::vector<TokenRange> ranges = Ranges(i);
    const QueryBlock queries = Queries(head, i, ranges);
    answer.Answer(indexed, queries, Elsewhere(head, i), search.budget);
    bytes += static_cast<double>(answer.bytes());
    for (uint32_t g = 0; g < trace_.group(); ++g) {
      const Partial& partial = answer.partials()[g];
      const float lse = partial.Finish(o);
      const QueryTruth& truth = head.truth[i * trace_.group() + g];
      const Quality quality = Judge(truth, answer.Attended(indexed, queries, g), o, lse);
      means.Add(quality, static_cast<double>(partial.tokens));
      const double promised = search.budget.kind == Budget::Kind::kError
                                  ? partial.RelativeError() * ShareOfMerged(truth, o, lse)
                                  : answer.lost_mass(g);
      predicted += promised;
      const double ratio = ErrorRatio(quality.rel_l2, promised);
      within += ratio <= 2 && ratio >= 0.5 ? 1 : 0;
    }
  }
  means.Fill(row);
  row->bytes_read = bytes / static_cast<double>(tests_);
  if (search.predicts) {
    row->predicted_error = predicted / static_cast<double>(head.truth.size());
    row->predicted_within_2x = within / static_cast<double>(head.truth.size());
  }
  double oracle = 0;
  for (const QueryTruth& truth : head.truth) oracle += OracleTokens(truth, row->rel_l2);
  row->oracle_tokens = oracle / static_cast<double>(head.truth.size());
}

absl::Status TraceBench::Measure(const IndexSpec& spec, uint32_t runs, const Sink& sink) const {
  absl::StatusOr<Heads> indexed = BuildAll(spec, runs);
  if (!indexed.ok()) return indexed.status();
  absl::StatusOr<Heads> scans = Heads();
  if (settings_.beside_scan) scans = BuildAll(ExactSpec(), runs);
  if (!scans.ok()) return scans.status();
  for (const SearchSpec& search : spec.searches) {
    std::vector<Row> rows(heads_.size());
    OnThreads(Processors(), [&](uint32_t thread, uint32_t threads) {
      for (uint32_t h = thread; h < heads_.size(); h += threads) {
        (*indexed)[h]->Prepare(search);
        Row& row = rows[h] = RowOf(h);
        row.index = search.name.empty() ? spec.name : absl::StrCat(spec.name, "/", search.name);
        row.budget = BudgetName(search.budget);
        row.runs = runs;
        row.build_core_s = (*indexed)[h]->build_core_s();
        row.bytes_per_token = (*indexed)[h]->bytes_per_token();
        Teach(heads_[h], (*indexed)[h].get(), search.budget);
        FillQuality(heads_[h], *(*indexed)[h], search, &row);
      }
    });
    if (settings_.samples == 0) {
      for (const Row& row : rows) sink(row);
      continue;
    }
    std::set<uint32_t> done;
    for (uint32_t threads : settings_.threads) {
      // Two answers at once must not share what they read.
      threads = std::clamp<uint32_t>(threads, 1, static_cast<uint32_t>(heads_.size()));
      if (!done.insert(threads).second) continue;
      for (uint32_t h = 0; h < heads_.size(); ++h) {
        Teach(heads_[h], (*indexed)[h].get(), search.budget);
      }
      Timed times = Time(*indexed, *scans, search.budget, threads);
      for (uint32_t h = 0; h < heads_.size(); ++h) {
        std::vector<double>& us = times.answers[h];
        std::sort(us.begin(), us.end());
        rows[h].threads = threads;
        rows[h].us_p50 = us[us.size() / 2];
        rows[h].us_mean = MeanOf(us);
        rows[h].us_p99 = us[us.size() * 99 / 100];
        if (settings_.beside_scan) {
          std::sort(times.scans[h].begin(), times.scans[h].end());
          rows[h].scan_us_p50 = times.scans[h][times.scans[h].size() / 2];
          rows[h].scan_us_mean = MeanOf(times.scans[h]);
        }
        sink(rows[h]);
      }
    }
  }
  return absl::OkStatus();
}

void TraceBench::MeasureOracle(const Sink& sink) const {
  const double row_bytes = 2.0 * trace_.head_dim * DTypeBytes(trace_.dtype);
  for (double error : kOracleErrors) {
    for (uint32_t h = 0; h < heads_.size(); ++h) {
      const Head& head = heads_[h];
      QualityMeans means;
      double bytes = 0;
      for (uint32_t i = 0; i < tests_; ++i) {
        std::set<uint32_t> shared;  // by the group
        for (uint32_t g = 0; g < trace_.group(); ++g) {
          const QueryTruth& truth = head.truth[i * trace_.group() + g];
          const uint32_t tokens = OracleTokens(truth, error);
          shared.insert(truth.order.begin(), truth.order.begin() + tokens);
          means.Add(OracleQuality(truth, tokens), tokens);
        }
        bytes += static_cast<double>(shared.size()) * row_bytes;
      }
      Row row = RowOf(h);
      row.index = "oracle";
      row.budget = absl::StrCat("error-", error);
      means.Fill(&row);
      row.oracle_tokens = row.tokens_retrieved;
      row.bytes_read = bytes / static_cast<double>(tests_);
      sink(row);
    }
  }
}

}  // namespace quarry::perf

#include "perf/retrieval/indexed_head.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <utility>

#include "cpu_index/budget.h"
#include "proto/check.h"

namespace quarry::perf {
namespace {

double CoreSeconds(clockid_t clock) {
  timespec now{};
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

TokenRange Part(TokenRange whole, uint32_t i, uint32_t parts) {
  const auto at = [&](uint32_t j) {
    return whole.lo + static_cast<uint32_t>(uint64_t{whole.size()} * j / parts);
  };
  return {at(i), at(i + 1)};
}

}  // namespace

absl::StatusOr<std::unique_ptr<IndexedHead>> IndexedHead::Build(const IndexSpec& spec,
                                                                const HeadMemory& memory,
                                                                TokenRange indexed, uint32_t end,
                                                                uint32_t runs, BuildInput input) {
  auto head = std::make_unique<IndexedHead>();
  head->units_.reserve(runs + 1);  // views keep pointing into the units
  const auto add = [&](TokenRange tokens) {
    Unit& unit = head->units_.emplace_back();
    unit.index = &ExactScan();
    unit.segments = memory.Segments(tokens);
    unit.view = memory.View(unit.segments);
  };
  for (uint32_t i = 0; i < runs; ++i) {
    const TokenRange tokens = Part(indexed, i, runs);
    if (!tokens.empty()) add(tokens);
  }
  std::vector<KvView> views;
  for (const Unit& unit : head->units_) views.push_back(unit.view);
  input.runs = views;
  const clockid_t clock =
      spec.builds_on_one_thread ? CLOCK_THREAD_CPUTIME_ID : CLOCK_PROCESS_CPUTIME_ID;
  const double before = CoreSeconds(clock);
  absl::StatusOr<std::vector<MadeIndex>> built = spec.build(input);
  if (!built.ok()) return built.status();
  uint64_t bytes = 0;
  for (size_t i = 0; i < built->size(); ++i) {
    bytes += (*built)[i].bytes + (i == 0 ? (*built)[i].shared_bytes : 0);
    if ((*built)[i].index == nullptr) continue;
    head->own_.push_back(std::move((*built)[i].index));
    head->units_[i].clusters = dynamic_cast<const ClusterIndex*>(head->own_.back().get());
    // Clusters are passed by, by the exact scan, where a budget is not of error.
    const auto* const tokens = dynamic_cast<const TokenIndex*>(head->own_.back().get());
    if (tokens != nullptr) head->units_[i].index = tokens;
  }
  head->build_core_s_ = head->own_.empty() ? 0 : CoreSeconds(clock) - before;
  head->bytes_per_token_ = static_cast<double>(bytes) / std::max(1u, indexed.size());
  if (end > indexed.hi) add({indexed.hi, end});
  return head;
}

void IndexedHead::Prepare(const SearchSpec& search) {
  if (search.prepare == nullptr) return;
  for (const std::unique_ptr<KeyIndex>& index : own_) search.prepare(index.get());
}

bool IndexedHead::has_clusters() const {
  return std::any_of(units_.begin(), units_.end(),
                     [](const Unit& unit) { return unit.clusters != nullptr; });
}

void HeadAnswer::Reset(const QueryBlock& queries, size_t units) {
  acc_.assign(size_t{queries.queries} * queries.head_dim, 0.0f);
  partials_.assign(queries.queries, Partial{});
  lost_mass_.assign(queries.queries, 0.0);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    partials_[i].acc = std::span(acc_).subspan(size_t{i} * queries.head_dim, queries.head_dim);
  }
  coarse_.resize(units);
  allotments_.resize(units);
  for (RunAllotment& allotment : allotments_) {
    allotment.threshold.resize(queries.queries);
    allotment.ties.resize(queries.queries);
  }
}

// What of all this is no cluster is attended whole; `elsewhere` grows by it.
void HeadAnswer::AnswerWithin(const IndexedHead& head, const QueryBlock& queries,
                              std::span<const float> elsewhere, float error) {
  std::vector<ClusterRun> runs;
  for (const auto& unit : head.units()) {
    if (unit.clusters != nullptr) {
      runs.push_back({unit.clusters, &unit.view, queries.ranges});
    } else {
      unit.index->AttendAll(unit.view, queries, partials_);
    }
  }
  std::vector<float> other;
  for (uint32_t i = 0; i < queries.queries; ++i) {
    const double whole = partials_[i].LogLength();
    const double window = elsewhere.empty() ? kEmptyLse : elsewhere[i];
    const double most = std::max(whole, window);
    other.push_back(static_cast<float>(
        most == kEmptyLse ? kEmptyLse
                          : most + std::log(std::hypot(std::exp(whole - most),
                                                       std::exp(window - most)))));
  }
  ClusterLimits limits;
  limits.tolerance = error;
  limits.other_length = other;
  limits.history = head.history();
  refined_.clear();
  SearchClusters(runs, queries, limits, partials_, lists_ ? &refined_ : nullptr);
}

void HeadAnswer::Answer(const IndexedHead& head, const QueryBlock& queries,
                        std::span<const float> elsewhere, const Budget& budget) {
  const std::span<const IndexedHead::Unit> units = head.units();
  Reset(queries, units.size());
  refined_.clear();
  searched_ = budget.kind == Budget::Kind::kError;
  whole_ = budget.kind == Budget::Kind::kUnlimited || budget.kind == Budget::Kind::kError;
  if (budget.kind == Budget::Kind::kError) {
    return AnswerWithin(head, queries, elsewhere, budget.error);
  }
  if (whole_) {
    for (const auto& unit : units) unit.index->AttendAll(unit.view, queries, partials_);
    return;
  }
  for (size_t u = 0; u < units.size(); ++u) {
    units[u].index->Score(units[u].view, queries, &coarse_[u]);
  }
  const bool samples = budget.kind == Budget::Kind::kSoftmaxLift;
  for (RunAllotment& allotment : allotments_) {
    allotment.floor.resize(samples ? queries.queries : 0);
    allotment.lift_key.resize(samples ? queries.queries : 0);
  }
  std::vector<RunScores> scores(units.size());
  std::vector<RunShare> shares(units.size());
  for (uint32_t i = 0; i < queries.queries; ++i) {
    for (size_t u = 0; u < units.size(); ++u) scores[u] = {&coarse_[u], i};
    const uint64_t key = samples ? LiftKey(budget.seed, 0, i, queries.ranges[i].hi) : 0;
    lost_mass_[i] = 1.0 - AllocateBudget(budget, scores, shares, key);
    for (size_t u = 0; u < units.size(); ++u) {
      allotments_[u].threshold[i] = shares[u].threshold;
      allotments_[u].ties[i] = shares[u].ties;
      if (!samples) continue;
      allotments_[u].floor[i] = shares[u].floor;
      allotments_[u].lift_key[i] = key;
    }
  }
  for (size_t u = 0; u < units.size(); ++u) {
    units[u].index->Refine(units[u].view, queries, coarse_[u], allotments_[u], partials_);
  }
}

uint64_t HeadAnswer::bytes() const {
  uint64_t bytes = 0;
  for (const Partial& partial : partials_) bytes += partial.bytes;
  return bytes;
}

std::vector<uint32_t> HeadAnswer::Attended(const IndexedHead& head, const QueryBlock& queries,
                                           uint32_t query) const {
  std::vector<uint32_t> out;
  for (uint32_t token : refined_) {
    if (Intersect(queries.ranges[query], {token, token + 1}).size() > 0) out.push_back(token);
  }
  for (size_t u = 0; u < head.units().size(); ++u) {
    const IndexedHead::Unit& unit = head.units()[u];
    if (unit.clusters != nullptr && searched_) continue;
    if (whole_) {
      const TokenRange range = Intersect(queries.ranges[query], unit.view.tokens());
      for (uint32_t t = range.lo; t < range.hi; ++t) out.push_back(t);
      continue;
    }
    const CoarseScores& coarse = coarse_[u];
    const std::span<const float> row = coarse.Row(query);
    AllottedTokens allotted(allotments_[u], query);
    for (size_t i = 0; i < row.size(); ++i) {
      const uint32_t token = coarse.tokens.lo + coarse.NodeOf(query, i);
      if (allotted.Take(token, row[i])) out.push_back(token);
    }
  }
  return out;
}

}  // namespace quarry::perf

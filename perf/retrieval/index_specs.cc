#include "perf/retrieval/index_specs.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/baselines/baselines.h"
#include "perf/retrieval/own_specs.h"

namespace quarry::perf {
namespace {

Budget FixedK(uint32_t k) { return {Budget::Kind::kFixedK, k, 1.0f}; }
Budget TopP(float mass, uint32_t cap = 0) { return {Budget::Kind::kTopP, cap, mass}; }
Budget Dipr(uint32_t cap = 0) {
  // A token left out weighs less than a 400th of the best.
  return {.kind = Budget::Kind::kDipr, .k = cap, .beta = 6.0f};
}
Budget Lift(uint32_t k) { return {.kind = Budget::Kind::kSoftmaxLift, .k = k, .seed = 1}; }

// A search of a baseline; codes that only approximate need more candidates than the budget takes.
SearchSpec BaselineSpec(std::string name, const Budget& budget, const BaselineSearch& search) {
  return {std::move(name), budget, [search](KeyIndex* index) {
            static_cast<BaselineIndex*>(index)->set_search(search);
          }};
}

std::vector<SearchSpec> FixedSearches(BaselineKind kind, const BaselineOptions& options) {
  std::vector<SearchSpec> out;
  for (uint32_t k : {100u, 1000u, 4000u}) {
    if (kind == BaselineKind::kFaissFlat) {
      out.push_back(BaselineSpec("", FixedK(k), {.candidates = k}));
    }
    if (kind == BaselineKind::kFaissIvfFlat) {
      for (uint32_t nprobe : {8u, 32u, 128u, 512u}) {
        out.push_back(BaselineSpec(absl::StrCat("nprobe=", nprobe), FixedK(k),
                                   {.candidates = k, .nprobe = nprobe}));
      }
    }
    if (kind == BaselineKind::kFaissIvfPq && options.nlist == 1) {
      for (uint32_t factor : {2u, 8u}) {
        out.push_back(
            BaselineSpec(absl::StrCat("rerank=", factor), FixedK(k), {.candidates = factor * k}));
      }
    } else if (kind == BaselineKind::kFaissIvfPq) {
      for (uint32_t nprobe : {32u, 128u, 512u}) {
        out.push_back(BaselineSpec(absl::StrCat("nprobe=", nprobe, "/rerank=4"), FixedK(k),
                                   {.candidates = 4 * k, .nprobe = nprobe}));
      }
    }
    if (kind == BaselineKind::kHnsw) {
      for (uint32_t factor : {1u, 4u}) {
        if (factor * k > kCandidates) continue;  // slower than a scan, also of 131,072 tokens
        out.push_back(BaselineSpec(absl::StrCat("ef=", factor * k), FixedK(k),
                                   {.candidates = k, .ef_search = factor * k}));
      }
    }
  }
  return out;
}

// Scores are exact whatever found the candidates, so any budget of tokens may choose among them.
std::vector<SearchSpec> CandidateSearches(BaselineKind kind, const BaselineOptions& options) {
  BaselineSearch search{.candidates = kCandidates};
  std::string name = absl::StrCat("candidates=", kCandidates);
  const bool clusters = kind == BaselineKind::kFaissIvfFlat ||
                        (kind == BaselineKind::kFaissIvfPq && options.nlist != 1);
  if (clusters) {
    search.nprobe = 128;
    name = absl::StrCat("nprobe=", search.nprobe, "/", name);
  } else if (kind == BaselineKind::kHnsw) {
    search.ef_search = kCandidates;
    name = absl::StrCat("ef=", kCandidates);
  }
  std::vector<SearchSpec> out;
  for (const Budget& budget : BudgetsOfCandidates()) {
    out.push_back(BaselineSpec(name, budget, search));
  }
  return out;
}

IndexSpec Baseline(BaselineKind kind, std::string built, const BaselineOptions& options) {
  IndexSpec spec;
  spec.name = absl::StrCat(std::string(BaselineName(kind)), built.empty() ? "" : "/", built);
  spec.build = RunByRun([kind, options](const KvView& run) -> absl::StatusOr<MadeIndex> {
    absl::StatusOr<std::unique_ptr<BaselineIndex>> index = BuildBaseline(kind, run, options);
    if (!index.ok()) return index.status();
    const uint64_t bytes = (*index)->memory_bytes();
    return MadeIndex{std::move(*index), bytes};
  });
  spec.searches = FixedSearches(kind, options);
  for (SearchSpec& search : CandidateSearches(kind, options)) {
    spec.searches.push_back(std::move(search));
  }
  spec.builds_on_one_thread = true;
  return spec;
}

}  // namespace

std::string BudgetName(const Budget& budget) {
  switch (budget.kind) {
    case Budget::Kind::kUnlimited:
      return "all";
    case Budget::Kind::kFixedK:
      return absl::StrCat("top-", budget.k);
    case Budget::Kind::kTopP:
      return budget.k > 0 ? absl::StrCat("mass-", budget.mass, "-cap-", budget.k)
                          : absl::StrCat("mass-", budget.mass);
    case Budget::Kind::kError:
      return absl::StrCat("error-", budget.error);
    case Budget::Kind::kDipr:
      return budget.k > 0 ? absl::StrCat("dipr-", budget.beta, "-cap-", budget.k)
                          : absl::StrCat("dipr-", budget.beta);
    case Budget::Kind::kSoftmaxLift:
      return absl::StrCat("lift-", budget.k);
  }
  return "unknown";
}

std::vector<Budget> BudgetsOfCandidates() {
  return {TopP(0.9f, kCandidates), TopP(0.99f, kCandidates), Dipr(kCandidates), Lift(1000)};
}

IndexSpec ExactSpec() {
  IndexSpec spec;
  spec.name = "exact";
  spec.build = RunByRun([](const KvView&) -> absl::StatusOr<MadeIndex> { return MadeIndex{}; });
  std::vector<Budget> budgets = {Budget{},    FixedK(100), FixedK(1000), FixedK(4000),
                                 TopP(0.9f), TopP(0.99f), Dipr(),       Lift(100)};
  for (const Budget& budget : BudgetsOfCandidates()) budgets.push_back(budget);
  for (const Budget& budget : budgets) spec.searches.push_back({"", budget, nullptr, true});
  return spec;
}

std::vector<IndexSpec> BaselineSpecs(uint32_t seed) {
  std::vector<IndexSpec> out;
  out.push_back(Baseline(BaselineKind::kFaissFlat, "", {.seed = seed}));
  out.push_back(Baseline(BaselineKind::kFaissIvfFlat, "", {.seed = seed}));
  out.push_back(Baseline(BaselineKind::kFaissIvfPq, "", {.seed = seed}));
  // One cluster: all codes are scanned, as without clusters.
  out.push_back(Baseline(BaselineKind::kFaissIvfPq, "nlist=1", {.seed = seed, .nlist = 1}));
  out.push_back(Baseline(BaselineKind::kHnsw, "M=16/efc=100",
                         {.seed = seed, .hnsw_m = 16, .ef_construction = 100}));
  out.push_back(Baseline(BaselineKind::kHnsw, "M=32/efc=200",
                         {.seed = seed, .hnsw_m = 32, .ef_construction = 200}));
  return out;
}

std::vector<IndexSpec> AllSpecs(uint32_t seed) {
  std::vector<IndexSpec> all = {ExactSpec()};
  for (IndexSpec& spec : OwnSpecs()) all.push_back(std::move(spec));
  for (IndexSpec& spec : BaselineSpecs(seed)) all.push_back(std::move(spec));
  return all;
}

}  // namespace quarry::perf

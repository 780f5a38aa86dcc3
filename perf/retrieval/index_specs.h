// What is compared: indexes, the ways to search them, and the budgets.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/index_choice.h"
#include "cpu_index/key_index.h"
#include "proto/retrieval_types.h"

namespace quarry::perf {

// What the indexes of a head may be built from.
struct BuildInput {
  std::span<const KvView> runs;  // consecutive
  // The prefill's queries of the head's group, by rising position: [queries][head_dim].
  std::span<const float> train_queries;
  std::span<const uint32_t> train_positions;  // one per `group` queries
  uint32_t group = 1;
  float scale = 1.0f;
};

// A way to search what was built, and a budget.
struct SearchSpec {
  std::string name;  // the knobs, for the row's `index`; may be empty
  Budget budget;
  std::function<void(KeyIndex*)> prepare;  // sets the knobs; may be null
  bool predicts = false;                   // the budget's lost mass is a prediction of the error
};

struct IndexSpec {
  std::string name;  // and how it is built: "hnsw/M=32/ef=200"
  // One for each run.
  std::function<absl::StatusOr<std::vector<MadeIndex>>(const BuildInput&)> build;
  std::vector<SearchSpec> searches;
  bool builds_on_one_thread = false;  // so several heads are built at once, each timed alone
};

// A spec's build, from one that makes the index of one run, knowing nothing of the others and of
// no queries.
template <typename F>
auto RunByRun(F build_one) {
  return [build_one](const BuildInput& input) -> absl::StatusOr<std::vector<MadeIndex>> {
    std::vector<MadeIndex> out;
    for (const KvView& run : input.runs) {
      absl::StatusOr<MadeIndex> built = build_one(run);
      if (!built.ok()) return built.status();
      out.push_back(*std::move(built));
    }
    return out;
  };
}

// "all", "top-100", "mass-0.95", "mass-0.95-cap-4096", "error-0.02", "dipr-6", "dipr-6-cap-4096",
// "lift-1000".
std::string BudgetName(const Budget& budget);

// The budgets beside fixed k that every index of tokens is measured under, searched in one way that
// finds kCandidates: tokens that a list does not name can be neither counted nor drawn.
std::vector<Budget> BudgetsOfCandidates();
inline constexpr uint32_t kCandidates = 4096;

// The exact scan of everything, and under budgets.
IndexSpec ExactSpec();

// FAISS and hnswlib, each with a sweep of its knobs; seed of their randomness.
std::vector<IndexSpec> BaselineSpecs(uint32_t seed);

// All that are measured: these and the daemon's own (own_specs.h).
std::vector<IndexSpec> AllSpecs(uint32_t seed);

}  // namespace quarry::perf

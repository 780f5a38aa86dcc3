// What is compared: indexes, the ways to search them, and the budgets.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/key_index.h"
#include "proto/retrieval_types.h"

namespace quarry::perf {

// What an index of one run may be built from.
struct BuildInput {
  KvView run;
  // The prefill's queries of the head's group, by rising position: [queries][head_dim].
  std::span<const float> train_queries;
  std::span<const uint32_t> train_positions;  // one per `group` queries
  uint32_t group = 1;
  float scale = 1.0f;
};

// An index built in one way.
struct BuiltIndex {
  std::unique_ptr<KeyIndex> index;  // null: the exact scan, which needs none
  uint64_t memory_bytes = 0;        // beside the run's keys and values
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
  std::function<absl::StatusOr<BuiltIndex>(const BuildInput&)> build;
  std::vector<SearchSpec> searches;
  bool builds_on_one_thread = false;  // so several heads are built at once, each timed alone
  // Adds the tokens that one query attends exactly of what it was allotted, in any order. Null:
  // nodes are single tokens.
  std::function<void(const KeyIndex&, const CoarseScores&, const RunAllotment&, uint32_t query,
                     std::vector<uint32_t>*)>
      attended;
};

// "all", "top-100", "mass-0.95", "mass-0.95-cap-4096", "error-0.02".
std::string BudgetName(const Budget& budget);

// The exact scan of everything, and under budgets.
IndexSpec ExactSpec();

// FAISS and hnswlib, each with a sweep of its knobs; seed of their randomness.
std::vector<IndexSpec> BaselineSpecs(uint32_t seed);

}  // namespace quarry::perf

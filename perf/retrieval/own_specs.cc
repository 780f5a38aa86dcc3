#include "perf/retrieval/own_specs.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/code_scan.h"
#include "cpu_index/graph_index.h"
#include "cpu_index/index_choice.h"

namespace quarry::perf {
namespace {

std::vector<float> Scaled(const BuildInput& input) {
  std::vector<float> out(input.train_queries.begin(), input.train_queries.end());
  for (float& q : out) q *= input.scale;
  return out;
}

// Made as the daemon makes them; not `aware`: from the keys alone.
IndexSpec Own(std::string name, IndexChoice choice, bool aware) {
  IndexSpec spec;
  spec.name = std::move(name);
  spec.build = [choice, aware](const BuildInput& input) {
    IndexChoice of_group = choice;
    of_group.group = input.group;
    return MakeIndexes(of_group, input.runs, aware ? Scaled(input) : std::vector<float>());
  };
  spec.builds_on_one_thread = true;
  return spec;
}

IndexSpec CodeScanSpec(std::string name, bool aware) {
  IndexSpec spec = Own(std::move(name), {.kind = IndexKind::kCodes}, aware);
  const auto add = [&spec](std::string knobs, uint32_t candidates, const Budget& budget) {
    spec.searches.push_back({std::move(knobs), budget, [candidates](KeyIndex* index) {
                               static_cast<CodeScan*>(index)->set_candidates(candidates);
                             }});
  };
  for (const uint32_t k : {100u, 1000u, 4000u}) {
    for (const uint32_t factor : {1u, 4u}) {
      add(absl::StrCat("rerank=", factor), factor * k, {Budget::Kind::kFixedK, k, 1});
    }
  }
  for (const Budget& budget : BudgetsOfCandidates()) {
    add(absl::StrCat("candidates=", kCandidates), kCandidates, budget);
  }
  return spec;
}

// Runs are as long as a bench cuts them, so none is too short.
IndexSpec ClusterSpec(std::string name, IndexKind kind, CodeReading reading) {
  IndexSpec spec =
      Own(std::move(name), {.kind = kind, .codes = reading, .min_run_tokens = 0}, /*aware=*/true);
  for (const float error : {0.1f, 0.05f, 0.03f, 0.02f, 0.01f}) {
    SearchSpec search;
    search.budget.kind = Budget::Kind::kError;
    search.budget.error = error;
    search.predicts = true;
    spec.searches.push_back(std::move(search));
  }
  return spec;
}

IndexSpec GraphSpec(std::string name, bool aware) {
  IndexSpec spec = Own(std::move(name), {.kind = IndexKind::kGraph}, aware);
  const auto add = [&spec](uint32_t queue, const Budget& budget) {
    spec.searches.push_back({absl::StrCat("L=", queue), budget, [queue](KeyIndex* index) {
                               static_cast<GraphIndex*>(index)->set_queue(queue);
                             }});
  };
  const auto add_fixed = [&add](uint32_t queue, uint32_t k) {
    add(queue, {Budget::Kind::kFixedK, k, 1});
  };
  for (const uint32_t queue : {32u, 64u, 128u, 256u, 512u}) add_fixed(queue, 100);
  for (const uint32_t queue : {128u, 256u, 512u, 1024u}) add_fixed(queue, 1000);
  for (const uint32_t queue : {512u, 1024u, 2048u}) add_fixed(queue, 4000);
  // It meets several keys for each whose links it follows.
  for (const Budget& budget : BudgetsOfCandidates()) add(kCandidates / 4, budget);
  return spec;
}

}  // namespace

std::vector<IndexSpec> OwnSpecs() {
  std::vector<IndexSpec> out;
  out.push_back(CodeScanSpec("codes", /*aware=*/true));
  out.push_back(CodeScanSpec("codes/keys-only", /*aware=*/false));
  out.push_back(ClusterSpec("auto", IndexKind::kAuto, CodeReading::kAll));
  out.push_back(ClusterSpec("clusters", IndexKind::kClusters, CodeReading::kAll));
  out.push_back(ClusterSpec("clusters/learned", IndexKind::kClusters, CodeReading::kLearned));
  out.push_back(GraphSpec("graph", /*aware=*/true));
  out.push_back(GraphSpec("graph/keys-only", /*aware=*/false));
  return out;
}

}  // namespace quarry::perf

#include "perf/retrieval/own_specs.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/cluster_learn.h"
#include "cpu_index/code_scan.h"
#include "cpu_index/graph_index.h"

namespace quarry::perf {
namespace {

std::vector<float> Scaled(const BuildInput& input) {
  std::vector<float> out(input.train_queries.begin(), input.train_queries.end());
  for (float& q : out) q *= input.scale;
  return out;
}

// `aware`: built with the sampled queries; else from the keys alone.
IndexSpec CodeScanSpec(bool aware) {
  IndexSpec spec;
  spec.name = aware ? "codes" : "codes/keys-only";
  spec.build = RunByRun([aware](const KvView& run,
                               const BuildInput& input) -> absl::StatusOr<BuiltIndex> {
    const std::vector<float> queries = aware ? Scaled(input) : std::vector<float>();
    absl::StatusOr<std::unique_ptr<CodeScan>> index =
        CodeScan::Build(run, queries);
    if (!index.ok()) return index.status();
    const uint64_t bytes = (*index)->memory_bytes();
    return BuiltIndex{std::move(*index), bytes};
  });
  for (const uint32_t k : {100u, 1000u, 4000u}) {
    for (const uint32_t factor : {1u, 4u}) {
      spec.searches.push_back({absl::StrCat("rerank=", factor), Budget{Budget::Kind::kFixedK, k, 1},
                               [k, factor](KeyIndex* index) {
                                 static_cast<CodeScan*>(index)->set_candidates(factor * k);
                               }});
    }
  }
  spec.builds_on_one_thread = true;
  return spec;
}

IndexSpec ClusterSpec(CodeReading reading) {
  IndexSpec spec;
  spec.name = reading == CodeReading::kAll ? "clusters" : "clusters/learned";
  spec.build = [reading](const BuildInput& input) -> absl::StatusOr<std::vector<BuiltIndex>> {
    absl::StatusOr<LearnedClusters> learned =
        LearnClusters(input.runs, Scaled(input), reading, input.group);
    if (!learned.ok()) return learned.status();
    std::vector<BuiltIndex> out;
    for (std::unique_ptr<ClusterIndex>& index : learned->indexes) {
      const uint64_t bytes = index->memory_bytes() + (out.empty() ? learned->model->memory_bytes() : 0);
      out.push_back({std::move(index), bytes});
    }
    return out;
  };
  for (const float error : {0.1f, 0.05f, 0.03f, 0.02f, 0.01f}) {
    SearchSpec search;
    search.budget.kind = Budget::Kind::kError;
    search.budget.error = error;
    search.predicts = true;
    spec.searches.push_back(std::move(search));
  }
  spec.builds_on_one_thread = true;
  return spec;
}

// `aware`: as of CodeScanSpec.
IndexSpec GraphSpec(bool aware) {
  IndexSpec spec;
  spec.name = aware ? "graph" : "graph/keys-only";
  spec.build = RunByRun([aware](const KvView& run,
                               const BuildInput& input) -> absl::StatusOr<BuiltIndex> {
    const std::vector<float> queries = aware ? Scaled(input) : std::vector<float>();
    absl::StatusOr<std::unique_ptr<GraphIndex>> index =
        GraphIndex::Build(run, queries, GraphOptions{});
    if (!index.ok()) return index.status();
    const uint64_t bytes = (*index)->memory_bytes();
    return BuiltIndex{std::move(*index), bytes};
  });
  const auto add = [&spec](uint32_t queue, uint32_t k) {
    spec.searches.push_back({absl::StrCat("L=", queue), Budget{Budget::Kind::kFixedK, k, 1},
                             [queue](KeyIndex* index) {
                               static_cast<GraphIndex*>(index)->set_queue(queue);
                             }});
  };
  for (const uint32_t queue : {32u, 64u, 128u, 256u, 512u}) add(queue, 100);
  for (const uint32_t queue : {128u, 256u, 512u, 1024u}) add(queue, 1000);
  for (const uint32_t queue : {512u, 1024u, 2048u}) add(queue, 4000);
  spec.builds_on_one_thread = true;
  return spec;
}

}  // namespace

std::vector<IndexSpec> OwnSpecs() {
  std::vector<IndexSpec> out;
  out.push_back(CodeScanSpec(true));
  out.push_back(CodeScanSpec(false));
  out.push_back(ClusterSpec(CodeReading::kAll));
  out.push_back(ClusterSpec(CodeReading::kLearned));
  out.push_back(GraphSpec(true));
  out.push_back(GraphSpec(false));
  return out;
}

}  // namespace quarry::perf

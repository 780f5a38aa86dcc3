#include "cpu_index/index_choice.h"

#include <utility>

#include "cpu_index/cluster_learn.h"
#include "cpu_index/code_scan.h"
#include "cpu_index/graph_index.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

template <typename Index>
absl::StatusOr<MadeIndex> Made(absl::StatusOr<std::unique_ptr<Index>> index) {
  if (!index.ok()) return index.status();
  return MeasureIndex(*std::move(index));
}

// Of kinds that learn nothing for other runs.
absl::StatusOr<MadeIndex> MakeIndex(IndexKind kind, const KvView& run,
                                    std::span<const float> queries) {
  switch (kind) {
    case IndexKind::kCodes:
      return Made(CodeScan::Build(run, queries));
    case IndexKind::kGraph:
      return Made(GraphIndex::Build(run, queries, GraphOptions{}));
    default:
      return MadeIndex{};
  }
}

// What kAuto means for a run.
IndexKind KindFor(const IndexChoice& choice, const KvView& run) {
  if (choice.kind != IndexKind::kAuto) return choice.kind;
  return run.tokens().size() < choice.min_run_tokens ? IndexKind::kExact : IndexKind::kClusters;
}

}  // namespace

MadeIndex MeasureIndex(std::unique_ptr<KeyIndex> index) {
  MadeIndex made;
  if (const auto* clusters = dynamic_cast<const ClusterIndex*>(index.get())) {
    made.bytes = clusters->memory_bytes();
    made.shared = clusters->model();
    made.shared_bytes = clusters->model()->memory_bytes();
  } else if (const auto* codes = dynamic_cast<const CodeScan*>(index.get())) {
    made.bytes = codes->memory_bytes();
  } else if (const auto* graph = dynamic_cast<const GraphIndex*>(index.get())) {
    made.bytes = graph->memory_bytes();
  }
  made.index = std::move(index);
  return made;
}

absl::StatusOr<std::vector<MadeIndex>> MakeIndexes(const IndexChoice& choice,
                                                   std::span<const KvView> runs,
                                                   std::span<const float> queries) {
  std::vector<MadeIndex> out(runs.size());
  std::vector<KvView> clustered;
  std::vector<size_t> places;
  for (size_t r = 0; r < runs.size(); ++r) {
    const IndexKind kind = KindFor(choice, runs[r]);
    if (kind == IndexKind::kClusters) {
      clustered.push_back(runs[r]);
      places.push_back(r);
      continue;
    }
    QUARRY_ASSIGN_OR_RETURN(out[r], MakeIndex(kind, runs[r], queries));
  }
  if (clustered.empty()) return out;
  QUARRY_ASSIGN_OR_RETURN(LearnedClusters learned,
                          LearnClusters(clustered, queries,
                                        {.codes = choice.codes,
                                         .group = choice.group,
                                         .scan_if_faster = choice.kind == IndexKind::kAuto}));
  for (size_t i = 0; i < places.size(); ++i) {
    out[places[i]] = MeasureIndex(std::move(learned.indexes[i]));
  }
  return out;
}

absl::StatusOr<MadeIndex> MakeIndexLike(const KeyIndex& neighbour, const IndexChoice& choice,
                                        const KvView& run, std::span<const float> queries) {
  const IndexKind kind = KindFor(choice, run);
  if (kind != IndexKind::kClusters) return MakeIndex(kind, run, queries);
  const auto* clusters = dynamic_cast<const ClusterIndex*>(&neighbour);
  if (clusters != nullptr) {
    QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<ClusterIndex> index,
                            ClusterIndex::Build(run, clusters->model()));
    return MeasureIndex(std::move(index));
  }
  QUARRY_ASSIGN_OR_RETURN(std::vector<MadeIndex> made, MakeIndexes(choice, {&run, 1}, queries));
  return std::move(made.front());
}

}  // namespace quarry

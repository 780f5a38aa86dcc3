#include "cpu_index/index_choice.h"

#include <utility>

#include "cpu_index/cluster_index.h"
#include "cpu_index/code_scan.h"
#include "cpu_index/graph_index.h"

namespace quarry {
namespace {

template <typename Index>
absl::StatusOr<MadeIndex> Made(absl::StatusOr<std::unique_ptr<Index>> index) {
  if (!index.ok()) return index.status();
  const uint64_t bytes = (*index)->memory_bytes();
  return MadeIndex{*std::move(index), bytes};
}

}  // namespace

absl::StatusOr<MadeIndex> MakeIndex(const IndexChoice& choice, const KvView& run,
                                    std::span<const float> queries) {
  switch (choice.kind) {
    case IndexKind::kExact:
      return MadeIndex{};
    case IndexKind::kCodes:
      return Made(CodeScan::Build(run, queries));
    case IndexKind::kGraph:
      return Made(GraphIndex::Build(run, queries, GraphOptions{}));
    case IndexKind::kAuto:
      if (run.tokens().size() < choice.min_run_tokens) return MadeIndex{};
      break;
    case IndexKind::kClusters:
      break;
  }
  return Made(ClusterIndex::Build(run, queries));
}

}  // namespace quarry

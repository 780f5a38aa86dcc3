// Which index a run gets, and the making of it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/cluster_learn.h"
#include "cpu_index/key_index.h"

namespace quarry {

enum class IndexKind {
  kAuto,   // the exact scan for short runs, else clusters that attend exactly where that is faster
  kExact,  // none
  kCodes,
  kClusters,
  kGraph,
};

struct IndexChoice {
  IndexKind kind = IndexKind::kAuto;
  CodeReading codes = CodeReading::kAll;  // of clusters
  uint32_t group = 1;  // query heads of a KV head, which are searched together
  // Of kAuto: shorter runs are scanned. A context of 8,192 tokens cut into shorter ones is searched as
  // slowly as it is scanned, or slower.
  uint32_t min_run_tokens = 8192;
};

struct MadeIndex {
  std::unique_ptr<KeyIndex> index;  // null: the run is to be scanned
  uint64_t bytes = 0;               // without what is shared
  // What it uses together with other indexes of its head; null: nothing.
  std::shared_ptr<const void> shared;
  uint64_t shared_bytes = 0;
};

// The same of an index that was made before. Of kinds that take no memory of their own: 0 bytes.
MadeIndex MeasureIndex(std::unique_ptr<KeyIndex> index);

// The indexes of one (layer, KV head), of disjoint runs in token order. queries: [n][group][head_dim]
// fp32 of sampled positions, multiplied by the attention's scale; none: they are made from the keys
// alone. What one of them learns, all of them use. One thread. InvalidArgument: head_dim or number of
// tokens that the kind cannot have.
absl::StatusOr<std::vector<MadeIndex>> MakeIndexes(const IndexChoice& choice,
                                                   std::span<const KvView> runs,
                                                   std::span<const float> queries);

// The index of one more run, with what `neighbour`, of the same head, has learned, where its kind
// learns anything for others; that costs much less than MakeIndexes.
absl::StatusOr<MadeIndex> MakeIndexLike(const KeyIndex& neighbour, const IndexChoice& choice,
                                        const KvView& run, std::span<const float> queries);

}  // namespace quarry

// Which index a run gets, and the making of it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "cpu_index/key_index.h"

namespace quarry {

enum class IndexKind {
  kAuto,      // the exact scan for short runs, else clusters
  kExact,     // none
  kCodes,
  kClusters,
  kGraph,
};

struct IndexChoice {
  IndexKind kind = IndexKind::kAuto;
  uint32_t min_run_tokens = 2048;  // of kAuto: shorter runs are scanned, which costs less
};

struct MadeIndex {
  std::unique_ptr<KeyIndex> index;  // null: the run is to be scanned
  uint64_t bytes = 0;
};

// The index of one (layer, KV head) of a run. queries: [n][head_dim] fp32 of all heads of the group,
// multiplied by the attention's scale; none: it is made from the keys alone. One thread. Clusters
// choose by the queries whether every token's code is read. InvalidArgument: head_dim or number of
// tokens that the kind cannot have.
absl::StatusOr<MadeIndex> MakeIndex(const IndexChoice& choice, const KvView& run,
                                    std::span<const float> queries);

}  // namespace quarry

// Learning clustered indexes: a model of a head, and the indexes of its runs.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/cluster_calibrate.h"
#include "cpu_index/cluster_index.h"

namespace quarry {

struct LearnedClusters {
  std::shared_ptr<const ClusterModel> model;
  std::vector<std::unique_ptr<ClusterIndex>> indexes;  // of each run
};

// runs: of one head, in token order, disjoint; queries: [n][group][head_dim] sampled at n positions,
// scaled as scores are, may be empty. Later runs of the head are built with the same model by
// ClusterIndex::Build.
// InvalidArgument: no tokens, a head_dim that is no multiple of 16, queries that are no whole groups.
// FailedPrecondition: as of ClusterIndex::Build; numbers that are too large or too small for a model.
// Cost: perf/README.md. One thread.
absl::StatusOr<LearnedClusters> LearnClusters(std::span<const KvView> runs,
                                              std::span<const float> queries,
                                              const ClusterChoice& choice = {});

}  // namespace quarry

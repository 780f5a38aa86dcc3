// How far the estimates of clustered indexes can be trusted, learned from sampled queries.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "cpu_index/cluster_index.h"

namespace quarry {

// Some of the rows [][row], evenly spread: queries, or groups of them.
std::vector<float> SpreadQueries(std::span<const float> queries, uint32_t row, uint32_t most);

// Of which tokens a search reads codes.
enum class CodeReading {
  // Of all: a token that holds the mass is seen wherever it lies.
  kAll,
  // Where the answers to the sampled queries were right without, of those that groups promise: far
  // less is read, but what no sampled query sought may be missed.
  kLearned,
};

struct ClusterChoice {
  CodeReading codes = CodeReading::kAll;
  uint32_t group = 1;  // queries of one position, which will be searched at once
  // Whether searches attend exactly where estimates are not expected to be clearly faster.
  bool scan_if_faster = true;
};

// Sets the model's doubts, whether every code is read, and how many rows and from which error on
// scans are expected, by what searches of the indexes, which have this model, miss of the exact
// answers to sampled queries (scaled as scores are). Without queries doubts stay guesses. Nobody
// else may use the model meanwhile.
void CalibrateClusters(std::span<const KvView> runs,
                       std::span<const std::unique_ptr<ClusterIndex>> indexes,
                       std::span<const float> queries, const ClusterChoice& choice,
                       ClusterModel* model);

}  // namespace quarry

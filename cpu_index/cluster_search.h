// What a clustered index holds while it searches; its own files include this, nothing else.
#pragma once

#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "cpu_index/balanced_tree.h"
#include "cpu_index/cluster_index.h"

namespace quarry {

inline constexpr uint32_t kLeavesPerSuper = kSuperRows / kLeafRows;
static_assert(kLeafRows == KeyCodes::kBlockKeys && kLeavesPerSuper == NodeLevel::kBlockNodes);

// log of the sum of e^x; x is lost.
float LogSum(std::span<float> x);
float LogAdd(float a, float b);

// What a search has found so far; all queries have the same nodes.
struct ClusterIndex::Search {
  const QueryBlock& queries;
  std::vector<KeyCodes::Query> code;
  std::vector<NodeLevel::Query> leaf, super;  // [queries]
  // [queries] what NodeLevel calls breadth, and of a token's score around its code's.
  std::vector<float> leaf_breadth, super_breadth, code_variance;
  std::vector<Unrest> unrest;
  // [queries] log of the sum of the run's weights, estimated, and of what errors are measured by:
  // with that of the tokens elsewhere, as if their values were as long as this run's answers.
  std::vector<float> own_mass, mass;
  std::vector<float> ranked_from;  // [queries], or empty: tokens with this score are ranked
  std::vector<uint32_t> opened_supers, closed_supers;  // rising
  std::vector<float> super_score;       // [queries][supers], lifted
  std::vector<float> leaf_score;        // [queries][opened supers * 16], lifted; none: no leaf
  std::vector<uint8_t> opened_leaf;     // [opened supers * 16]
  std::vector<uint32_t> leaves;         // opened, rising
  uint64_t bytes = 0;

  size_t leaf_row() const { return opened_supers.size() * kLeavesPerSuper; }
  // of_run: log of the sum of the run's weights.
  void SetMass(uint32_t query, float of_run, float log_length) {
    own_mass[query] = mass[query] = of_run;
    if (queries.other_length.empty()) return;
    mass[query] = LogAdd(of_run, queries.other_length[query] - log_length);
  }
};

}  // namespace quarry

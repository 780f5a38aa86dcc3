#include "cpu_index/cluster_index.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu_index/balanced_tree.h"
#include "proto/half.h"

namespace quarry {

ClusterIndex::ClusterIndex(Parts parts) : p_(std::move(parts)), most_scale_(p_.leaves.nodes()) {
  for (uint32_t t = 0; t < tokens(); ++t) {
    most_scale_[t / kLeafRows] = std::max(most_scale_[t / kLeafRows], Bf16ToFloat(p_.scale[t]));
  }
}

void ClusterIndex::AttendAll(const KvView& run, const QueryBlock& queries,
                             std::span<Partial> acc) const {
  ExactScan().AttendAll(run, queries, acc);
}

uint64_t ClusterIndex::memory_bytes() const {
  return 2 * (p_.scale.size() + p_.super_values.size()) +
         4 * (p_.order.size() + most_scale_.size() + token_slope_.size() +
              inside_leaf_.slope.size() + inside_super_.slope.size() +
              inside_leaf_.covariance.size() + inside_super_.covariance.size() +
              p_.basis.key_map.size() + p_.basis.query_map.size()) +
         p_.codes.memory_bytes() + p_.key_rows.memory_bytes() + p_.token_values.memory_bytes() +
         p_.leaf_values.memory_bytes() + p_.leaves.memory_bytes() + p_.supers.memory_bytes();
}

ClusterIndex::Listed ClusterIndex::NodesOf(const CoarseScores& coarse) {
  const std::span<const uint32_t> all(coarse.node);
  const size_t tokens = coarse.stretches[kTokens].end;
  const size_t leaves = coarse.stretches[kLastLeaf].end - tokens;
  return {all.first(tokens / kLeafRows), all.subspan(tokens / kLeafRows, leaves),
          all.subspan(tokens / kLeafRows + leaves)};
}

TokenRange ClusterIndex::Places(const Listed& listed, size_t entry) const {
  if (entry < listed.tokens()) {
    const auto at = static_cast<uint32_t>(entry % kLeafRows);
    const uint32_t place = listed.opened[entry / kLeafRows] * kLeafRows + at;
    return {place, place + 1};
  }
  entry -= listed.tokens();
  const bool leaf = entry < listed.leaves.size();
  const uint32_t rows = leaf ? kLeafRows : kSuperRows;
  const uint32_t node = leaf ? listed.leaves[entry] : listed.supers[entry - listed.leaves.size()];
  return {node * rows, std::min(tokens(), (node + 1) * rows)};
}

float ClusterIndex::ExactAbove(float refined_doubt) const {
  // A byte should take away as much of the squared error wherever it is read: of a token that is
  // refined a row takes away 1, of one that is read exactly the keys and values refined_doubt^2.
  const float rows_per_token = 4.0f;  // in bytes: 16 bits a number by 4
  return std::max(0.0f, 0.5f * std::log(rows_per_token) - std::log(std::max(refined_doubt, 1e-4f)));
}

}  // namespace quarry

#include "cpu_index/baselines/key_copy.h"

#include <algorithm>

#include "proto/half.h"

namespace quarry {

KeyCopy::KeyCopy(const KvView& run)
    : tokens(run.tokens().size()),
      head_dim(run.head_dim),
      keys(size_t{tokens} * head_dim),
      mean(head_dim) {
  std::vector<double> sum(head_dim);
  float* at = keys.data();
  for (const KvSegment& segment : run.segments) {
    for (size_t i = 0; i < size_t{segment.tokens.size()} * head_dim; ++i) {
      *at = LoadAsFloat(segment.k, i, run.dtype);
      sum[i % head_dim] += *at++;
    }
  }
  for (uint32_t d = 0; d < head_dim; ++d) {
    mean[d] = static_cast<float>(sum[d] / std::max(1u, tokens));
  }
  for (size_t i = 0; i < keys.size(); ++i) keys[i] -= mean[i % head_dim];
}

std::vector<float> MeanScores(const QueryBlock& queries, std::span<const float> mean) {
  std::vector<float> out(queries.queries);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    double dot = 0;
    for (uint32_t d = 0; d < queries.head_dim; ++d) {
      dot += double{queries.q[size_t{i} * queries.head_dim + d]} * mean[d];
    }
    out[i] = static_cast<float>(dot);
  }
  return out;
}

uint32_t TokensToAsk(TokenRange run, const QueryBlock& queries, uint32_t candidates) {
  uint64_t most = 0;
  for (const TokenRange& range : queries.ranges) {
    const uint64_t inside = Intersect(range, run).size();
    if (inside == 0) continue;
    most = std::max(most, (uint64_t{candidates} * run.size() + inside - 1) / inside);
  }
  return static_cast<uint32_t>(std::min<uint64_t>(most, run.size()));
}

}  // namespace quarry

// KeyCopy: a run's keys as the libraries want them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu_index/key_index.h"

namespace quarry {

// Keys as fp32, minus their mean.
struct KeyCopy {
  uint32_t tokens = 0, head_dim = 0;
  std::vector<float> keys;  // [tokens][head_dim]
  std::vector<float> mean;  // [head_dim]

  explicit KeyCopy(const KvView& run);
};

// q . mean for each query: what its scores lack before they are scaled.
std::vector<float> MeanScores(const QueryBlock& queries, std::span<const float> mean);

// How many tokens to ask the run for so that each query is left with about `candidates` in its own
// range; 0 if no query wants any.
uint32_t TokensToAsk(TokenRange run, const QueryBlock& queries, uint32_t candidates);

}  // namespace quarry

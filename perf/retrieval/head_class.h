// Classes of heads by how their attention is spread, from the queries of the prefill alone.
#pragma once

#include <cstdint>
#include <string_view>

#include "cpu_index/key_index.h"
#include "perf/retrieval/truth.h"
#include "perf/trace.h"

namespace quarry::perf {

// By the median over training queries of the number of best tokens that hold 90% of the mass of
// what the window leaves.
enum class HeadClass {
  kSharp,    // at most 128
  kMedium,   // between
  kDiffuse,  // more than 4,096, or than an eighth of the tokens
  kUnknown,  // no training query has 1,024 tokens beside its window
};
inline constexpr uint32_t kSharpTokens = 128;
inline constexpr uint32_t kDiffuseTokens = 4096;
inline constexpr uint32_t kDiffuseShare = 8;      // one token in so many
inline constexpr uint32_t kFewestTokens = 1024;   // beside the window, for a query to count

std::string_view HeadClassName(HeadClass c);

// `tokens` of `rest` hold 90% of the mass.
HeadClass ClassOf(double tokens, double rest);

// The fewest tokens whose weights, unnormalised, hold `share` of the sum. Reorders `weights`.
uint32_t TokensForMass(std::span<float> weights, double share);

// Replays up to `most` training queries, evenly chosen, by the exact scan of the whole head (one
// segment or more from token 0).
HeadClass Classify(const Trace& trace, uint32_t kv_head, const KvView& head, const Window& window,
                   uint32_t most = 64);

}  // namespace quarry::perf

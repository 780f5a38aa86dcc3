#include "perf/retrieval/head_class.h"

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "cpu_index/simd.h"
#include "perf/statistics.h"
#include "proto/check.h"

namespace quarry::perf {
namespace {

constexpr double kMassShare = 0.9;

}  // namespace

std::string_view HeadClassName(HeadClass c) {
  switch (c) {
    case HeadClass::kSharp:
      return "sharp";
    case HeadClass::kMedium:
      return "medium";
    case HeadClass::kDiffuse:
      return "diffuse";
    case HeadClass::kUnknown:
      return "unknown";
  }
  return "unknown";
}

HeadClass ClassOf(double tokens, double rest) {
  if (tokens <= kSharpTokens) return HeadClass::kSharp;
  return tokens > std::min<double>(kDiffuseTokens, rest / kDiffuseShare) ? HeadClass::kDiffuse
                                                                          : HeadClass::kMedium;
}

uint32_t TokensForMass(std::span<float> weights, double share) {
  std::sort(weights.begin(), weights.end(), std::greater<float>());
  double total = 0, taken = 0;
  for (float w : weights) total += w;
  for (uint32_t i = 0; i < weights.size(); ++i) {
    taken += weights[i];
    if (taken >= share * total) return i + 1;
  }
  return static_cast<uint32_t>(weights.size());
}

HeadClass Classify(const Trace& trace, uint32_t kv_head, const KvView& head, const Window& window,
                   uint32_t most) {
  std::vector<uint32_t> usable;
  for (uint32_t i = 0; i < trace.q_train_pos.size(); ++i) {
    if (window.Rest(trace.q_train_pos[i] + 1).size() >= kFewestTokens) usable.push_back(i);
  }
  if (usable.empty() || most == 0) return HeadClass::kUnknown;
  const size_t count = std::min<size_t>(most, usable.size());
  std::vector<double> tokens, rest_tokens;
  CoarseScores scores;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t query = usable[i * usable.size() / count];
    const TokenRange rest = window.Rest(trace.q_train_pos[query] + 1);
    const std::vector<TokenRange> ranges(trace.group(), rest);
    const QueryBlock block{trace.Queries(trace.q_train, query, kv_head).data(), DType::kFp32,
                           trace.group(), trace.head_dim, trace.scale, ranges};
    ExactScan().Score(head, block, &scores);
    for (uint32_t g = 0; g < trace.group(); ++g) {
      std::span<float> row(scores.score.data() + size_t{g} * scores.nodes + rest.lo, rest.size());
      Kernels().exp_sum(row.data(), row.size(), Kernels().max(row.data(), row.size()));
      tokens.push_back(TokensForMass(row, kMassShare));
      rest_tokens.push_back(rest.size());
    }
  }
  return ClassOf(Median(std::move(tokens)), Median(std::move(rest_tokens)));
}

}  // namespace quarry::perf

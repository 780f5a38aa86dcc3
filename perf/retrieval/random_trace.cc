#include "perf/retrieval/random_trace.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "absl/strings/str_cat.h"
#include "proto/half.h"

namespace quarry::perf {
namespace {

void FillQueries(const RandomTraceOptions& options, uint32_t count, std::mt19937* random,
                 std::vector<float>* out) {
  std::normal_distribution<float> normal;
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t head = 0; head < options.kv_heads; ++head) {
      const float spread =
          1.0f + 5.0f * static_cast<float>(head) /
                     static_cast<float>(std::max(1u, options.kv_heads - 1));
      for (uint32_t d = 0; d < options.group * options.head_dim; ++d) {
        out->push_back(spread * normal(*random));
      }
    }
  }
}

}  // namespace

Trace TraceOfShape(const RandomTraceOptions& options) {
  Trace trace;
  trace.scale = 1.0f / std::sqrt(static_cast<float>(options.head_dim));
  trace.tokens = options.tokens;
  trace.kv_heads = options.kv_heads;
  trace.heads = options.kv_heads * options.group;
  trace.head_dim = options.head_dim;
  trace.dtype = options.dtype;
  const size_t elements = size_t{options.tokens} * options.kv_heads * options.head_dim;
  for (std::vector<std::byte>* part : {&trace.k, &trace.v}) {
    part->resize(elements * DTypeBytes(options.dtype));
  }
  for (uint32_t i = 0; i < options.train_queries; ++i) {
    const uint64_t end = uint64_t{options.tokens} * (i + 1) / options.train_queries;
    trace.q_train_pos.push_back(static_cast<uint32_t>(std::max<uint64_t>(end, 1)) - 1);
  }
  for (uint32_t i = 0; i < options.queries; ++i) {
    trace.q_pos.push_back(options.tokens - std::min(options.tokens, options.queries) +
                          std::min(i, options.tokens - 1));
  }
  return trace;
}

Trace RandomTrace(const RandomTraceOptions& options) {
  std::mt19937 random(options.seed);
  std::normal_distribution<float> normal;
  Trace trace = TraceOfShape(options);
  trace.name = absl::StrCat("random-", options.tokens, "-", options.seed);
  trace.model = "random";
  for (std::vector<std::byte>* part : {&trace.k, &trace.v}) {
    for (size_t i = 0; i < part->size() / DTypeBytes(options.dtype); ++i) {
      StoreFromFloat(part->data(), i, options.dtype, normal(random) + 0.5f);
    }
  }
  FillQueries(options, options.train_queries, &random, &trace.q_train);
  FillQueries(options, options.queries, &random, &trace.q);
  return trace;
}

}  // namespace quarry::perf

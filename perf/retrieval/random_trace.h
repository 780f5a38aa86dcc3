// A trace of random numbers: no needles and no structure, for a first look and for tests.
#pragma once

#include <cstdint>

#include "perf/trace.h"

namespace quarry::perf {

struct RandomTraceOptions {
  uint32_t tokens = 32768;
  uint32_t kv_heads = 4;
  uint32_t group = 4;
  uint32_t head_dim = 128;
  uint32_t train_queries = 64;
  uint32_t queries = 32;  // at the last positions
  DType dtype = DType::kBf16;
  uint32_t seed = 1;
};

// What every such trace has: sizes, zeroed keys and values, and positions; training queries are
// spread evenly over the tokens. Without names and queries.
Trace TraceOfShape(const RandomTraceOptions& options);

// Normal keys around a mean of their own; the scores of head h are normal with a standard deviation
// of 1 + 5 h / (kv_heads - 1), so that the first heads are diffuse and the last ones sharp.
Trace RandomTrace(const RandomTraceOptions& options);

}  // namespace quarry::perf

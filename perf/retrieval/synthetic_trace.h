// Seeded traces of hard heads, with attention as concentrated as is wanted.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "perf/retrieval/random_trace.h"

namespace quarry::perf {

// needles   sets of 2, 16, 64 and 256 tokens that share a mark, each sought as a whole
// drift     what queries seek turns, during generation, to what no training query sought
// rope      queries far out of the keys' distribution, keys and queries turned by their positions
// mean-key  a mean six times as long as the keys' spread
// low-rank  keys of 8 dimensions
// mass-30, mass-300, mass-3000, mass-30000   90% of each query's mass on about so many tokens
std::vector<std::string> SyntheticFamilies();

// The tokens that hold 90% of the mass of what the window leaves, in the median over queries at the
// end, as the KV heads of a family in turn aim at: for needles their sets' sizes (and 97%, lest
// half of the needles weigh nothing), else 30, 300, 1,000 and 3,000, or the family's one number;
// never more than a quarter of the tokens. The scores of a head are scaled for it by 256 sampled
// queries; those of mass-... query by query, to counts whose logs are normal around it with a
// standard deviation of 0.35.
double SyntheticTarget(const std::string& family, uint32_t kv_head, uint32_t tokens);

// One thread for each KV head. InvalidArgument names the families, or what of the shape is
// wrong: fewer than 2,048 tokens, or a head_dim that no kernel takes. With 131,072 tokens and 4 KV
// heads of 128 dimensions some 20 s of processor time, and 1 GiB at most.
absl::StatusOr<Trace> SyntheticTrace(const std::string& family, const RandomTraceOptions& shape);

}  // namespace quarry::perf

// The exact nearest keys of many queries, by blocked matrix products.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu_index/key_index.h"

namespace quarry {

// For each of `queries` [n][head_dim], rounded to bf16, the `count` tokens of the run with the
// largest q.k, the largest first and of equal ones the earlier token: [n][min(count, tokens)],
// counted from the run's first token. The same on any number of threads.
// Cost: n * tokens * head_dim multiplications, and a comparison for every sixteenth score or so.
std::vector<uint32_t> TopKeys(const KvView& run, std::span<const float> queries, uint32_t count,
                              uint32_t threads);

}  // namespace quarry

// TopK: the best tokens of one query head by exact score.
#pragma once

#include <cstdint>
#include <memory>

#include "daemon/block_table.h"
#include "proto/retrieval_types.h"
#include "proto/types.h"

namespace quarry {

struct TopKQuery {
  const BlockTable* table = nullptr;  // outlives the call
  const KvShape* shape = nullptr;
  uint32_t layer = 0;
  TokenRange range;  // stored tokens of the layer and heads
  uint32_t first_head = 0;
  uint32_t heads = 0;
  const float* q = nullptr;  // [heads][head_dim]
  DType q_dtype = DType::kFp32;
  uint32_t k = 0;
  uint32_t task_tokens = 0;  // scanned at a time
};

// Ranks per head by falling score, ties by token; at most k entries. One pass over K per KV head.
// gather: with K and V of every entry. The answer's status is not OK where blocks on the disk could
// not be read.
TopKAnswer ExactTopK(const TopKQuery& query, bool gather);

}  // namespace quarry

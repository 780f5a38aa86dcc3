// Plain types of the retrieval interface: what a decode worker asks and what it gets.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/types.h"

namespace quarry {

// How many tokens of a row's range are attended exactly. A budget spans the whole query: all
// runs of the range together, per query head. Fields that a kind does not name are not used.
struct Budget {
  enum class Kind : uint8_t {
    kUnlimited = 0,    // every token of the range: exact attention
    kFixedK = 1,       // the k tokens of largest score
    kTopP = 2,         // the fewest tokens whose softmax mass over the range is >= mass, at most k if
                       // k > 0
    kError = 3,        // the fewest tokens with which the answer's predicted relative error is
                       // about error, and never above twice that; if k > 0 at most k are read one
                       // by one for a query, whatever the error. Where nothing is indexed, or
                       // estimates are worth nothing, all
    kDipr = 4,         // the tokens whose score is at least the range's largest less beta, at most k
                       // if k > 0
    kSoftmaxLift = 5,  // k tokens drawn by priority, weighing so that sums over them are unbiased
  };
  static constexpr Kind kLastKind = Kind::kSoftmaxLift;
  Kind kind = Kind::kUnlimited;
  uint32_t k = 0;
  float mass = 1.0f;  // (0, 1]
  float error = 0;    // (0, 1)
  float beta = 0;     // nats, >= 0
  uint32_t seed = 0;  // of what kSoftmaxLift draws
  friend bool operator==(const Budget&, const Budget&) = default;
};

// One query row: some query heads of one token in one layer. Buffers are borrowed.
struct AttendRow {
  ContextId context;
  uint32_t layer = 0;
  TokenRange range;          // tokens to attend; everything the worker does not attend itself
  uint32_t first_head = 0;   // query heads [first_head, first_head + heads), whole groups of a KV head
  uint32_t heads = 0;
  Budget budget;
  DType q_dtype = DType::kFp32;
  const void* q = nullptr;   // [heads][head_dim] of q_dtype, after RoPE; not read if range is empty

  // The new token's K and V of this layer, stored before the row is answered. Its position must
  // be the layer's next one for these KV heads; has_token = false appends nothing.
  bool has_token = false;
  // Of the query; with has_token also of the token. Not otherwise used but by kSoftmaxLift, which
  // draws anew for each position, and with `merged`.
  uint32_t token_position = 0;
  // The answer will be merged with attention over the context's other tokens up to the query's
  // position. Then Budget::kError is of the merged answer: beside a strong window little is read.
  bool merged = false;
  const void* k = nullptr;   // [heads / group][head_dim] of the context's dtype
  const void* v = nullptr;
};

// The answer to one row. Numerics: natural-log lse over the attended tokens; an empty set has
// lse = -infinity and o = 0. Caller owns o and lse.
struct AttendAnswer {
  absl::Status status;            // not OK: the token is void, o and lse are not to be used
  TokenRange covered;             // equals the row's range when OK
  uint64_t tokens_attended = 0;   // summed over the row's heads
  uint64_t bytes_touched = 0;     // of K, V and index data read for this row
  // Largest over the heads. kUnlimited: 0. kFixedK, kTopP, kDipr: share of the range's softmax mass
  // that was not attended. kError: predicted length of the error of o, by the length of o, or with
  // `merged` by that of what it is merged into. kSoftmaxLift: predicted standard error of e^lse, by
  // e^lse. Of a run whose index lists tokens, only these are known.
  float error_estimate = 0;
  std::span<float> o;             // [heads][head_dim]
  std::span<float> lse;           // [heads]
  // Tokens of the range that were reused from another position or behind other text: not 0, the
  // answer is approximate (OpenRequest::reuse_shifted).
  uint32_t shifted_tokens = 0;
};

// The top tokens of one query head.
struct TopKEntry {
  uint32_t token = 0;
  float score = 0;  // q.k / sqrt(head_dim)
};
struct TopKAnswer {
  absl::Status status;
  std::vector<std::vector<TopKEntry>> heads;  // by falling score; ties by token
  // When asked for: gathered K and V of each entry, [entries][head_dim] of the context's dtype.
  std::vector<std::string> k;
  std::vector<std::string> v;
  uint32_t shifted_tokens = 0;  // as AttendAnswer's
};

inline constexpr float kEmptyLse = -std::numeric_limits<float>::infinity();

}  // namespace quarry

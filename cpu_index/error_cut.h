// How many tokens of a query are looked at more closely, so that its predicted error is tolerated.
#pragma once

#include <cstdint>
#include <span>

#include "cpu_index/cluster_model.h"

namespace quarry {

// What one query's tokens and groups of tokens weigh, by their scores. All masses and errors are by
// e^top, errors also by the length of a typical answer.
struct ErrorCutInput {
  std::span<const float> scores;  // of tokens, by their codes
  float top = 0;                  // near the largest of all scores
  float token_doubt = 0;          // of a single token's estimate, by its mass
  float common_part = 0;          // of that, what adds up over tokens
  float refined_part = 0;         // of that, what is left where a token's row is read
  float closed = 0;               // error of the groups that stay closed
  float allowed = 0;              // error
  uint32_t most_tokens = ~0u;
};

// Tokens of at least `refine` are to be read by their rows, those of at least `exact` exactly; the
// first tokens of the highest scores until the errors left add up to at most what is allowed: those of
// single tokens as independent, the common parts and the groups' as one. A histogram of the scores:
// no sort, no exponential for a token, and the cut is true to an eighth of a nat.
struct ErrorCut {
  float refine, exact;
  float error;     // that is left
  float together;  // of that, what adds up: the root of their squares' difference is independent
};
ErrorCut FindErrorCut(const ErrorCutInput& in);

// The least weight (a log) that has to be opened, so that those of `weights` below it sum up to at
// most e^allowed.
float OpenFrom(std::span<const float> weights, float allowed);

}  // namespace quarry

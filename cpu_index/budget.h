// Budgets: how many of a query's tokens are attended, over all its runs together.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "cpu_index/key_index.h"
#include "proto/retrieval_types.h"

namespace quarry {

// One query's row of a run's coarse scores.
struct RunScores {
  const CoarseScores* coarse = nullptr;
  uint32_t query = 0;  // the row
};

// What the query gets of that run: nodes with score > threshold, and of those that equal it the
// first `ties`.
struct RunShare {
  float threshold = 0;
  uint32_t ties = 0;
  float exact = -std::numeric_limits<float>::infinity();  // as in RunAllotment
};

// Shares `budget` out over one query's runs, given in token order, as if they were one: the same
// tokens cut differently give the same selection. Ties go to the lowest tokens. A group of tokens
// is taken whole, so a budget may be overrun by part of one group. Returns the share of the
// softmax mass over all the runs' tokens that the selection holds: 1 if that is everything, also
// for no tokens at all; under Budget::kError 1 less the predicted error of the answer. Of a run with lists only the nodes in them are known, so the share is of
// these.
// Cost: a few passes over the scores; no full sort.
// other_length: as QueryBlock's, of this query; only Budget::kError uses it.
double AllocateBudget(const Budget& budget, std::span<const RunScores> runs,
                      std::span<RunShare> shares,
                      float other_length = -std::numeric_limits<float>::infinity());

}  // namespace quarry

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

// What the query gets of that run: as RunAllotment says of each query.
struct RunShare {
  float threshold = -std::numeric_limits<float>::infinity();
  uint32_t ties = 0;
  float floor = -std::numeric_limits<float>::infinity();  // of weights
};

// Shares `budget` out over one query's runs, given in token order, as if they were one: the same
// tokens cut differently give the same selection. Ties go to the lowest tokens. Of a run with lists
// only the tokens in them are known, so what is said of shares and errors is of these. Not for
// Budget::kError, which is for indexes that estimate.
// Returns 1 less the error estimate of AttendAnswer, so where nothing is sampled the share of the
// softmax mass that the selection holds; 1 for no tokens at all.
// Cost: three passes over the scores, at the speed of vectors, and a selection among the few that
// a sample shows may be taken.
// lift_key: of LiftKey, for Budget::kSoftmaxLift.
double AllocateBudget(const Budget& budget, std::span<const RunScores> runs,
                      std::span<RunShare> shares, uint64_t lift_key = 0);

}  // namespace quarry

// How many tokens of a query are looked at more closely, so that its predicted error is tolerated.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "cpu_index/kernels.h"

namespace quarry {

// How many scores, logs of weights, lie in each eighth of a nat below a top. No sort, and no exponential
// for a score; what is found by it is true to a bin.
struct ScoreHistogram {
  static constexpr int kBins = kernels::kHistogramBins;  // the last: far below, and no weight at all
  static constexpr float kPerNat = 8;
  // No less than any score, and a whole number of bins, so that histograms can be added.
  float top = -std::numeric_limits<float>::infinity();
  std::array<uint32_t, kBins> count{};

  static ScoreHistogram Of(std::span<const float> scores);
  void Add(const ScoreHistogram& other);
  // The least score in the `bins` highest, whose lower edges are the next ones'; infinity for none.
  float Below(int bins) const;
  // How many of the scores are at least that, a Below of this or of another one; none of the last
  // bin.
  uint64_t CountFrom(float least) const;
};

// What one query's tokens and groups of tokens weigh, by their scores. Errors are by e^tokens.top and
// the length of a typical answer.
struct ErrorCutInput {
  ScoreHistogram tokens;          // by their codes
  float token_doubt = 0;          // of a single token's estimate, by its mass
  float common_part = 0;          // of that, what adds up over tokens
  float refined_part = 0;         // of that, what is left where a token's row is read
  float closed = 0;               // error of the groups that stay closed
  float allowed = 0;              // error
  uint32_t most_tokens = ~0u;
  // Whatever is allowed, tokens from this score on are read exactly, but no more than so many.
  float surely_from = std::numeric_limits<float>::infinity();
  uint32_t surely_most = 0;
};

// Tokens of at least `refine` are to be read by their rows, those of at least `exact` exactly; the
// first tokens of the highest scores until the errors left add up to at most what is allowed: those of
// single tokens as independent, the common parts and the groups' as one.
struct ErrorCut {
  float refine, exact;
  float error = 0;  // that is left
  // Of that, what adds up: the root of their squares' difference is independent.
  float together = 0;
  uint64_t tokens = 0;  // that are read by their rows or exactly
};
ErrorCut FindErrorCut(const ErrorCutInput& in);

// Of tokens that several searches want to read for one query, those of the highest scores, together
// no more than `most`: how many of each.
std::vector<uint32_t> ShareTokens(std::span<const ScoreHistogram> wanted, uint32_t most);

// The least weight (a log) that has to be opened, so that the weights below it sum up to at most
// e^allowed.
float OpenFrom(const ScoreHistogram& weights, float allowed);

}  // namespace quarry

// The offline search of MInference (arXiv 2407.02490, algorithm 1): for each head the pattern that
// comes closest to dense attention among candidates adjusted to equal cost. Cost is the exact
// number of key tiles, distance that of the outputs.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gpu/sparse/build_index.h"
#include "gpu/sparse/pattern.h"
#include "gpu/thread_team.h"

namespace quarry {

struct PatternSearchOptions {
  // What every candidate may cost, of dense attention's tiles on the sample.
  double tiles_share = 0.25;
  // A head whose best candidate errs more stays dense; infinite: never.
  double max_error = 0.1;
};
// InvalidArgument names the option and its value.
absl::Status ValidatePatternSearch(const PatternSearchOptions& options);

// The paper's A-shape (1024, 4096), vertical-slash (30, 2048), (100, 1800), (500, 1500) and
// (3000, 200) and block-sparse 100, and block-scored.
std::vector<Pattern> PatternCandidates();

// The reference sample of one layer: a whole prefill, and the rows whose outputs are compared.
struct SearchSample {
  LayerKv layer;
  TokenRange prefill;
  const float* q = nullptr;          // [rows of the prefill][heads][head_dim]
  std::span<const uint32_t> tokens;  // of the compared rows, rising
};

struct SearchedCandidate {
  uint32_t candidate = 0;  // its place among those given
  Pattern pattern;         // as adjusted
  double tiles_share = 0, mass = 0, error = 0;
};
struct SearchedHead {
  HeadPattern best;
  // Those that have a form within the cost, in the order given.
  std::vector<SearchedCandidate> candidates;
};

// `candidate` made larger or smaller, `step` of 1 to kMostStep: the cost never falls with the step.
// The two counts of A-shape and of vertical-slash change by one factor, block-sparse's blocks and
// block-scored's threshold by themselves.
inline constexpr uint32_t kMostStep = 4096;
Pattern Adjusted(const Pattern& candidate, uint32_t step, uint32_t tokens);

// [heads]. Each candidate takes the largest step whose exact cost is within the share: the costs
// differ by less than a step changes them. Ties go to the candidate that comes first.
// Per candidate: 12 indexes and one attention of the sampled rows; dense attention of them once.
std::vector<SearchedHead> SearchPatterns(const SearchSample& sample,
                                         std::span<const Pattern> candidates,
                                         const PatternSearchOptions& options, ThreadTeam* team);

}  // namespace quarry

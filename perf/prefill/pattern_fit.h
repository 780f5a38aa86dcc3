// Patterns that run as many tiles as is asked.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/sparse/pattern.h"
#include "gpu/thread_team.h"
#include "perf/prefill/layer_on_device.h"
#include "perf/prefill/plan_tiles.h"

namespace quarry::perf {

// What can be fitted, by the names of PatternName: a_shape, vertical_slash, block_sparse and
// block_scored.
std::vector<std::string> FittedPatterns();

// [heads]: for each head the pattern of this name that runs the most tiles which are at most its
// share of the dense ones, as planned from the last queries that were put there; where none does,
// the one that runs the least. By halving: A-shapes of 64 sinks by their window, vertical-slash by
// the mass that it captures in the fewest tiles, blocks by their number or threshold. 9 plans.
absl::StatusOr<std::vector<HeadPattern>> FitPatterns(std::string_view name,
                                                     std::span<const double> shares,
                                                     LayerOnDevice* layer, const PlanTiles& tiles,
                                                     ThreadTeam* team);

}  // namespace quarry::perf

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

// Vertical-slash by the mass that it captures; "vertical_slash" is by numbers.
inline constexpr std::string_view kLinesByMass = "vertical_slash_mass";

// What can be fitted: a_shape, vertical_slash, vertical_slash_mass, block_sparse, block_scored.
std::vector<std::string> FittedPatterns();

// [heads]: for each head the pattern of this name that runs the most tiles which are at most its
// share of the dense ones, as planned from the last queries that were put there; where none does,
// the one that runs the least. By halving, in 9 plans: A-shapes of 64 sinks by their window,
// vertical-slash by its slashes for half of the tiles and then (9 more) its columns, or by the mass
// that it captures in the fewest tiles, blocks by their number or threshold.
absl::StatusOr<std::vector<HeadPattern>> FitPatterns(std::string_view name,
                                                     std::span<const double> shares,
                                                     LayerOnDevice* layer, const PlanTiles& tiles,
                                                     ThreadTeam* team);

}  // namespace quarry::perf

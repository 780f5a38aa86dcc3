#include "perf/prefill/pattern_fit.h"

#include <algorithm>
#include <cmath>

#include "proto/status_macros.h"

namespace quarry::perf {
namespace {

constexpr int kHalvings = 9;
constexpr uint32_t kFittedSinks = kKeyTile;

// From the fewest tiles, x = 0, to the most, x = 1.
Pattern At(std::string_view name, double x, uint32_t tokens) {
  const auto up_to = [&](double most) {
    return static_cast<uint32_t>(std::max(1.0, std::round(std::pow(most, x))));
  };
  if (name == "a_shape") return AShapePattern{kFittedSinks, up_to(tokens)};
  if (name == "vertical_slash") {
    return VerticalSlashMassPattern{std::max(1e-3, 1 - std::pow(10.0, -6 * x)), 1};
  }
  if (name == "block_sparse") return BlockSparsePattern{up_to(KeyTilesOf(tokens))};
  return BlockScoredPattern{std::pow(10.0, -6 * x)};
}

}  // namespace

std::vector<std::string> FittedPatterns() {
  return {"a_shape", "vertical_slash", "block_sparse", "block_scored"};
}

absl::StatusOr<std::vector<HeadPattern>> FitPatterns(std::string_view name,
                                                     std::span<const double> shares,
                                                     LayerOnDevice* layer, const PlanTiles& tiles,
                                                     ThreadTeam* team) {
  const uint32_t tokens = tiles.tokens();
  const double dense = PlanTiles::Dense({0, tokens});
  std::vector<double> low(shares.size(), 0.0), high(shares.size(), 1.0);
  std::vector<HeadPattern> patterns(shares.size());
  LayerPlan plan;
  for (int i = 0; i < kHalvings; ++i) {
    for (size_t h = 0; h < shares.size(); ++h) {
      patterns[h] = {At(name, (low[h] + high[h]) / 2, tokens)};
    }
    QUARRY_RETURN_IF_ERROR(layer->Plan(patterns, &plan).status());
    const std::vector<double> run = tiles.Of(plan, team);
    for (size_t h = 0; h < shares.size(); ++h) {
      (run[h] <= shares[h] * dense ? low : high)[h] = (low[h] + high[h]) / 2;
    }
  }
  for (size_t h = 0; h < shares.size(); ++h) patterns[h] = {At(name, low[h], tokens)};
  return patterns;
}

}  // namespace quarry::perf

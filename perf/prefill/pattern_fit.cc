#include "perf/prefill/pattern_fit.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <variant>

#include "proto/status_macros.h"

namespace quarry::perf {
namespace {

constexpr int kHalvings = 9;
constexpr uint32_t kFittedSinks = kKeyTile;

// A pattern for a head, from the fewest tiles, x = 0, to the most, x = 1.
using Family = std::function<Pattern(size_t head, double x)>;

// 1 at x = 0, `most` at x = 1.
uint32_t UpTo(double most, double x) {
  return static_cast<uint32_t>(std::max(1.0, std::round(std::pow(most, x))));
}
double DownToAMillionth(double x) { return std::pow(10.0, -6 * x); }

absl::StatusOr<std::vector<HeadPattern>> Fit(const Family& family, std::span<const double> shares,
                                             LayerOnDevice* layer, const PlanTiles& tiles,
                                             ThreadTeam* team) {
  const double dense = PlanTiles::Dense({0, tiles.tokens()});
  std::vector<double> low(shares.size(), 0.0), high(shares.size(), 1.0);
  std::vector<HeadPattern> patterns(shares.size());
  LayerPlan plan;
  for (int i = 0; i < kHalvings; ++i) {
    for (size_t h = 0; h < shares.size(); ++h) patterns[h] = {family(h, (low[h] + high[h]) / 2)};
    QUARRY_RETURN_IF_ERROR(layer->Plan(patterns, &plan).status());
    QUARRY_ASSIGN_OR_RETURN(const std::vector<HeadPlan> planned, LayerOnDevice::HeadsOf(plan));
    const std::vector<double> run = tiles.Of(planned, team);
    for (size_t h = 0; h < shares.size(); ++h) {
      (run[h] <= shares[h] * dense ? low : high)[h] = (low[h] + high[h]) / 2;
    }
  }
  for (size_t h = 0; h < shares.size(); ++h) patterns[h] = {family(h, low[h])};
  return patterns;
}

// Half of the tiles for slashes, what is left for columns.
absl::StatusOr<std::vector<HeadPattern>> FitLines(std::span<const double> shares,
                                                  LayerOnDevice* layer, const PlanTiles& tiles,
                                                  ThreadTeam* team) {
  std::vector<double> halves(shares.begin(), shares.end());
  for (double& share : halves) share /= 2;
  const Family slashes = [&](size_t, double x) {
    return VerticalSlashPattern{0, UpTo(tiles.tokens(), x)};
  };
  QUARRY_ASSIGN_OR_RETURN(const std::vector<HeadPattern> found,
                          Fit(slashes, halves, layer, tiles, team));
  const Family columns = [&](size_t h, double x) {
    VerticalSlashPattern pattern = std::get<VerticalSlashPattern>(found[h].pattern);
    pattern.columns = UpTo(tiles.tokens(), x);
    return pattern;
  };
  return Fit(columns, shares, layer, tiles, team);
}

}  // namespace

std::vector<std::string> FittedPatterns() {
  return {"a_shape", "vertical_slash", std::string(kLinesByMass), "block_sparse", "block_scored"};
}

absl::StatusOr<std::vector<HeadPattern>> FitPatterns(std::string_view name,
                                                     std::span<const double> shares,
                                                     LayerOnDevice* layer, const PlanTiles& tiles,
                                                     ThreadTeam* team) {
  if (name == "vertical_slash") return FitLines(shares, layer, tiles, team);
  const Family family = [&](size_t, double x) -> Pattern {
    if (name == "a_shape") return AShapePattern{kFittedSinks, UpTo(tiles.tokens(), x)};
    if (name == kLinesByMass) {
      return VerticalSlashMassPattern{std::max(1e-3, 1 - DownToAMillionth(x)), 1};
    }
    if (name == "block_sparse") return BlockSparsePattern{UpTo(KeyTilesOf(tiles.tokens()), x)};
    return BlockScoredPattern{DownToAMillionth(x)};
  };
  return Fit(family, shares, layer, tiles, team);
}

}  // namespace quarry::perf

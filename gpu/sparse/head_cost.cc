#include "gpu/sparse/head_cost.h"

#include <algorithm>

namespace quarry {

bool SparseIsCheaper(uint32_t sparse, uint32_t dense, DenseFallback fallback) {
  // A row tile that runs as many tiles as a dense one may as well attend what is in them.
  if (fallback == DenseFallback::kNever) return sparse < dense;
  return kSparseTileEighths * sparse < 8 * uint64_t{dense};
}

HeadCost CostOf(std::span<const RelativeRange> ranges, std::span<const uint32_t> columns,
                TokenRange rows, DenseFallback fallback) {
  const RowTileCounts counts = CountRowTiles(ranges, columns, rows);
  HeadCost cost;
  for (uint32_t t = 0; t < counts.range_tiles.size(); ++t) {
    const uint32_t sparse = counts.Tiles(t);
    const uint32_t hi = std::min(rows.lo + (t + 1) * kRowTile, rows.hi);
    const uint32_t dense = KeyTilesOf(hi);
    const bool cheaper = SparseIsCheaper(sparse, dense, fallback);
    cost.tiles += cheaper ? sparse : dense;
    cost.eighths += cheaper ? kSparseTileEighths * sparse : 8 * uint64_t{dense};
    cost.dense_tiles += dense;
  }
  return cost;
}

}  // namespace quarry

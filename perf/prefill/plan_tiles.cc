#include "perf/prefill/plan_tiles.h"

#include "gpu/sparse/build_index.h"
#include "gpu/sparse/head_cost.h"
#include "gpu/sparse/sparse_index.h"

namespace quarry::perf {

PlanTiles::PlanTiles(const MadeLayer& layer, std::span<const MadeHead> kinds,
                     std::span<const uint32_t> row_tiles, ThreadTeam* team)
    : layer_(layer), means_(layer.kv().kv_heads) {
  const LayerKv& kv = layer.kv();
  for (const uint32_t t : row_tiles) {
    RowTile& tile = row_tiles_.emplace_back();
    tile.rows = {t * kRowTile, (t + 1) * kRowTile};
    tile.q.resize(size_t{kRowTile} * kv.heads * kv.head_dim);
    layer.Queries(kinds, tile.rows, tile.q.data(), team);
  }
  team->For(means_.size(), [&](size_t h) {
    const auto head = static_cast<uint32_t>(h) * (kv.heads / kv.kv_heads);
    means_[h] = BlockMeans(kv, head, layer.options().tokens);
  });
}

std::vector<double> PlanTiles::Of(std::span<const HeadPlan> plan, ThreadTeam* team) const {
  const TokenRange rows{0, tokens()};
  const double dense = Dense(rows);
  std::vector<double> out(plan.size());
  team->For(plan.size(), [&](size_t h) {
    switch (plan[h].kind) {
      case HeadKind::kDense:
        out[h] = dense;
        break;
      case HeadKind::kRanges:
        out[h] = static_cast<double>(
            CostOf(plan[h].ranges, plan[h].columns, rows, DenseFallback::kWhereCheaper).tiles);
        break;
      case HeadKind::kBlocks:
        out[h] = dense * ShareOfBlocks(plan[h], static_cast<uint32_t>(h));
        break;
    }
  });
  return out;
}

double PlanTiles::Dense(TokenRange rows) { return static_cast<double>(DenseTilesOf(rows)); }

// As BuildIndex does, but with means of key blocks that are made once for all row tiles.
double PlanTiles::ShareOfBlocks(const HeadPlan& plan, uint32_t head) const {
  const LayerKv& kv = layer_.kv();
  const BlockMeans& means = means_[head / (kv.heads / kv.kv_heads)];
  double tiles = 0, dense = 0;
  for (const RowTile& tile : row_tiles_) {
    const IndexInputs inputs{kv, tile.rows.lo, tile.rows.size(), tile.q.data()};
    const uint32_t all = KeyTilesOf(tile.rows.hi);
    const auto sparse = static_cast<uint32_t>(
        ChooseBlocks(plan.pattern, tile.rows,
                     BlockWeights(inputs, head, means, plan.pattern).Of(tile.rows))
            .size());
    tiles += BlocksAreCheaper(plan.pattern, sparse, all, inputs.fallback) ? sparse : all;
    dense += all;
  }
  return tiles / dense;
}

}  // namespace quarry::perf

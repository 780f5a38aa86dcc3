#include "perf/prefill/plan_tiles.h"

#include <algorithm>

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

std::vector<double> PlanTiles::Of(const LayerPlan& plan, ThreadTeam* team) const {
  const TokenRange rows{0, layer_.options().tokens};
  const double dense = Dense(rows);
  std::vector<double> out(plan.size());
  bool blocks = false;
  for (size_t h = 0; h < plan.size(); ++h) {
    if (plan[h].kind == HeadKind::kDense) {
      out[h] = dense;
    } else if (plan[h].kind == HeadKind::kRanges) {
      out[h] = static_cast<double>(
          CostOf(plan[h].ranges, plan[h].columns, rows, DenseFallback::kWhereCheaper).tiles);
    } else {
      blocks = true;
    }
  }
  if (!blocks) return out;
  double sampled = 0;
  for (const RowTile& tile : row_tiles_) {
    sampled += KeyTilesOf(tile.rows.hi);
    const SparseIndex index = IndexOf(plan, tile, team);
    for (uint32_t h = 0; h < plan.size(); ++h) {
      if (plan[h].kind == HeadKind::kBlocks) out[h] += static_cast<double>(index.HeadCost(h));
    }
  }
  for (size_t h = 0; h < plan.size(); ++h) {
    if (plan[h].kind == HeadKind::kBlocks) out[h] *= dense / sampled;
  }
  return out;
}

double PlanTiles::Dense(TokenRange rows) {
  double tiles = 0;
  for (uint32_t lo = rows.lo; lo < rows.hi; lo += std::min(kRowTile, rows.hi - lo)) {
    tiles += KeyTilesOf(std::min(lo + kRowTile, rows.hi));
  }
  return tiles;
}

// With means of key blocks that are made once for all row tiles.
SparseIndex PlanTiles::IndexOf(const LayerPlan& plan, const RowTile& tile, ThreadTeam* team) const {
  const LayerKv& kv = layer_.kv();
  const IndexInputs with_queries{kv, tile.rows.lo, tile.rows.size(), tile.q.data()};
  IndexInputs inputs{kv, tile.rows.lo, tile.rows.size()};
  inputs.block_weights = [&](uint32_t head, uint32_t) {
    return BlockWeights(with_queries, head, means_[head / (kv.heads / kv.kv_heads)],
                        plan[head].pattern)
        .Of(tile.rows);
  };
  return BuildIndex(plan, inputs, team);
}

}  // namespace quarry::perf

// What a plan runs, in key tiles.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpu/sparse/choose_blocks.h"
#include "gpu/thread_team.h"
#include "perf/prefill/made_layer.h"

namespace quarry::perf {

// Counts on the host what attention of a plan by all rows runs, as its index would say: of dense
// heads and of ranges and columns exactly; of heads of block patterns, whose blocks depend on every
// row tile's queries, in `row_tiles` alone, scaled by the dense tiles of all rows to theirs. The
// device weighs blocks by means rounded to the keys' dtype, so that a few blocks may be others.
class PlanTiles {
 public:
  // row_tiles: whole ones, rising (SampledRowTiles). The layer outlives it.
  PlanTiles(const MadeLayer& layer, std::span<const MadeHead> kinds,
            std::span<const uint32_t> row_tiles, ThreadTeam* team);

  // plan, and what is returned: [heads]
  std::vector<double> Of(std::span<const HeadPlan> plan, ThreadTeam* team) const;
  // Of one head, were it dense: of rows [lo, hi) that begin at a whole row tile.
  static double Dense(TokenRange rows);
  uint32_t tokens() const { return layer_.options().tokens; }

 private:
  struct RowTile {
    TokenRange rows;
    std::vector<float> q;  // [rows][heads][head_dim]
  };
  // In the sampled row tiles, a share of their dense tiles.
  double ShareOfBlocks(const HeadPlan& plan, uint32_t head) const;

  const MadeLayer& layer_;
  std::vector<RowTile> row_tiles_;
  std::vector<BlockMeans> means_;  // [kv_heads]
};

}  // namespace quarry::perf

// How few key tiles have a share of a head's attention, were they known beforehand.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "perf/prefill/made_layer.h"

namespace quarry::perf {

// Of one head, shares of the tiles of dense attention over the same row tiles.
struct OracleShare {
  // Each row tile's keys gathered 64 to a tile: nothing that runs whole row tiles can do with less.
  double tiles = 0;
  // Key blocks of 64 consecutive tokens, from token 0.
  double blocks = 0;
};

// `count` whole row tiles of 128 among `tokens` (at least 128), one in the middle of each of as
// many equal stretches, and always the last; rising.
std::vector<uint32_t> SampledRowTiles(uint32_t tokens, uint32_t count);

// [heads]: the fewest tiles whose keys have `mass` of the softmax mass of a row tile's 128 rows,
// summed over the row tiles. Scores in fp32, sums in double. O(128 tokens head_dim) per head and
// row tile; memory 16 tokens floats and 5 tokens doubles per thread.
std::vector<OracleShare> OracleShares(const MadeLayer& layer, std::span<const MadeHead> kinds,
                                      std::span<const uint32_t> row_tiles, double mass,
                                      ThreadTeam* team);

}  // namespace quarry::perf

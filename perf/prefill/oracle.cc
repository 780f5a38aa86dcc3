#include "perf/prefill/oracle.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "gpu/sparse/choose_lines.h"
#include "gpu/sparse/sparse_index.h"
#include "proto/check.h"

namespace quarry::perf {
namespace {

static_assert(kRowTile == 2 * kLastQueries);

// How many of these, the largest first, sum up to `wanted`.
uint32_t FewestOf(std::vector<double>* mass, double wanted) {
  std::sort(mass->begin(), mass->end(), std::greater<>());
  uint32_t count = 0;
  for (double sum = 0; count < mass->size() && sum < wanted; ++count) sum += (*mass)[count];
  return count;
}

}  // namespace

std::vector<uint32_t> SampledRowTiles(uint32_t tokens, uint32_t count) {
  const uint32_t whole = tokens / kRowTile;
  count = std::min(count, whole);
  std::vector<uint32_t> out;
  for (uint32_t i = 0; i < count; ++i) {
    out.push_back(static_cast<uint32_t>((2 * uint64_t{i} + 1) * whole / (2 * uint64_t{count})));
  }
  out.back() = whole - 1;
  return out;
}

std::vector<OracleShare> OracleShares(const MadeLayer& layer, std::span<const MadeHead> kinds,
                                      std::span<const uint32_t> row_tiles, double mass,
                                      ThreadTeam* team) {
  const auto heads = static_cast<uint32_t>(kinds.size());
  const size_t width = size_t{heads} * layer.kv().head_dim;
  std::vector<float> q(kRowTile * width);
  std::vector<OracleShare> out(heads);
  double dense = 0;
  for (const uint32_t t : row_tiles) {
    const TokenRange rows{t * kRowTile, (t + 1) * kRowTile};
    QUARRY_CHECK(rows.hi <= layer.options().tokens);
    layer.Queries(kinds, rows, q.data(), team);
    dense += KeyTilesOf(rows.hi);
    team->For(heads, [&](size_t h) {
      // The sums of a prefill's last 64 queries, for each half of the row tile.
      std::vector<double> keys(rows.hi, 0.0);
      for (const uint32_t half : {0u, 1u}) {
        const TokenRange prefill{0, rows.lo + (half + 1) * kLastQueries};
        const LineSums sums =
            SumLines({layer.kv(), prefill, {}, q.data() + half * kLastQueries * width},
                     static_cast<uint32_t>(h));
        const std::vector<double>& of_keys = sums.tiles.back().mass;
        for (size_t j = 0; j < of_keys.size(); ++j) keys[j] += of_keys[j];
      }
      std::vector<double> blocks(KeyTilesOf(rows.hi), 0.0);
      for (size_t j = 0; j < keys.size(); ++j) blocks[j / kKeyTile] += keys[j];
      out[h].tiles += KeyTilesOf(FewestOf(&keys, mass * kRowTile));
      out[h].blocks += FewestOf(&blocks, mass * kRowTile);
    });
  }
  for (OracleShare& head : out) {
    head.tiles /= dense;
    head.blocks /= dense;
  }
  return out;
}

}  // namespace quarry::perf

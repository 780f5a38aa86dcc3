#include "gpu/cuda/attention_plan.h"

#include <algorithm>

#include "gpu/cuda/attention_args.h"

namespace quarry::cuda {
namespace {

constexpr uint32_t kStepsPerSplit = 4;  // 256 keys for a partial and its merge; not measured
constexpr uint32_t kBlocksPerMultiprocessor = 2;  // what shared memory allows at head_dim 128

// Key tiles that any row sees.
uint64_t KeyTiles(const DeviceAttention& a) {
  const TokenRange seen{a.Visible(0).lo, a.Visible(a.rows - 1).hi};
  uint64_t tiles = 0;
  for (const DeviceKv& part : a.parts) {
    tiles += (uint64_t{Intersect(part.tokens, seen).size()} + kAttentionKeys - 1) /
             kAttentionKeys;
  }
  return tiles;
}

}  // namespace

AttentionPlan PlanAttention(std::span<const DeviceAttention> attentions, uint32_t multiprocessors) {
  const DeviceAttention& first = attentions.front();
  AttentionPlan plan;
  const uint64_t queries = uint64_t{first.rows} * (first.heads / first.kv_heads);
  plan.row_tiles = queries > AttentionQueries(1) ? 2 : 1;
  const uint64_t per_tile = AttentionQueries(plan.row_tiles);
  plan.query_tiles = static_cast<uint32_t>((queries + per_tile - 1) / per_tile);
  uint64_t longest = 1, all = 0;  // key tiles
  for (const DeviceAttention& a : attentions) {
    const uint64_t tiles = std::max<uint64_t>(1, KeyTiles(a));
    longest = std::max(longest, tiles);
    all += tiles;
  }
  const uint64_t blocks = uint64_t{plan.query_tiles} * first.kv_heads;
  const uint64_t room = uint64_t{kBlocksPerMultiprocessor} * multiprocessors * longest / all;
  const uint64_t most = std::max<uint64_t>(1, longest / kStepsPerSplit);
  plan.splits = static_cast<uint32_t>(std::clamp<uint64_t>(room / blocks, 1, most));
  return plan;
}

}  // namespace quarry::cuda

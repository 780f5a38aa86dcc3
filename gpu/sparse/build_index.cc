#include "gpu/sparse/build_index.h"

#include <algorithm>
#include <limits>
#include <variant>

#include "gpu/sparse/choose_blocks.h"
#include "gpu/sparse/choose_lines.h"
#include "proto/check.h"

namespace quarry {
namespace {

// Everything of a head but its place among the others.
struct HeadPart {
  std::vector<uint32_t> tiles, columns_seen, block_counts, blocks;
};

HeadPart RangePart(const HeadPlan& plan, const SparseIndex& index, DenseFallback fallback) {
  HeadPart part;
  const TokenRange rows{index.first_token, index.first_token + index.rows};
  RowTileCounts counts = CountRowTiles(plan.ranges, plan.columns, rows);
  for (uint32_t t = 0; t < index.row_tiles(); ++t) {
    const uint32_t sparse = counts.Tiles(t);
    const uint32_t dense = index.DenseTiles(t);
    part.tiles.push_back(SparseIsCheaper(sparse, dense, fallback) ? sparse : dense);
  }
  part.columns_seen = std::move(counts.columns_seen);
  return part;
}

HeadPart BlockPart(const HeadPlan& plan, uint32_t head, const SparseIndex& index,
                   const IndexInputs& in, const BlockMeans& means) {
  HeadPart part;
  part.columns_seen.assign(index.row_tiles(), 0);
  BlockWeights weights(in, head, means, plan.pattern);
  for (uint32_t t = 0; t < index.row_tiles(); ++t) {
    const TokenRange rows = index.RowsOf(t);
    const std::vector<uint32_t> blocks = ChooseBlocks(plan.pattern, rows, weights.Of(rows));
    const auto sparse = static_cast<uint32_t>(blocks.size());
    const uint32_t dense = index.DenseTiles(t);
    const bool runs_sparse = BlocksAreCheaper(plan.pattern, sparse, dense, in.fallback);
    part.tiles.push_back(runs_sparse ? sparse : dense);
    part.block_counts.push_back(runs_sparse ? sparse : 0);
    if (runs_sparse) part.blocks.insert(part.blocks.end(), blocks.begin(), blocks.end());
  }
  return part;
}

// Whether ranges and columns cost less than dense attention.
bool IsWorthIt(const PlanInputs& in, const HeadPlan& plan, uint64_t choosing_eighths) {
  if (in.fallback == DenseFallback::kNever) return true;
  const HeadCost cost = CostOf(plan.ranges, plan.columns, in.prefill, in.fallback);
  return cost.eighths + choosing_eighths < 8 * cost.dense_tiles;
}

HeadPlan PlanByLines(const PlanInputs& in, uint32_t head, const LineScores& scores) {
  HeadPlan plan;
  plan.kind = HeadKind::kRanges;
  plan.pattern = in.patterns[head].pattern;
  if (const auto* p = std::get_if<VerticalSlashPattern>(&plan.pattern)) {
    ChooseLines(scores, *p, in.fallback, &plan);
  } else if (!ChooseLines(scores, std::get<VerticalSlashMassPattern>(plan.pattern), in.fallback,
                          &plan)) {
    return {};
  }
  return IsWorthIt(in, plan, ChoosingEighths(in.prefill.hi)) ? plan : HeadPlan{};
}

}  // namespace

bool NeedsLineScores(const Pattern& pattern) {
  return std::holds_alternative<VerticalSlashPattern>(pattern) ||
         std::holds_alternative<VerticalSlashMassPattern>(pattern);
}

HeadPlan PlanWithoutScores(const PlanInputs& in, uint32_t head) {
  const Pattern& pattern = in.patterns[head].pattern;
  HeadPlan plan;
  if (IsDense(pattern)) return plan;
  plan.pattern = pattern;
  const auto* const a = std::get_if<AShapePattern>(&pattern);
  if (a == nullptr) {
    plan.kind = HeadKind::kBlocks;
    return plan;
  }
  plan.kind = HeadKind::kRanges;
  const uint32_t sinks = std::min(a->sinks, in.prefill.hi);
  for (uint32_t c = 0; c < sinks; ++c) plan.columns.push_back(c);
  const uint32_t local = std::clamp(a->local, 1u, in.prefill.hi);
  const uint32_t keys = KeyTilesOf(local - 1 + kRowTile) * kKeyTile;
  plan.ranges = {{static_cast<int32_t>(kRowTile) - static_cast<int32_t>(keys), kRowTile}};
  return IsWorthIt(in, plan, 0) ? plan : HeadPlan{};
}

std::vector<HeadPlan> PlanHeads(const PlanInputs& inputs, ThreadTeam* team) {
  QUARRY_CHECK(inputs.patterns.size() == inputs.layer.heads && !inputs.prefill.empty() &&
               inputs.layer.kv.tokens.lo == 0 && inputs.layer.kv.tokens.hi >= inputs.prefill.hi);
  std::vector<HeadPlan> plans(inputs.layer.heads);
  team->For(plans.size(), [&](size_t i) {
    const auto head = static_cast<uint32_t>(i);
    if (!NeedsLineScores(inputs.patterns[head].pattern)) {
      plans[head] = PlanWithoutScores(inputs, head);
      return;
    }
    const LineScores scores(inputs.prefill, SumLines(inputs, head));
    plans[head] = PlanByLines(inputs, head, scores);
  });
  return plans;
}

SparseIndex BuildIndex(std::span<const HeadPlan> plans, const IndexInputs& in, ThreadTeam* team) {
  QUARRY_CHECK(plans.size() == in.layer.heads && in.rows > 0 &&
               in.layer.kv.tokens.hi >= in.first_token + in.rows);
  SparseIndex index;
  index.first_token = in.first_token;
  index.rows = in.rows;
  index.heads = in.layer.heads;
  std::vector<uint8_t> wanted(in.layer.kv_heads, 0);
  const uint32_t group = in.layer.heads / in.layer.kv_heads;
  for (uint32_t h = 0; h < index.heads; ++h) {
    wanted[h / group] |= plans[h].kind == HeadKind::kBlocks;
  }
  std::vector<BlockMeans> means(in.layer.kv_heads);
  team->For(means.size(), [&](size_t kv_head) {
    if (wanted[kv_head]) {
      means[kv_head] =
          BlockMeans(in.layer, static_cast<uint32_t>(kv_head) * group, in.first_token + in.rows);
    }
  });
  std::vector<HeadPart> parts(index.heads);
  team->For(parts.size(), [&](size_t i) {
    const auto h = static_cast<uint32_t>(i);
    const HeadPlan& plan = plans[h];
    if (plan.kind == HeadKind::kRanges) {
      parts[h] = RangePart(plan, index, in.fallback);
    } else if (plan.kind == HeadKind::kBlocks) {
      parts[h] = BlockPart(plan, h, index, in, means[h / group]);
    } else {
      for (uint32_t t = 0; t < index.row_tiles(); ++t) {
        parts[h].tiles.push_back(index.DenseTiles(t));
      }
      parts[h].columns_seen.assign(index.row_tiles(), 0);
    }
  });
  index.range_first.push_back(0);
  index.column_first.push_back(0);
  index.block_first.push_back(0);
  for (uint32_t h = 0; h < index.heads; ++h) {
    const HeadPart& part = parts[h];
    index.kind.push_back(plans[h].kind);
    index.ranges.insert(index.ranges.end(), plans[h].ranges.begin(), plans[h].ranges.end());
    index.columns.insert(index.columns.end(), plans[h].columns.begin(), plans[h].columns.end());
    index.blocks.insert(index.blocks.end(), part.blocks.begin(), part.blocks.end());
    index.tiles.insert(index.tiles.end(), part.tiles.begin(), part.tiles.end());
    index.columns_seen.insert(index.columns_seen.end(), part.columns_seen.begin(),
                              part.columns_seen.end());
    QUARRY_CHECK(index.blocks.size() <= std::numeric_limits<uint32_t>::max());
    index.range_first.push_back(static_cast<uint32_t>(index.ranges.size()));
    index.column_first.push_back(static_cast<uint32_t>(index.columns.size()));
    for (uint32_t t = 0; t < index.row_tiles(); ++t) {
      const uint32_t count = part.block_counts.empty() ? 0 : part.block_counts[t];
      index.block_first.push_back(index.block_first.back() + count);
    }
  }
  return index;
}

}  // namespace quarry

#include "gpu/cuda/key_blocks.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <variant>

#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

// Heads of block patterns whose blocks one launch can choose.
bool ChosenTogether(const HeadPlan& a, const HeadPlan& b) {
  if (a.kind != b.kind || a.pattern.index() != b.pattern.index()) return false;
  const auto* const scored = std::get_if<BlockScoredPattern>(&a.pattern);
  return scored == nullptr || *scored == std::get<BlockScoredPattern>(b.pattern);
}

}  // namespace

absl::StatusOr<DeviceBuffer> KeyBlocks::Choose(const DevicePlan& plan, const DeviceAttention& a,
                                               uint32_t* tiles) {
  const std::span<const HeadPlan> heads = plan.heads();
  const auto count = static_cast<size_t>(std::count_if(
      heads.begin(), heads.end(), [](const HeadPlan& h) { return h.kind == HeadKind::kBlocks; }));
  if (count == 0) return DeviceBuffer();
  const uint32_t row_tiles = RowTilesOf(a.rows), end = a.first_token + a.rows;
  const uint32_t whole = end / kKeyTile, keys = whole + row_tiles;
  const std::byte* const k = static_cast<const std::byte*>(a.parts[0].k);
  ChoiceArgs choice = {};
  choice.block_stride = KeyTilesOf(end);
  choice.block_head_stride = size_t{row_tiles} * choice.block_stride;
  // What lies one behind may be read.
  QUARRY_ASSIGN_OR_RETURN(
      DeviceBuffer blocks,
      device_.Allocate((count * choice.block_head_stride + 1) * sizeof(uint32_t), "key blocks"));
  const size_t row_bytes = size_t{a.head_dim} * DTypeBytes(a.dtype);
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer means,
                          device_.Allocate(a.kv_heads * keys * row_bytes, "means of key blocks"));
  QUARRY_ASSIGN_OR_RETURN(
      const DeviceBuffer pooled,
      device_.Allocate(size_t{2} * row_tiles * a.heads * a.head_dim * 4, "means of queries"));
  QUARRY_RETURN_IF_ERROR(kernels_.MeanKeys({k, a.parts[0].head_stride, means.raw(), a.kv_heads,
                                            a.head_dim, whole, a.first_token, a.rows, a.dtype}));
  QUARRY_RETURN_IF_ERROR(kernels_.PoolQueries({a.q, pooled.floats(), a.heads, a.head_dim, a.rows}));
  const float scale_log2 = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(a.head_dim));
  SeekArgs seek = {};
  seek.q = a.q;
  seek.means = means.raw();
  seek.head_stride = keys * row_bytes;
  seek.heads = a.heads;
  seek.group = a.heads / a.kv_heads;
  seek.head_dim = a.head_dim;
  seek.first_token = a.first_token;
  seek.rows = a.rows;
  seek.whole_blocks = whole;
  seek.scale_log2 = scale_log2;
  seek.dtype = a.dtype;
  seek.block_head_stride = choice.block_head_stride;
  seek.block_stride = choice.block_stride;
  ScoreArgs score = {};
  score.q = pooled.floats();
  score.k = seek.means;
  score.head_stride = seek.head_stride;
  score.heads = seek.heads;
  score.group = seek.group;
  score.head_dim = seek.head_dim;
  score.queries = 2 * row_tiles;
  score.keys = keys;
  score.width = (keys + 3) / 4 * 4;
  score.scale_log2 = scale_log2;
  score.dtype = a.dtype;
  const size_t of_head = size_t{score.queries} * (score.width + 2);  // with stats
  const size_t at_a_time = std::clamp<size_t>(most_floats_ / of_head, 1, count);
  QUARRY_ASSIGN_OR_RETURN(
      const DeviceBuffer scores,
      device_.Allocate(at_a_time * of_head * sizeof(float), "scores of key blocks"));
  score.out = scores.floats();
  choice.queries = score.queries;
  choice.width = score.width;
  choice.first_token = a.first_token;
  choice.rows = a.rows;
  choice.whole_blocks = whole;
  choice.wanted = plan.arrays().blocks;
  choice.tiles = tiles;
  choice.blocks = reinterpret_cast<uint32_t*>(blocks.raw());
  for (uint32_t h = 0; h < heads.size();) {
    if (heads[h].kind != HeadKind::kBlocks) {
      ++h;
      continue;
    }
    const auto* const scored = std::get_if<BlockScoredPattern>(&heads[h].pattern);
    uint32_t together = 1;
    while (h + together < heads.size() && (scored != nullptr || together < at_a_time) &&
           ChosenTogether(heads[h], heads[h + together])) {
      ++together;
    }
    choice.first_head = score.first_head = seek.first_head = h;
    choice.launched_heads = score.launched_heads = seek.launched_heads = together;
    if (scored != nullptr) {
      seek.below_log2 = static_cast<float>(std::log2(scored->threshold));
      seek.blocks = choice.blocks;
      choice.scores = nullptr;
      QUARRY_RETURN_IF_ERROR(kernels_.SeekBlocks(seek));
    } else {
      choice.scores = score.out;
      choice.stats = score.out + size_t{together} * score.queries * score.width;
      QUARRY_RETURN_IF_ERROR(kernels_.Score(score));
      QUARRY_RETURN_IF_ERROR(kernels_.Measure(choice));
    }
    QUARRY_RETURN_IF_ERROR(kernels_.ChooseBlocks(choice));
    choice.blocks += together * choice.block_head_stride;
    h += together;
  }
  return blocks;
}

}  // namespace quarry::cuda

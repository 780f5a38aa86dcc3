#include "gpu/cuda/sparse_prefill.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gpu/cuda/pieces.h"
#include "gpu/sparse/choose_blocks.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

LayerKv LayerOf(const DeviceAttention& a) {
  QUARRY_CHECK(a.parts.size() == 1 && a.window == 0 && a.parts[0].tokens.lo == 0);
  return {a.parts[0], a.dtype, a.heads, a.kv_heads, a.head_dim};
}

const std::byte* Bytes(const void* data) { return static_cast<const std::byte*>(data); }

bool Aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Eighths of dense tiles that a head may save before it is known what it attends.
uint64_t MostSaved(const Pattern& pattern, TokenRange prefill) {
  if (IsDense(pattern)) return 0;
  const auto* const pooled = std::get_if<BlockSparsePattern>(&pattern);
  uint64_t saved = 0;
  for (uint32_t lo = prefill.lo; lo < prefill.hi; lo += std::min(kRowTile, prefill.hi - lo)) {
    const uint32_t dense = KeyTilesOf(std::min(lo + kRowTile, prefill.hi));
    const uint64_t cost = BlockEighths(pattern, pooled != nullptr ? pooled->blocks : 0, dense);
    saved += 8 * uint64_t{dense} - std::min(cost, 8 * uint64_t{dense});
  }
  return saved;
}
// Of a head that attends ranges and columns.
uint64_t Saved(const HeadPlan& plan, TokenRange prefill) {
  const HeadCost cost = CostOf(plan.ranges, plan.columns, prefill, DenseFallback::kWhereCheaper);
  return 8 * cost.dense_tiles - cost.eighths;
}

}  // namespace

SparsePrefill::SparsePrefill(Device* device, SparseKernels* kernels, const Options& options)
    : options_(options),
      device_(*device),
      kernels_(*kernels),
      lines_(device, kernels, options.most_line_bytes),
      blocks_(device, kernels, options.most_floats) {}

absl::Status SparsePrefill::Check(const DeviceAttention& a) const {
  const std::string here = absl::StrCat("sparse prefill on ", std::string(device_.name()));
  if (a.dtype == DType::kFp32 || (a.head_dim != 64 && a.head_dim != 96 && a.head_dim != 128)) {
    return absl::UnimplementedError(
        absl::StrCat(here, " takes bf16 and fp16 heads of 64, 96 and 128, not ",
                     std::string(DTypeName(a.dtype)), " heads of ", a.head_dim));
  }
  const DeviceKv& kv = a.parts[0];
  if (!Aligned(a.q) || !Aligned(a.o) || !Aligned(kv.k) || !Aligned(kv.v) ||
      kv.head_stride % 16 != 0) {
    return absl::UnimplementedError(absl::StrCat(
        here, " takes q, o, k, v and strides of heads at multiples of 16 bytes; a stride is ",
        kv.head_stride));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<DevicePlan>> SparsePrefill::Plan(
    std::span<const HeadPattern> patterns, TokenRange prefill, const DeviceAttention& last) {
  const PlanInputs inputs{LayerOf(last), prefill, patterns};
  QUARRY_RETURN_IF_ERROR(Check(last));
  const auto dense = [&] { return DevicePlan::Dense(&device_, patterns.size()); };
  const uint64_t least = 8 * options_.least_saved_tiles;
  uint64_t saved = 0;
  std::vector<uint32_t> by_lines;
  for (uint32_t head = 0; head < patterns.size(); ++head) {
    saved += MostSaved(patterns[head].pattern, prefill);
    if (NeedsLineScores(patterns[head].pattern)) by_lines.push_back(head);
  }
  if (saved < least) return dense();

  saved = 0;
  std::vector<HeadPlan> heads(patterns.size());
  std::vector<DevicePlan::Sizes> sizes(patterns.size());
  for (uint32_t head = 0; head < patterns.size(); ++head) {
    if (NeedsLineScores(patterns[head].pattern)) continue;
    HeadPlan& plan = heads[head] = PlanWithoutScores(inputs, head);
    sizes[head] = {static_cast<uint32_t>(plan.ranges.size()),
                   static_cast<uint32_t>(plan.columns.size())};
    saved +=
        plan.kind == HeadKind::kRanges ? Saved(plan, prefill) : MostSaved(plan.pattern, prefill);
  }
  LinePlanner::Kept kept;
  if (!by_lines.empty()) {
    QUARRY_ASSIGN_OR_RETURN(kept, lines_.Choose(inputs, by_lines, last));
  }
  for (size_t i = 0; i < kept.lines.size(); ++i) {
    const LineTry& line = kept.results[i];
    const uint32_t head = kept.lines[i].head;
    if (head == kNoHead || line.is_complete == 0) continue;
    heads[head].kind = HeadKind::kRanges;
    heads[head].pattern = patterns[head].pattern;
    heads[head].captured = static_cast<double>(line.captured) / line.mass;
    sizes[head] = {line.ranges, line.columns};
    saved += 8 * line.dense_tiles - line.eighths;
  }
  if (saved < least) return dense();
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<DevicePlan> plan,
                          DevicePlan::Make(&device_, std::move(heads), sizes));
  if (!by_lines.empty()) QUARRY_RETURN_IF_ERROR(lines_.Emit(kept, plan->arrays()));
  return plan;
}

absl::Status SparsePrefill::Attend(const DevicePlan& plan, const DeviceAttention& a) {
  LayerOf(a);
  QUARRY_RETURN_IF_ERROR(Check(a));
  const std::span<const HeadPlan> heads = plan.heads();
  QUARRY_CHECK(heads.size() == a.heads);
  const auto by_blocks = static_cast<size_t>(std::count_if(
      heads.begin(), heads.end(), [](const HeadPlan& h) { return h.kind == HeadKind::kBlocks; }));
  uint32_t step = a.rows;
  if (by_blocks > 0) {
    const size_t fit = options_.most_floats / (by_blocks * KeyTilesOf(a.first_token + a.rows));
    step = kRowTile * static_cast<uint32_t>(std::clamp<size_t>(fit, 1, options_.most_row_tiles));
  }
  const size_t width = size_t{a.heads} * a.head_dim;
  for (uint32_t row = 0; row < a.rows; row += std::min(step, a.rows - row)) {
    DeviceAttention part = a;
    part.first_token += row;
    part.rows = std::min(step, a.rows - row);
    part.q += row * width;
    part.o += row * width;
    part.lse += size_t{row} * a.heads;
    QUARRY_RETURN_IF_ERROR(AttendRows(plan, part));
  }
  return absl::OkStatus();
}

absl::Status SparsePrefill::AttendRows(const DevicePlan& plan, const DeviceAttention& a) {
  IndexArgs index = {};
  index.plan = plan.arrays();
  index.heads = a.heads;
  index.first_token = a.first_token;
  index.rows = a.rows;
  index.row_tiles = RowTilesOf(a.rows);
  index.block_stride = KeyTilesOf(a.first_token + a.rows);
  const size_t items = size_t{a.heads} * index.row_tiles;
  const size_t column_bytes = size_t{plan.columns()} * a.head_dim * DTypeBytes(a.dtype);
  Pieces pieces;
  const size_t tiles = pieces.Add<uint32_t>(items), columns_seen = pieces.Add<uint32_t>(items);
  const size_t block_first = pieces.Add<uint32_t>(items), order = pieces.Add<uint32_t>(items);
  const size_t column_k = pieces.Add<std::byte>(column_bytes);
  const size_t column_v = pieces.Add<std::byte>(column_bytes);
  const size_t masks = pieces.Add<uint64_t>(size_t{plan.column_tiles()} * index.row_tiles);
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer memory,
                          device_.Allocate(pieces.bytes(), "index of a sparse prefill"));
  std::byte* const at = memory.raw();
  index.tiles = At<uint32_t>(at, tiles);
  index.columns_seen = At<uint32_t>(at, columns_seen);
  index.block_first = At<uint32_t>(at, block_first);
  index.order = At<uint32_t>(at, order);
  QUARRY_RETURN_IF_ERROR(kernels_.CountRowTiles(index));
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer blocks, blocks_.Choose(plan, a, index.tiles));
  QUARRY_RETURN_IF_ERROR(kernels_.OrderItems(index));

  SparseArgs args = {};
  args.q = a.q;
  args.o = a.o;
  args.lse = a.lse;
  args.k = Bytes(a.parts[0].k);
  args.v = Bytes(a.parts[0].v);
  args.head_stride = a.parts[0].head_stride;
  args.heads = a.heads;
  args.group = a.heads / a.kv_heads;
  args.head_dim = a.head_dim;
  args.rows = a.rows;
  args.first_token = a.first_token;
  args.row_tiles = index.row_tiles;
  args.scale_log2 = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(a.head_dim));
  args.dtype = a.dtype;
  args.kind = index.plan.kind;
  args.range_first = index.plan.range_first;
  args.ranges = index.plan.ranges;
  args.column_first = index.plan.column_first;
  args.columns = index.plan.columns;
  args.block_first = index.block_first;
  args.blocks = reinterpret_cast<const uint32_t*>(blocks.raw());
  args.tiles = index.tiles;
  args.columns_seen = index.columns_seen;
  args.order = index.order;
  args.mask_first = index.plan.mask_first;
  args.column_count = plan.columns();
  if (plan.columns() > 0) {
    args.column_k = at + column_k;
    args.column_v = at + column_v;
    args.column_masks = At<uint64_t>(at, masks);
  }
  return kernels_.Attend(args);
}

}  // namespace quarry::cuda

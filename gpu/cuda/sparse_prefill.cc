#include "gpu/cuda/sparse_prefill.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <thread>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "gpu/cuda/packed_index.h"
#include "gpu/sparse/choose_blocks.h"
#include "gpu/sparse/choose_lines.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

float ScaleLog2(uint32_t head_dim) {
  return std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(head_dim));
}

LayerKv LayerOf(const DeviceAttention& a) {
  QUARRY_CHECK(a.parts.size() == 1 && a.window == 0 && a.parts[0].tokens.lo == 0);
  return {a.parts[0], a.dtype, a.heads, a.kv_heads, a.head_dim};
}

const std::byte* Bytes(const void* data) { return static_cast<const std::byte*>(data); }

bool Aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

ScoreArgs ScoresOf(const DeviceAttention& a) {
  ScoreArgs args = {};
  args.q = a.q;
  args.heads = a.heads;
  args.group = a.heads / a.kv_heads;
  args.head_dim = a.head_dim;
  args.scale_log2 = ScaleLog2(a.head_dim);
  args.dtype = a.dtype;
  return args;
}

// One head's sums as a device has them: [3][tokens].
LineSums SumsOf(TokenRange prefill, std::span<const float> sums) {
  const size_t tokens = prefill.hi;
  const auto wide = [&](size_t i) {
    const std::span<const float> part = sums.subspan(i * tokens, tokens);
    return std::vector<double>(part.begin(), part.end());
  };
  LineSums out;
  for (const TokenRange& rows : LastRowTiles(prefill)) {
    out.tiles.push_back({rows, wide(out.tiles.size())});
  }
  out.slashes = wide(2);
  return out;
}

// Heads of block patterns whose weights one launch can find.
bool SameBlocks(const HeadPlan& a, const HeadPlan& b) {
  if (a.kind != b.kind || a.pattern.index() != b.pattern.index()) return false;
  const auto* const scored = std::get_if<BlockScoredPattern>(&a.pattern);
  return scored == nullptr || *scored == std::get<BlockScoredPattern>(b.pattern);
}

}  // namespace

// Weights of key blocks: [head][row tile][blocks], of heads of block patterns.
struct SparsePrefill::Weights {
  uint32_t row_tiles = 0, blocks = 0;
  std::vector<uint32_t> place;  // [heads], among those
  std::span<const float> values;

  size_t head_stride() const { return size_t{row_tiles} * blocks; }
  std::vector<double> Of(uint32_t head, uint32_t row_tile, uint32_t count) const {
    const float* const from = &values[place[head] * head_stride() + size_t{row_tile} * blocks];
    return {from, from + count};
  }
};

SparsePrefill::SparsePrefill(Device* device, SparseKernels* kernels, const Options& options)
    : options_(options),
      device_(*device),
      kernels_(*kernels),
      team_(options.threads != 0 ? options.threads
                                 : std::max(1u, std::thread::hardware_concurrency())) {}

size_t SparsePrefill::ThatFit(size_t each) const {
  return std::max<size_t>(1, options_.most_floats / each);
}

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

absl::StatusOr<std::vector<HeadPlan>> SparsePrefill::Plan(std::span<const HeadPattern> patterns,
                                                          TokenRange prefill,
                                                          const DeviceAttention& last) {
  const PlanInputs inputs{LayerOf(last), prefill, patterns};
  QUARRY_RETURN_IF_ERROR(Check(last));
  std::vector<HeadPlan> plans(patterns.size());
  std::vector<uint32_t> by_lines;
  for (uint32_t head = 0; head < patterns.size(); ++head) {
    if (NeedsLineScores(patterns[head].pattern)) {
      by_lines.push_back(head);
    } else {
      plans[head] = PlanHead(inputs, head, nullptr);
    }
  }
  if (!by_lines.empty()) QUARRY_RETURN_IF_ERROR(PlanLines(inputs, by_lines, last, &plans));
  return plans;
}

absl::Status SparsePrefill::PlanLines(const PlanInputs& inputs, std::span<const uint32_t> heads,
                                      const DeviceAttention& last, std::vector<HeadPlan>* plans) {
  const uint32_t tokens = inputs.prefill.hi;
  ScoreArgs score = ScoresOf(last);
  score.k = Bytes(last.parts[0].k);
  score.head_stride = last.parts[0].head_stride;
  score.queries = last.rows;
  score.keys = tokens;
  score.width = (tokens + 3) / 4 * 4;
  const size_t scores_per_head = size_t{score.queries} * score.width;
  const size_t sums_per_head = size_t{3} * tokens;
  const size_t at_a_time = std::min(heads.size(), ThatFit(scores_per_head));
  const size_t in_group = std::min(heads.size(), ThatFit(sums_per_head));
  QUARRY_ASSIGN_OR_RETURN(
      const DeviceBuffer scores,
      device_.Allocate(at_a_time * (scores_per_head + 2 * score.queries) * sizeof(float),
                       "scores of the last queries"));
  QUARRY_ASSIGN_OR_RETURN(
      const DeviceBuffer sums,
      device_.Allocate(in_group * sums_per_head * sizeof(float), "sums of the last queries"));
  score.out = scores.floats();
  ChoiceArgs choice = {};
  choice.of = ScoredQueries::kLast;
  choice.scores = score.out;
  choice.stats = score.out + at_a_time * scores_per_head;
  choice.queries = score.queries;
  choice.width = score.width;
  choice.first_token = tokens - score.queries;
  choice.split = std::min(LastRowTiles(inputs.prefill)[0].hi - choice.first_token, choice.queries);
  host_.resize(std::max(host_.size(), in_group * sums_per_head));
  for (size_t begin = 0; begin < heads.size(); begin += in_group) {
    const std::span<const uint32_t> group =
        heads.subspan(begin, std::min(in_group, heads.size() - begin));
    for (size_t i = 0; i < group.size(); i += score.launched_heads) {
      // As many heads behind one another as fit.
      score.first_head = group[i];
      score.launched_heads = 1;
      while (score.launched_heads < at_a_time && i + score.launched_heads < group.size() &&
             group[i + score.launched_heads] == group[i] + score.launched_heads) {
        ++score.launched_heads;
      }
      choice.launched_heads = score.launched_heads;
      choice.out = sums.floats() + i * sums_per_head;
      QUARRY_RETURN_IF_ERROR(kernels_.Score(score));
      QUARRY_RETURN_IF_ERROR(kernels_.Measure(choice));
      QUARRY_RETURN_IF_ERROR(kernels_.SumLastQueries(choice));
    }
    const std::span<float> got = std::span(host_).first(group.size() * sums_per_head);
    QUARRY_RETURN_IF_ERROR(device_.Download(std::as_writable_bytes(got), sums.raw()));
    team_.For(group.size(), [&](size_t i) {
      const LineScores of_head(
          inputs.prefill, SumsOf(inputs.prefill, got.subspan(i * sums_per_head, sums_per_head)));
      (*plans)[group[i]] = PlanHead(inputs, group[i], &of_head);
    });
  }
  return absl::OkStatus();
}

absl::Status SparsePrefill::Attend(std::span<const HeadPlan> plans, const DeviceAttention& a) {
  LayerOf(a);
  QUARRY_RETURN_IF_ERROR(Check(a));
  const auto by_blocks = static_cast<size_t>(std::count_if(
      plans.begin(), plans.end(), [](const HeadPlan& p) { return p.kind == HeadKind::kBlocks; }));
  uint32_t step = a.rows;
  if (by_blocks > 0) {
    const size_t fit = ThatFit(by_blocks * KeyTilesOf(a.first_token + a.rows));
    step = kRowTile * static_cast<uint32_t>(std::min<size_t>(fit, options_.most_row_tiles));
  }
  const size_t width = size_t{a.heads} * a.head_dim;
  for (uint32_t row = 0; row < a.rows; row += std::min(step, a.rows - row)) {
    DeviceAttention part = a;
    part.first_token += row;
    part.rows = std::min(step, a.rows - row);
    part.q += row * width;
    part.o += row * width;
    part.lse += size_t{row} * a.heads;
    QUARRY_RETURN_IF_ERROR(AttendRows(plans, part));
  }
  return absl::OkStatus();
}

absl::Status SparsePrefill::AttendRows(std::span<const HeadPlan> plans, const DeviceAttention& a) {
  IndexInputs inputs{LayerOf(a), a.first_token, a.rows};
  QUARRY_ASSIGN_OR_RETURN(const Weights weights, WeighBlocks(plans, a));
  inputs.block_weights = [&](uint32_t head, uint32_t t) {
    const uint32_t end = a.first_token + std::min((t + 1) * kRowTile, a.rows);
    return weights.Of(head, t, KeyTilesOf(end));
  };
  return Run(BuildIndex(plans, inputs, &team_), a);
}

absl::StatusOr<SparsePrefill::Weights> SparsePrefill::WeighBlocks(std::span<const HeadPlan> plans,
                                                                  const DeviceAttention& a) {
  Weights out;
  out.row_tiles = RowTilesOf(a.rows);
  out.blocks = KeyTilesOf(a.first_token + a.rows);
  uint32_t heads = 0;
  for (const HeadPlan& plan : plans) {
    out.place.push_back(heads);
    heads += plan.kind == HeadKind::kBlocks;
  }
  if (heads == 0) return out;
  const size_t floats = heads * out.head_stride();
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer weights,
                          device_.Allocate(floats * sizeof(float), "weights of key blocks"));
  const uint32_t whole = (a.first_token + a.rows) / kKeyTile, keys = whole + out.row_tiles;
  const size_t row_bytes = size_t{a.head_dim} * DTypeBytes(a.dtype);
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer means,
                          device_.Allocate(a.kv_heads * keys * row_bytes, "means of key blocks"));
  QUARRY_ASSIGN_OR_RETURN(
      const DeviceBuffer pooled,
      device_.Allocate(size_t{2} * out.row_tiles * a.heads * a.head_dim * 4, "means of queries"));
  QUARRY_RETURN_IF_ERROR(
      kernels_.MeanKeys({Bytes(a.parts[0].k), a.parts[0].head_stride, means.raw(), a.kv_heads,
                         a.head_dim, whole, a.first_token, a.rows, a.dtype}));
  QUARRY_RETURN_IF_ERROR(kernels_.PoolQueries({a.q, pooled.floats(), a.heads, a.head_dim, a.rows}));
  ScoreArgs score = ScoresOf(a);
  score.k = means.raw();
  score.head_stride = keys * row_bytes;
  score.keys = keys;
  score.width = (keys + 3) / 4 * 4;
  const size_t least = size_t{std::max(kRowTile, 2 * out.row_tiles)} * (score.width + 2);
  const size_t most = size_t{heads} * out.row_tiles * kRowTile * (score.width + 2);
  const size_t room = std::max(least, std::min(most, options_.most_floats));
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer scores,
                          device_.Allocate(room * sizeof(float), "scores of key blocks"));
  score.out = scores.floats();
  for (uint32_t h = 0; h < plans.size(); h += score.launched_heads) {
    score.first_head = h;
    score.launched_heads = 1;
    if (plans[h].kind != HeadKind::kBlocks) continue;
    const bool pools = std::holds_alternative<BlockSparsePattern>(plans[h].pattern);
    const size_t of_head = size_t{pools ? 2 : kRowTile} * out.row_tiles * (score.width + 2);
    while ((score.launched_heads + 1) * of_head <= room &&
           h + score.launched_heads < plans.size() &&
           SameBlocks(plans[h], plans[h + score.launched_heads])) {
      ++score.launched_heads;
    }
    // Of all rows as many row tiles as fit; of their means all do.
    const size_t of_tile = size_t{kRowTile} * (score.width + 2);
    const uint32_t step =
        pools ? out.row_tiles
              : static_cast<uint32_t>(std::min<size_t>(out.row_tiles, room / of_tile));
    score.q = pools ? pooled.floats() : a.q;
    QUARRY_RETURN_IF_ERROR(WeighHeads(plans[h].pattern, a, step, score, out,
                                      weights.floats() + out.place[h] * out.head_stride()));
  }
  host_.resize(std::max(host_.size(), floats));
  const std::span<float> values = std::span(host_).first(floats);
  QUARRY_RETURN_IF_ERROR(device_.Download(std::as_writable_bytes(values), weights.raw()));
  out.values = values;
  return out;
}

absl::Status SparsePrefill::WeighHeads(const Pattern& pattern, const DeviceAttention& a,
                                       uint32_t step, ScoreArgs score, const Weights& shape,
                                       float* out) {
  const auto* const scored = std::get_if<BlockScoredPattern>(&pattern);
  ChoiceArgs choice = {};
  choice.of = scored != nullptr ? ScoredQueries::kRows : ScoredQueries::kPooled;
  choice.below_log2 = scored != nullptr ? static_cast<float>(std::log2(scored->threshold)) : 0;
  choice.scores = score.out;
  choice.width = score.width;
  choice.launched_heads = score.launched_heads;
  choice.out_stride = shape.blocks;
  choice.out_head_stride = shape.head_stride();
  for (uint32_t t = 0; t < shape.row_tiles; t += step) {
    const uint32_t rows = std::min(step * kRowTile, a.rows - t * kRowTile);
    score.queries = scored != nullptr ? rows : 2 * RowTilesOf(rows);
    choice.queries = score.queries;
    choice.stats = score.out + size_t{score.launched_heads} * score.queries * score.width;
    choice.first_token = a.first_token + t * kRowTile;
    choice.end_token = choice.first_token + rows;
    choice.cut_first = score.keys - shape.row_tiles + t;
    choice.out = out + size_t{t} * shape.blocks;
    QUARRY_RETURN_IF_ERROR(kernels_.Score(score));
    QUARRY_RETURN_IF_ERROR(kernels_.Measure(choice));
    QUARRY_RETURN_IF_ERROR(kernels_.WeighBlocks(choice));
    score.q += size_t{step} * kRowTile * a.heads * a.head_dim;  // of all rows; means are done
  }
  return absl::OkStatus();
}

absl::Status SparsePrefill::Run(const SparseIndex& index, const DeviceAttention& a) {
  const PackedIndex packed(index);
  const size_t column_bytes = packed.columns() * a.head_dim * DTypeBytes(a.dtype);
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer at,
                          device_.Allocate(packed.bytes().size(), "index of a sparse prefill"));
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer columns,
                          device_.Allocate(2 * column_bytes + packed.masks() * sizeof(uint64_t),
                                           "columns of a sparse prefill"));
  QUARRY_RETURN_IF_ERROR(device_.Upload(at.raw(), packed.bytes()));
  SparseArgs args = {};
  packed.Describe(at.raw(), &args);
  args.q = a.q;
  args.o = a.o;
  args.lse = a.lse;
  args.k = Bytes(a.parts[0].k);
  args.v = Bytes(a.parts[0].v);
  args.head_stride = a.parts[0].head_stride;
  args.group = a.heads / a.kv_heads;
  args.head_dim = a.head_dim;
  args.scale_log2 = ScaleLog2(a.head_dim);
  args.dtype = a.dtype;
  if (packed.columns() > 0) {
    args.column_k = columns.raw();
    args.column_v = columns.raw() + column_bytes;
    args.column_masks = reinterpret_cast<uint64_t*>(columns.raw() + 2 * column_bytes);
  }
  return kernels_.Attend(args);
}

}  // namespace quarry::cuda

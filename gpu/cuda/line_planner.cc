#include "gpu/cuda/line_planner.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>
#include <variant>

#include "gpu/cuda/pieces.h"
#include "gpu/sparse/choose_lines.h"
#include "proto/status_macros.h"

namespace quarry::cuda {

// What is needed for some lines at a time.
struct LinePlanner::Tried {
  Tried(uint32_t lines, uint32_t tries, uint32_t tokens) {
    const size_t all = size_t{lines} * tries, most = MostRanges(tokens);
    width = (tokens + 31) / 32 * 32;
    parts = pieces.Add<float>(size_t{lines} * StretchesOf(tokens) * kLastQueries * 2);
    shifts = pieces.Add<float>(size_t{lines} * kLastQueries);
    sums = pieces.Add<float>(size_t{lines} * 3 * width);
    results = pieces.Add<LineTry>(all);
    ranges = pieces.Add<RelativeRange>(all * most);
    range_tiles = pieces.Add<uint32_t>(all * (most + 1));
    bits = pieces.Add<uint32_t>(all * kTryBits * WordsOf(tokens));
    breaks = pieces.Add<LineBreak>(all * most);
  }

  Pieces pieces;
  uint32_t width;
  size_t parts, shifts, sums, results, ranges, range_tiles, bits, breaks;
};

std::vector<Line> LinePlanner::LinesOf(const PlanInputs& inputs, std::span<const uint32_t> heads,
                                       uint32_t group) {
  std::vector<Line> lines;
  for (const uint32_t head : heads) {
    // A line alone is followed by none.
    if (lines.size() % 2 == 1 && lines.back().head / group != head / group) {
      lines.push_back({kNoHead, 0, 0, 0, 0});
    }
    const Pattern& pattern = inputs.patterns[head].pattern;
    if (const auto* p = std::get_if<VerticalSlashPattern>(&pattern)) {
      lines.push_back({head, p->columns, p->slashes, 0, 0});
    } else {
      const auto& by_mass = std::get<VerticalSlashMassPattern>(pattern);
      lines.push_back({head, 0, 0, by_mass.mass, by_mass.max_tiles_share});
    }
  }
  if (lines.size() % 2 == 1) lines.push_back({kNoHead, 0, 0, 0, 0});
  return lines;
}

absl::StatusOr<LinePlanner::Kept> LinePlanner::Keep(std::vector<Line> lines, uint32_t tokens) {
  Kept kept;
  kept.tokens = tokens;
  const size_t count = lines.size(), most = MostRanges(tokens), words = WordsOf(tokens);
  Pieces pieces;
  const size_t lines_at = pieces.Add<Line>(count), results = pieces.Add<LineTry>(count);
  const size_t ranges = pieces.Add<RelativeRange>(count * most);
  const size_t range_tiles = pieces.Add<uint32_t>(count * (most + 1));
  const size_t columns = pieces.Add<uint32_t>(count * words);
  const size_t columns_before = pieces.Add<uint32_t>(count * words);
  QUARRY_ASSIGN_OR_RETURN(kept.memory,
                          device_.Allocate(pieces.bytes(), "chosen columns and slashes"));
  std::byte* const at = kept.memory.raw();
  QUARRY_RETURN_IF_ERROR(device_.Upload(at + lines_at, std::as_bytes(std::span(lines))));
  kept.lines = std::move(lines);
  kept.lines_at = At<Line>(at, lines_at);
  kept.lists = {At<LineTry>(at, results), At<RelativeRange>(at, ranges),
                At<uint32_t>(at, range_tiles), At<uint32_t>(at, columns),
                At<uint32_t>(at, columns_before)};
  return kept;
}

absl::StatusOr<LinePlanner::Kept> LinePlanner::Choose(const PlanInputs& inputs,
                                                      std::span<const uint32_t> heads,
                                                      const DeviceAttention& last) {
  const uint32_t tokens = inputs.prefill.hi;
  const uint32_t group = last.heads / last.kv_heads;
  QUARRY_ASSIGN_OR_RETURN(Kept kept, Keep(LinesOf(inputs, heads, group), tokens));
  const auto count = static_cast<uint32_t>(kept.lines.size());
  const bool by_mass = std::any_of(kept.lines.begin(), kept.lines.end(),
                                   [](const Line& line) { return line.mass > 0; });
  const uint32_t tries = by_mass ? SlashTries(tokens) : 1;
  const size_t fit = most_bytes_ / Tried(2, tries, tokens).pieces.bytes();
  const uint32_t step = 2 * static_cast<uint32_t>(std::clamp<size_t>(fit, 1, count / 2));
  const Tried tried(step, tries, tokens);
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer memory,
                          device_.Allocate(tried.pieces.bytes(), "choice of columns and slashes"));
  std::byte* const at = memory.raw();

  LastQueryArgs sums = {};
  sums.q = last.q;
  sums.k = static_cast<const std::byte*>(last.parts[0].k);
  sums.head_stride = last.parts[0].head_stride;
  sums.heads = last.heads;
  sums.group = group;
  sums.head_dim = last.head_dim;
  sums.queries = last.rows;
  sums.tokens = tokens;
  sums.scale_log2 = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(last.head_dim));
  sums.dtype = last.dtype;
  sums.parts = At<float>(at, tried.parts);
  sums.shifts = At<float>(at, tried.shifts);
  sums.sums = At<float>(at, tried.sums);
  sums.width = tried.width;
  KeepLinesArgs choice = {};
  const std::vector<TokenRange> tiles = LastRowTiles(inputs.prefill);
  std::copy(tiles.begin(), tiles.end(), choice.tried.last_tiles);
  sums.split = std::min(tiles[0].hi - (tokens - last.rows), last.rows);
  choice.tried.sums = sums.sums;
  choice.tried.width = tried.width;
  choice.tried.tokens = tokens;
  choice.tried.prefill = inputs.prefill;
  choice.tried.tries = tries;
  choice.tried.results = At<LineTry>(at, tried.results);
  choice.tried.ranges = At<RelativeRange>(at, tried.ranges);
  choice.tried.range_tiles = At<uint32_t>(at, tried.range_tiles);
  choice.tried.bits = At<uint32_t>(at, tried.bits);
  choice.tried.breaks = At<LineBreak>(at, tried.breaks);
  choice.choosing_eighths = ChoosingEighths(tokens);
  for (uint32_t first = 0; first < count; first += step) {
    sums.lines = kept.lines_at + first;
    sums.line_count = std::min(step, count - first);
    choice.tried.lines = sums.lines;
    choice.tried.line_count = sums.line_count;
    const size_t most = MostRanges(tokens), words = WordsOf(tokens);
    choice.kept = {kept.lists.results + first, kept.lists.ranges + first * most,
                   kept.lists.range_tiles + first * (most + 1), kept.lists.columns + first * words,
                   kept.lists.columns_before + first * words};
    QUARRY_RETURN_IF_ERROR(kernels_.SumLastQueries(sums));
    QUARRY_RETURN_IF_ERROR(kernels_.ChooseLines(choice));
  }
  kept.results.resize(count);
  QUARRY_RETURN_IF_ERROR(
      device_.Download(std::as_writable_bytes(std::span(kept.results)), kept.lists.results));
  return kept;
}

absl::Status LinePlanner::Emit(const Kept& kept, const PlanArrays& plan) {
  return kernels_.EmitLines(
      {kept.lines_at, static_cast<uint32_t>(kept.lines.size()), kept.tokens, kept.lists, plan});
}

}  // namespace quarry::cuda

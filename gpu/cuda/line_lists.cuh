// What is kept of a line's tries, and how it gets to a plan.
#pragma once

#include "gpu/cuda/line_tries.cuh"

namespace quarry::cuda {

// Of a line by mass: the try with the fewest tiles of those that have the mass within the share.
// None: not complete.
struct BestTry {
  LineTry result;
  uint32_t place;
};
__device__ inline BestTry BestOfMass(const ChooseLinesArgs& tried, const Line& line) {
  BestTry best = {};
  uint64_t fewest = ~uint64_t{0};
  for (uint32_t i = 0; i < tried.tries; ++i) {
    const LineTry at = tried.results[size_t{blockIdx.x} * tried.tries + i];
    if (at.is_complete == 0) break;  // more slashes cost more
    const bool enough =
        static_cast<double>(at.captured) >= line.mass * static_cast<double>(at.mass) &&
        static_cast<double>(at.tiles) <= line.most_share * static_cast<double>(at.dense_tiles);
    if (!enough || at.tiles >= fewest) continue;
    best = {at, i};
    fewest = at.tiles;
  }
  return best;
}

// Keeps the best try of each line, if it costs less than dense attention. Grid: lines.
__device__ inline void KeepLines(const KeepLinesArgs& a, uint32_t threads, LineShared* shared) {
  const ChooseLinesArgs& tried = a.tried;
  const Line line = tried.lines[blockIdx.x];
  BestTry best = {};
  if (line.head != kNoHead) {
    best = line.mass > 0
               ? BestOfMass(tried, line)
               : BestTry{LineTrier(tried, blockIdx.x, 0, threads, shared).FinishByNumber(), 0};
  }
  LineTry kept = best.result;
  if (kept.eighths + a.choosing_eighths >= 8 * kept.dense_tiles) kept = {};
  if (threadIdx.x == 0) a.kept.results[blockIdx.x] = kept;
  if (kept.is_complete == 0) return;
  const size_t words = (tried.tokens + 31) / 32, most = tried.tokens / (kRowTile + 1) + 2;
  const size_t from = size_t{blockIdx.x} * tried.tries + best.place, to = blockIdx.x;
  for (uint32_t i = threadIdx.x; i < kept.ranges; i += threads) {
    a.kept.ranges[to * most + i] = tried.ranges[from * most + i];
  }
  for (uint32_t i = threadIdx.x; i <= kept.ranges; i += threads) {
    a.kept.range_tiles[to * (most + 1) + i] = tried.range_tiles[from * (most + 1) + i];
  }
  for (uint32_t i = threadIdx.x; i < words; i += threads) {
    a.kept.columns[to * words + i] = tried.bits[(from * kTryBits + kTryColumns) * words + i];
    a.kept.columns_before[to * words + i] = tried.bits[(from * kTryBits + kTryBefore) * words + i];
  }
}

// What was kept, to a plan's lists. Grid: lines.
__device__ inline void EmitLines(const EmitLinesArgs& a, uint32_t threads) {
  const LineTry kept = a.kept.results[blockIdx.x];
  if (kept.is_complete == 0) return;
  const uint32_t head = a.lines[blockIdx.x].head;
  const size_t words = (a.tokens + 31) / 32, most = a.tokens / (kRowTile + 1) + 2;
  const size_t line = blockIdx.x;
  RelativeRange* const ranges = a.plan.ranges + a.plan.range_first[head];
  uint32_t* const tiles = a.plan.range_tiles + a.plan.range_first[head] + head;
  uint32_t* const columns = a.plan.columns + a.plan.column_first[head];
  for (uint32_t i = threadIdx.x; i < kept.ranges; i += threads)
    ranges[i] = a.kept.ranges[line * most + i];
  for (uint32_t i = threadIdx.x; i <= kept.ranges; i += threads) {
    tiles[i] = a.kept.range_tiles[line * (most + 1) + i];
  }
  for (uint32_t w = threadIdx.x; w < words; w += threads) {
    uint32_t place = a.kept.columns_before[line * words + w];
    for (uint32_t bits = a.kept.columns[line * words + w]; bits != 0; bits &= bits - 1) {
      columns[place++] = w * 32 + FirstBit(bits);
    }
  }
}

}  // namespace quarry::cuda

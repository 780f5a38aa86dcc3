// The part of an index that is of its row tiles, from a plan.
#pragma once

#include "gpu/cuda/block_ops.cuh"
#include "gpu/cuda/index_args.h"
#include "gpu/cuda/line_counts.cuh"

namespace quarry::cuda {

// Of columns [at, end), the first that is not before `token`.
__device__ inline uint32_t FirstColumnFrom(const uint32_t* columns, uint32_t at, uint32_t end,
                                           uint32_t token) {
  while (at < end) {
    const uint32_t middle = at + (end - at) / 2;
    if (columns[middle] < token) {
      at = middle + 1;
    } else {
      end = middle;
    }
  }
  return at;
}

// Writes tiles, but of block patterns, columns_seen and block_first. A row tile a thread. Grid:
// any, heads.
__device__ inline void CountRowTiles(const IndexArgs& a, uint32_t threads) {
  const uint32_t head = blockIdx.y;
  const PlanArrays& plan = a.plan;
  const HeadKind kind = plan.kind[head];
  const uint32_t range_first = plan.range_first[head], column_first = plan.column_first[head];
  const HeadRanges ranges{plan.ranges + range_first, plan.range_tiles + range_first + head,
                          plan.range_first[head + 1] - range_first};
  const uint32_t column_end = plan.column_first[head + 1];
  for (uint32_t t = blockIdx.x * threads + threadIdx.x; t < a.row_tiles; t += gridDim.x * threads) {
    const size_t item = size_t{head} * a.row_tiles + t;
    const uint32_t lo = a.first_token + t * kRowTile;
    const TokenRange rows{lo, min(lo + kRowTile, a.first_token + a.rows)};
    uint32_t seen = 0;
    if (kind != HeadKind::kBlocks) a.tiles[item] = TilesOfDense(rows);
    if (kind == HeadKind::kRanges) {
      seen = FirstColumnFrom(plan.columns, column_first, column_end, DiagonalOf(ranges, rows)) -
             column_first;
      const uint32_t sparse = RangeTilesOf(ranges, rows) + TilesFor(seen);
      if (RunsSparse(sparse, TilesOfDense(rows))) a.tiles[item] = sparse;
    }
    a.columns_seen[item] = seen;
    a.block_first[item] = (plan.block_place[head] * a.row_tiles + t) * a.block_stride;
  }
}

struct OrderShared {
  static constexpr uint32_t kClasses = 256, kMostWarps = 32;
  uint32_t places[kClasses * kMostWarps];
  uint32_t folds[kMostWarps];
};

// Writes order: items by classes of tiles, the most first: what runs last is short. In a class the
// later row tiles come first, and the heads of one together, for they share keys and values. By
// one block of threads, each warp for items behind one another.
__device__ inline void OrderItems(const IndexArgs& a, uint32_t threads, OrderShared* shared) {
  constexpr uint32_t kClasses = OrderShared::kClasses;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = threads / 32;
  const uint32_t items = a.heads * a.row_tiles;
  const uint32_t each = (items + 32 * warps - 1) / (32 * warps) * 32;
  const uint32_t begin = min(items, warp * each), end = min(items, begin + each);
  const uint32_t most = (a.first_token + a.rows + kKeyTile - 1) / kKeyTile;
  // Item at a place among all, and its class, 0 having the most tiles.
  const auto item_at = [&](uint32_t place) {
    return place % a.heads * a.row_tiles + a.row_tiles - 1 - place / a.heads;
  };
  const auto class_of = [&](uint32_t item) {
    return kClasses - 1 - static_cast<uint32_t>(uint64_t{a.tiles[item]} * (kClasses - 1) / most);
  };
  for (uint32_t i = threadIdx.x; i < kClasses * warps; i += threads) shared->places[i] = 0;
  __syncthreads();
  for (int pass = 0; pass < 2; ++pass) {
    for (uint32_t first = begin; first < end; first += 32) {
      const bool exists = first + lane < end;
      const uint32_t item = exists ? item_at(first + lane) : 0;
      const uint32_t tiles_class = exists ? class_of(item) : kClasses;
      const uint32_t same = MatchLanes(tiles_class);
      uint32_t* const place = &shared->places[min(tiles_class, kClasses - 1) * warps + warp];
      const uint32_t before = *place;
      SyncWarp();
      if (exists && lane == FirstBit(same)) *place = before + CountBits(same);
      SyncWarp();
      if (exists && pass == 1) {
        a.order[before + CountBits(same & ((1u << lane) - 1))] = item;
      }
    }
    __syncthreads();
    if (pass == 1) return;
    // From numbers to the first place of each.
    const Stretch mine = ShareOf(kClasses * warps, threads);
    uint32_t sum = 0;
    for (uint32_t i = mine.lo; i < mine.hi; ++i) sum += shared->places[i];
    uint32_t at = Fold<Plus>(sum, threads, shared->folds).before;
    for (uint32_t i = mine.lo; i < mine.hi; ++i) {
      const uint32_t count = shared->places[i];
      shared->places[i] = at;
      at += count;
    }
    __syncthreads();
  }
}

}  // namespace quarry::cuda

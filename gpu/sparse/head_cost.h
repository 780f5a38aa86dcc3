// What a head costs, and when sparse is cheaper than dense.
#pragma once

#include <cstdint>
#include <span>

#include "gpu/sparse/sparse_index.h"
#include "proto/types.h"

namespace quarry {

// A sparse key tile is taken to cost 9/8 of a dense one: it may be gathered, masked or begin
// anywhere. On the host it costs 0.92 to 1.09 (sparse_bench, 16K tokens, AVX-512, one busy core);
// what it is on other devices, their kernels must show.
inline constexpr uint64_t kSparseTileEighths = 9;

// Whether dense attention takes the place of a pattern that would not be cheaper. kNever is for
// comparing patterns; row tiles that would run as many tiles as dense ones are dense all the same.
enum class DenseFallback { kWhereCheaper, kNever };

// Whether a row tile of so many key tiles runs sparse.
bool SparseIsCheaper(uint32_t sparse, uint32_t dense, DenseFallback fallback);

struct HeadCost {
  uint64_t tiles = 0;    // as they run, dense row tiles included
  uint64_t eighths = 0;  // of a dense tile: what they are taken to cost
  uint64_t dense_tiles = 0;
};
// Of what BuildIndex makes of these for all of `rows`.
HeadCost CostOf(std::span<const RelativeRange> ranges, std::span<const uint32_t> columns,
                TokenRange rows, DenseFallback fallback);

}  // namespace quarry

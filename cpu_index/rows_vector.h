// What kernels of coded rows have in common at every vector level.
#pragma once

#include <immintrin.h>

#include "cpu_index/codes_vector.h"
#include "cpu_index/kernels.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

// Rows that are fetched ahead: about the latency of DRAM.
constexpr uint32_t kRowsAhead = 16;

// Inlined by force: GCC drops calls to a function that only prefetches.
inline __attribute__((always_inline)) void PrefetchRow(const uint8_t* row, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(row) + at, _MM_HINT_T0);
  }
  _mm_prefetch(reinterpret_cast<const char*>(row) + bytes - 1, _MM_HINT_T0);
}

// Of the tile's rows from the first-th on. Inlined by force, as PrefetchRow.
inline __attribute__((always_inline)) void PrefetchKeyRows(const KeyRowTile& tile, uint32_t first) {
  const uint32_t end = tile.count < first + kRowsAhead ? tile.count : first + kRowsAhead;
  for (uint32_t r = first; r < end; ++r) {
    PrefetchRow(tile.rows + tile.which[r] * tile.stride, tile.stride);
  }
}

// kQueries queries and as many rows as make up to V::kWidth scores; rows past `end` are the last
// one.
template <typename V, uint32_t kQueries>
void ScoreSomeRows(const KeyRowTile& tile, uint32_t query, uint32_t first, uint32_t end,
                   auto&& sum_row) {
  constexpr uint32_t kWidth = V::kWidth, kRows = kWidth / kQueries;
  const int8_t* const weights = tile.weights + size_t{query} * tile.parts * 64;
  typename V::Reg sum[kWidth];
  for (typename V::Reg& lane : sum) lane = V::Zero();
  uint32_t row_scale[kWidth] = {};
  for (uint32_t r = 0; r < kRows; ++r) {
    const uint32_t at = tile.which[first + r < end ? first + r : end - 1];
    typename V::Reg of_query[kQueries];
    sum_row.template operator()<kQueries>(tile.rows + at * tile.stride, weights, of_query);
    for (uint32_t i = 0; i < kQueries; ++i) {
      sum[i * kRows + r] = of_query[i];
      row_scale[i * kRows + r] = uint32_t{tile.row_scale[at]} << 16;
    }
  }
  float scale[kWidth] = {}, offset[kWidth] = {};
  for (uint32_t lane = 0; lane < kQueries * kRows; ++lane) {
    scale[lane] = tile.scale[query + lane / kRows];
    offset[lane] = tile.offset[query + lane / kRows];
  }
  float out[kWidth];
  V::Store(out, V::Mul(V::Fma(V::SumEach(sum), V::LoadFp32(scale), V::LoadFp32(offset)),
                       V::LoadFp32(row_scale)));
  const uint32_t count = end - first < kRows ? end - first : kRows;
  for (uint32_t i = 0; i < kQueries; ++i) {
    for (uint32_t r = 0; r < count; ++r) {
      tile.out[(query + i) * tile.ld_out + first + r] = out[i * kRows + r];
    }
  }
}

// sum_row<kQueries>(row, weights, sums): a register for each query whose lanes sum up to its sum.
template <typename V>
void ScoreKeyRows(const KeyRowTile& tile, auto&& sum_row) {
  PrefetchKeyRows(tile, 0);
  for (uint32_t lo = 0; lo < tile.count; lo += kRowsAhead) {
    PrefetchKeyRows(tile, lo + kRowsAhead);
    const uint32_t hi = tile.count - lo < kRowsAhead ? tile.count : lo + kRowsAhead;
    ForQueries(tile.queries, [&](auto some, uint32_t query) {
      for (uint32_t r = lo; r < hi; r += V::kWidth / some) {
        ScoreSomeRows<V, some>(tile, query, r, hi, sum_row);
      }
    });
  }
}

inline __attribute__((always_inline)) void PrefetchValueRow(const ValueRowTile& tile, uint32_t r) {
  PrefetchRow(tile.rows + tile.which[r] * tile.stride, tile.stride);
  _mm_prefetch(reinterpret_cast<const char*>(tile.row_scale + tile.which[r]), _MM_HINT_T0);
}

// add_part<kQueries>(rows, query, dim, listed): from that query and that dimension on, `dims` of
// them where there are as many. listed: rows of tile.which, those of the tile and what is added
// next.
void AddValueRows(const ValueRowTile& tile, uint32_t dims, auto&& add_part) {
  constexpr uint32_t kTileRows = 128;  // stay in the first cache from one part to the next
  for (uint32_t first = 0; first < tile.count; first += kTileRows) {
    ValueRowTile some = tile;
    some.which += first;
    some.weights += first;
    some.count = tile.count - first < kTileRows ? tile.count - first : kTileRows;
    for (uint32_t dim = 0; dim < tile.dims; dim += dims) {
      ForQueries(tile.queries, [&](auto queries, uint32_t query) {
        add_part.template operator()<queries>(some, query, dim, tile.count - first);
      });
    }
  }
}

}  // namespace
}  // namespace quarry::kernels

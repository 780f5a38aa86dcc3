// What kernels of coded keys have in common at every vector level.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "cpu_index/kernels.h"
#include "cpu_index/kernels_vector.h"

// Compiled anew for every level: nothing here may be shared between object files.
namespace quarry::kernels {
namespace {

constexpr size_t kCodeBlockBytes = 256;

// About the latency of DRAM at its bandwidth.
constexpr uint32_t kBlocksAhead = 8;

// Of the b-th block that the tile takes; of the last one for those behind it.
template <typename Tile>
size_t BlockAt(const Tile& tile, uint32_t b) {
  b = b < tile.blocks ? b : tile.blocks - 1;
  return tile.which == nullptr ? b : tile.which[b];
}

// Inlined by force: GCC drops calls to a function that only prefetches.
template <size_t kBytes>
inline __attribute__((always_inline)) void PrefetchBlock(const uint8_t* block) {
  for (size_t line = 0; line < kBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(block) + line, _MM_HINT_T0);
  }
}

inline __attribute__((always_inline)) void PrefetchCodedKeys(const CodedKeyTile& tile, size_t at) {
  PrefetchBlock<kCodeBlockBytes>(tile.codes + at * kCodeBlockBytes);
  _mm_prefetch(reinterpret_cast<const char*>(tile.key_scale + at * kCodeBlockKeys), _MM_HINT_T0);
}

inline __attribute__((always_inline)) void PrefetchNodes(const NodeTile& tile, size_t at) {
  PrefetchBlock<kCentroidBlockBytes>(tile.centroids + at * kCentroidBlockBytes);
  _mm_prefetch(reinterpret_cast<const char*>(tile.variance + at * kCodeBlockKeys), _MM_HINT_T0);
}

// f(a number of queries as a constant, the first of them): up to four at a time.
void ForQueries(uint32_t queries, auto&& f) {
  uint32_t query = 0;
  for (; queries - query > 4; query += 4) f(std::integral_constant<uint32_t, 4>(), query);
  switch (queries - query) {
    case 1:
      return f(std::integral_constant<uint32_t, 1>(), query);
    case 2:
      return f(std::integral_constant<uint32_t, 2>(), query);
    case 3:
      return f(std::integral_constant<uint32_t, 3>(), query);
    case 4:
      return f(std::integral_constant<uint32_t, 4>(), query);
  }
}

// out[g]: the sum of e^(x - shift) over the g-th kCodeBlockKeys of x.
template <typename V>
void ExpGroups(const float* x, size_t groups, float shift, float* out) {
  constexpr size_t kWidth = V::kWidth;
  const typename V::Reg s = V::Set(shift);
  for (size_t g = 0; g < groups; g += kWidth) {
    const size_t some = groups - g < kWidth ? groups - g : kWidth;
    typename V::Reg e[kWidth];
    for (size_t j = 0; j < kWidth; ++j) {
      const float* const from = x + (g + (j < some ? j : 0)) * kCodeBlockKeys;
      e[j] = Exp<V>(V::Sub(V::LoadFp32(from), s));
      for (size_t t = kWidth; t < kCodeBlockKeys; t += kWidth) {
        e[j] = V::Add(e[j], Exp<V>(V::Sub(V::LoadFp32(from + t), s)));
      }
    }
    float sums[kWidth];
    V::Store(sums, V::SumEach(e));
    std::memcpy(out + g, sums, some * sizeof(float));
  }
}

// bins_of(values): a register of the bins of as many values as it has lanes.
void CountBins(const float* x, size_t n, uint32_t* counts, auto&& bins_of) {
  using Bins = decltype(bins_of(x));
  constexpr size_t kWidth = sizeof(Bins) / sizeof(uint32_t);
  // Neighbours often share a bin: four tables, lest each waits for the one before.
  uint32_t table[4][kHistogramBins] = {};
  for (size_t i = 0; i < n; i += kWidth) {
    const size_t some = n - i < kWidth ? n - i : kWidth;
    float tail[kWidth] = {};
    if (some < kWidth) std::memcpy(tail, x + i, some * sizeof(float));
    const Bins bins = bins_of(some < kWidth ? tail : x + i);
    uint32_t lane[kWidth];
    std::memcpy(lane, &bins, sizeof(lane));
    for (size_t j = 0; j < some; ++j) ++table[j % 4][lane[j]];
  }
  for (uint32_t b = 0; b < kHistogramBins; ++b) {
    counts[b] += table[0][b] + table[1][b] + table[2][b] + table[3][b];
  }
}

}  // namespace
}  // namespace quarry::kernels

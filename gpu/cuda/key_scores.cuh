// Scores of queries and keys by tensor instructions, to memory.
#pragma once

#include "gpu/cuda/score_steps.cuh"
#include "gpu/cuda/sparse_args.h"

namespace quarry::cuda {

template <int kHeadDim>
struct ScoreTile : TensorTile<kHeadDim, 1> {
  using Base = TensorTile<kHeadDim, 1>;
  // Key tiles of a block of threads, which pay for its queries.
  static constexpr uint32_t kSteps = 16;
  static constexpr int kSharedBytes = Base::kQueries * Base::kVectorBytes + 2 * Base::kKvBytes;
};

// A block's queries of one head.
struct ScoreQueries {
  const ScoreArgs& a;
  uint32_t head, first;

  __device__ bool Has(uint32_t i) const { return first + i < a.queries; }
  __device__ size_t Vector(uint32_t i) const { return size_t{first + i} * a.heads + head; }
};

// Grid: stretches of kSteps key tiles, tiles of queries, launched heads.
template <typename T, typename Tile>
__device__ void ScoreKeys(const ScoreArgs& a, char* shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16;
  const ScoreQueries group{a, a.first_head + blockIdx.z, blockIdx.y * Tile::kQueries};
  const std::byte* const k = a.k + group.head / a.group * a.head_stride;
  const uint32_t begin = blockIdx.x * Tile::kSteps;
  const uint32_t end = min((begin + Tile::kSteps) * kKeyTile, a.keys);
  const auto fetch = [&](uint32_t step, char* stage) {
    const uint32_t lo = step * kKeyTile;
    FetchVectors<Tile, false>(k + size_t{lo} * Tile::kVectorBytes, nullptr,
                              min(lo + kKeyTile, end) - lo, stage);
  };
  const auto store = [&](uint32_t step, const auto& s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = warp_row + 8 * half + lane / 4;
      if (!group.Has(row)) continue;
      const size_t vector = size_t{blockIdx.z} * a.queries + group.first + row;
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; ++n) {
        const uint32_t key = step * kKeyTile + 8 * n + 2 * (lane % 4);
        if (key >= end) continue;
        *reinterpret_cast<float2*>(a.out + vector * a.width + key) =
            make_float2(s[0][n][2 * half] * a.scale_log2, s[0][n][2 * half + 1] * a.scale_log2);
      }
    }
    __syncthreads();
  };
  ScoreSteps<T, Tile>(group, a.q, shared, begin, (end + kKeyTile - 1) / kKeyTile, fetch, store);
}

}  // namespace quarry::cuda

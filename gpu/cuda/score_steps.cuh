// The walk of kernels that score a block's queries with one tile of vectors after another.
#pragma once

#include "gpu/cuda/tensor_tile.cuh"

namespace quarry::cuda {

// Steps [begin, end) of a tile of vectors each; there is one. shared: queries, then two stages of
// vectors. fetch(step, stage) sets off the copies of a step's vectors; f(step, scores) is called
// with each step's scores, unscaled, and has all threads meet after it last read what is shared
// by stage: the next step's copies overwrite that.
template <typename T, typename Tile, typename Queries, typename Fetch, typename F>
__device__ void ScoreSteps(const Queries& queries, const float* q, char* shared, uint32_t begin,
                           uint32_t end, const Fetch& fetch, const F& f) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const auto stage = [=](uint32_t step) {
    return shared + Tile::kQueries * Tile::kVectorBytes + step % 2 * Tile::kKvBytes;
  };
  StoreQueries<T, Tile>(queries, q, shared);
  fetch(begin, stage(begin));
  EndCopyGroup();
  const WarpState<T, Tile> state(lane);
  for (uint32_t step = begin; step < end; ++step) {
    if (step + 1 < end) fetch(step + 1, stage(step + 1));
    EndCopyGroup();
    WaitForCopies<1>();
    __syncthreads();
    float s[Tile::kRowTiles][Tile::kKeys / 8][4];
    state.Score(shared + warp * 16 * Tile::kRowTiles * Tile::kVectorBytes, stage(step), s);
    f(step, s);
  }
}

}  // namespace quarry::cuda

// What sparse prefill makes of scores, and the means that it scores: plain loops, whose sums have
// one order. Heads lie along the grid's last dimension that is used.
#pragma once

#include "gpu/cuda/sparse_args.h"

namespace quarry::cuda {

inline constexpr uint32_t kNoKey = ~0u;

// Of a query's row of scores: the first `count`, and the one at `also`, if any.
struct ScoredKeys {
  uint32_t count, also;
};

__device__ inline uint32_t BlocksBefore(uint32_t token) {
  return (token + kKeyTile - 1) / kKeyTile;
}

// The end of row tile t.
__device__ inline uint32_t EndOf(const ChoiceArgs& a, uint32_t t) {
  return min(a.first_token + (t + 1) * kRowTile, a.end_token);
}

// A query of row tile t, of blocks of keys, that looks at those before token `end`.
__device__ inline ScoredKeys BlocksSeen(const ChoiceArgs& a, uint32_t t, uint32_t end) {
  const uint32_t blocks = BlocksBefore(end), whole = EndOf(a, t) / kKeyTile;
  if (blocks <= whole) return {blocks, kNoKey};
  return {whole, a.cut_first + t};
}

__device__ inline ScoredKeys KeysOf(const ChoiceArgs& a, uint32_t query) {
  if (a.of == ScoredQueries::kLast) return {a.first_token + query + 1, kNoKey};
  if (a.of == ScoredQueries::kRows) {
    return BlocksSeen(a, query / kRowTile, a.first_token + query + 1);
  }
  const uint32_t first = a.first_token + query * (kRowTile / 2);
  if (first >= a.end_token) return {0, kNoKey};
  return BlocksSeen(a, query / 2, min(first + kRowTile / 2, a.end_token));
}

// The largest of some scores, and the sum of 2^(score - largest).
struct ScoreSum {
  float largest = -INFINITY, sum = 0.0f;

  __device__ void Add(const ScoreSum& other) {
    const float now = fmaxf(largest, other.largest);
    if (now == -INFINITY) return;
    sum = sum * Exp2(largest - now) + other.sum * Exp2(other.largest - now);
    largest = now;
  }
};

// Writes stats. Grid: queries, heads. `threads`: a power of two; shared: [threads].
__device__ inline void MeasureScores(const ChoiceArgs& a, uint32_t threads, ScoreSum* shared) {
  constexpr int kAtATime = 4;  // reads that wait for each other's end are too few
  const uint32_t thread = threadIdx.x;
  const size_t vector = size_t{blockIdx.y} * a.queries + blockIdx.x;
  const float* const scores = a.scores + vector * a.width;
  const ScoredKeys keys = KeysOf(a, blockIdx.x);
  ScoreSum mine;
  for (uint32_t first = thread; first < keys.count; first += kAtATime * threads) {
    float x[kAtATime];
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      const uint32_t key = first + i * threads;
      x[i] = key < keys.count ? scores[key] : -INFINITY;
    }
    const float now = fmaxf(mine.largest, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
    mine.sum *= Exp2(mine.largest - now);
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) mine.sum += Exp2(x[i] - now);
    mine.largest = now;
  }
  if (thread == 0 && keys.also != kNoKey) mine.Add({scores[keys.also], 1.0f});
  shared[thread] = mine;
  __syncthreads();
  for (uint32_t step = threads / 2; step > 0; step /= 2) {
    if (thread < step) shared[thread].Add(shared[thread + step]);
    __syncthreads();
  }
  if (thread == 0) {
    a.stats[2 * vector] = shared[0].largest;
    a.stats[2 * vector + 1] = shared[0].largest + log2f(shared[0].sum);
  }
}

// Sums by keys and by distances, one of each a thread. Grid: any, heads.
__device__ inline void SumLastQueries(const ChoiceArgs& a, uint32_t threads) {
  const uint32_t tokens = a.first_token + a.queries;
  const float* const scores = a.scores + size_t{blockIdx.y} * a.queries * a.width;
  const float* const stats = a.stats + size_t{blockIdx.y} * a.queries * 2;
  float* const out = a.out + size_t{blockIdx.y} * 3 * tokens;
  for (uint32_t j = blockIdx.x * threads + threadIdx.x; j < tokens; j += gridDim.x * threads) {
    float before = 0.0f, behind = 0.0f, slash = 0.0f;
    for (uint32_t i = 0; i < a.queries; ++i) {
      const uint32_t token = a.first_token + i;
      if (token < j) continue;
      const float* const of_query = scores + size_t{i} * a.width;
      const float shift = stats[2 * i + 1], weight = Exp2(of_query[j] - shift);
      if (i < a.split) {
        before += weight;
      } else {
        behind += weight;
      }
      slash += Exp2(of_query[token - j] - shift);
    }
    out[j] = before;
    out[tokens + j] = behind;
    out[size_t{2} * tokens + j] = slash;
  }
}

// Weights of blocks, one a thread. Grid: any, row tiles, heads.
__device__ inline void WeighBlocks(const ChoiceArgs& a, uint32_t threads) {
  const uint32_t t = blockIdx.y, end = EndOf(a, t);
  const float* const scores = a.scores + size_t{blockIdx.z} * a.queries * a.width;
  const float* const stats = a.stats + size_t{blockIdx.z} * a.queries * 2;
  float* const out = a.out + blockIdx.z * a.out_head_stride + t * a.out_stride;
  const uint32_t per_tile = a.of == ScoredQueries::kPooled ? 2 : kRowTile;
  for (uint32_t b = blockIdx.x * threads + threadIdx.x; b < BlocksBefore(end);
       b += gridDim.x * threads) {
    const uint32_t key = b < end / kKeyTile ? b : a.cut_first + t;
    float weight = 0.0f;
    for (uint32_t i = t * per_tile; i < min((t + 1) * per_tile, a.queries); ++i) {
      const ScoredKeys seen = KeysOf(a, i);
      if (b >= seen.count && key != seen.also) continue;
      const float score = scores[size_t{i} * a.width + key];
      if (a.of == ScoredQueries::kPooled) {
        weight += Exp2(score - stats[2 * i + 1]);
      } else if (score >= stats[2 * i] + a.below_log2) {
        weight = INFINITY;
      }
    }
    out[b] = weight;
  }
}

// Grid: means, KV heads; a thread for two dimensions.
template <typename T>
__device__ void MeanKeys(const MeanArgs& a) {
  const uint32_t words = a.head_dim / 2;
  if (threadIdx.x >= words) return;
  uint32_t lo = blockIdx.x * kKeyTile, hi = lo + kKeyTile;
  if (blockIdx.x >= a.blocks) {
    const uint32_t t = blockIdx.x - a.blocks;
    hi = a.first_token + min((t + 1) * kRowTile, a.rows);
    lo = hi / kKeyTile * kKeyTile;
  }
  const uint32_t* const k =
      reinterpret_cast<const uint32_t*>(a.k + blockIdx.y * a.head_stride) + threadIdx.x;
  float x = 0.0f, y = 0.0f;
#pragma unroll 8
  for (uint32_t token = lo; token < hi; ++token) {
    const float2 both = T::Unpack(k[size_t{token} * words]);
    x += both.x;
    y += both.y;
  }
  const float share = lo < hi ? 1.0f / static_cast<float>(hi - lo) : 0.0f;
  const size_t mean = size_t{blockIdx.y} * gridDim.x + blockIdx.x;
  reinterpret_cast<uint32_t*>(a.out)[mean * words + threadIdx.x] = T::Pack(x * share, y * share);
}

// Grid: halves of row tiles, heads; a thread for a dimension.
__device__ inline void PoolQueries(const PoolArgs& a) {
  if (threadIdx.x >= a.head_dim) return;
  const uint32_t lo = min(blockIdx.x * (kRowTile / 2), a.rows);
  const uint32_t hi = min(lo + kRowTile / 2, a.rows);
  float sum = 0.0f;
#pragma unroll 8
  for (uint32_t row = lo; row < hi; ++row) {
    sum += a.q[(size_t{row} * a.heads + blockIdx.y) * a.head_dim + threadIdx.x];
  }
  a.out[(size_t{blockIdx.x} * a.heads + blockIdx.y) * a.head_dim + threadIdx.x] =
      lo < hi ? sum / static_cast<float>(hi - lo) : 0.0f;
}

}  // namespace quarry::cuda

// Key blocks by scores of their means, and these means. Sums have one order. Heads lie along the
// grid's last dimension that is used.
#pragma once

#include "gpu/cuda/block_ops.cuh"
#include "gpu/cuda/score_sum.cuh"
#include "gpu/cuda/sparse_args.h"
#include "gpu/sparse/head_cost.h"

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
  return a.first_token + min((t + 1) * kRowTile, a.rows);
}

// Of a mean query: the blocks before its last row's.
__device__ inline ScoredKeys KeysOf(const ChoiceArgs& a, uint32_t query) {
  const uint32_t row = query * (kRowTile / 2), t = query / 2;
  if (row >= a.rows) return {0, kNoKey};
  const uint32_t blocks = BlocksBefore(a.first_token + min(row + kRowTile / 2, a.rows));
  const uint32_t whole = EndOf(a, t) / kKeyTile;
  if (blocks <= whole) return {blocks, kNoKey};
  return {whole, a.whole_blocks + t};
}

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
    a.stats[2 * vector + 1] = shared[0].Log2();
  }
}

// Shared memory of the choice of blocks.
struct BlocksShared {
  SearchShared<4> search;
  uint32_t folds[32];
};

// The blocks of one row tile of one head by their weights, as BlockWeights and ChooseBlocks
// (gpu/sparse/choose_blocks.h): written over the weights, which lie where blocks are to be. Grid:
// row tiles, heads.
class BlockChooser {
 public:
  __device__ BlockChooser(const ChoiceArgs& a, uint32_t threads, BlocksShared* shared)
      : a_(a),
        threads_(threads),
        shared_(*shared),
        tile_(blockIdx.x),
        end_(EndOf(a, blockIdx.x)),
        count_(BlocksBefore(end_)),
        weights_(a.blocks + blockIdx.y * a.block_head_stride +
                 size_t{blockIdx.x} * a.block_stride) {}

  __device__ void Run() {
    const uint32_t forced = Weigh();
    const bool pools = a_.scores != nullptr;
    const uint32_t head = a_.first_head + blockIdx.y;
    const uint32_t chosen = pools ? min(count_, max(forced, a_.wanted[head])) : forced;
    const uint64_t choosing = pools ? 0 : count_ / 16;
    const bool sparse =
        chosen < count_ && kSparseTileEighths * chosen + choosing < 8 * uint64_t{count_};
    if (threadIdx.x == 0) {
      a_.tiles[size_t{head} * gridDim.x + tile_] = sparse ? chosen : count_;
    }
    if (sparse) List(chosen);
  }

 private:
  static constexpr uint32_t kForced = ~0u;

  // Writes weights, which are floats whose bits have their order, and kForced of blocks that are
  // always in or that a row asks for. How many of the latter there are.
  __device__ uint32_t Weigh() {
    const uint32_t first = a_.first_token + tile_ * kRowTile;
    uint32_t forced = 0;
    for (uint32_t b = threadIdx.x; b < count_; b += threads_) {
      uint32_t weight = kForced;
      if (b > 0 && b < first / kKeyTile) {
        weight = a_.scores != nullptr ? BitsOf(MassOf(b)) : weights_[b];
      }
      weights_[b] = weight;
      forced += weight == kForced;
    }
    return Fold<Plus>(forced, threads_, shared_.folds).all;
  }
  // What the mean queries have there.
  __device__ float MassOf(uint32_t b) const {
    const float* const scores = a_.scores + size_t{blockIdx.y} * a_.queries * a_.width;
    const float* const stats = a_.stats + size_t{blockIdx.y} * a_.queries * 2;
    float mass = 0.0f;
    for (uint32_t i = 2 * tile_; i < min(2 * (tile_ + 1), a_.queries); ++i) {
      if (b < KeysOf(a_, i).count)
        mass += Exp2(scores[size_t{i} * a_.width + b] - stats[2 * i + 1]);
    }
    return mass;
  }

  // The places of the `chosen` largest, rising.
  __device__ void List(uint32_t chosen) {
    const auto weight_of = [this](uint32_t b) { return weights_[b]; };
    const Threshold threshold = FindLargest(weight_of, count_, chosen, threads_, &shared_.search);
    uint32_t above = 0, equal = 0;  // before the present ones
    for (uint32_t first = 0; first < count_; first += threads_) {
      const uint32_t b = first + threadIdx.x, weight = b < count_ ? weights_[b] : 0;
      const bool is_above = b < count_ && weight > threshold.least;
      const bool is_equal = b < count_ && weight == threshold.least;
      // Both numbers at once: at most 1,024 each. Who writes has read, and so have all before.
      const Folded<uint32_t> both =
          Fold<Plus>((is_above ? 1u << 16 : 0) + (is_equal ? 1u : 0), threads_, shared_.folds);
      const uint32_t above_here = above + (both.before >> 16);
      const uint32_t equal_here = equal + (both.before & 0xffff);
      if (is_above || (is_equal && equal_here < threshold.ties)) {
        weights_[above_here + min(equal_here, threshold.ties)] = b;
      }
      above += both.all >> 16;
      equal += both.all & 0xffff;
    }
  }

  const ChoiceArgs& a_;
  const uint32_t threads_;
  BlocksShared& shared_;
  const uint32_t tile_, end_, count_;  // the row tile, its end and its blocks
  uint32_t* const weights_;
};

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

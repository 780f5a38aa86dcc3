// What the threads of a block find together: sums in the threads' order, and which of many keys
// are the largest. `threads`: of the block, a multiple of 32; all of them come.
#pragma once

#include <cstdint>

namespace quarry::cuda {

struct Plus {
  template <typename X>
  __device__ X operator()(X a, X b) const {
    return a + b;
  }
};
struct Larger {
  template <typename X>
  __device__ X operator()(X a, X b) const {
    return a < b ? b : a;
  }
};

template <typename X>
struct Folded {
  X before, all;  // of the threads before this one, and of all
};
// Op of the threads' x, 0 of none. shared: [threads / 32], which nobody uses else.
template <typename Op, typename X>
__device__ Folded<X> Fold(X x, uint32_t threads, X* shared) {
  const Op op;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  X upto = x;
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const X other = ShuffleUp(upto, step);
    if (lane >= step) upto = op(other, upto);
  }
  const X neighbour = ShuffleUp(upto, 1);
  __syncthreads();  // what was here may still be read
  if (lane == 31) shared[warp] = upto;
  __syncthreads();
  Folded<X> out{0, 0};
#pragma unroll 8
  for (uint32_t w = 0; w < threads / 32; ++w) {
    const X of_warp = shared[w];
    if (w < warp) out.before = op(out.before, of_warp);
    out.all = op(out.all, of_warp);
  }
  if (lane > 0) out.before = op(out.before, neighbour);
  return out;
}

// The threads' share of n things, some behind one another.
struct Stretch {
  uint32_t lo, hi;
};
__device__ inline Stretch ShareOf(uint32_t n, uint32_t threads) {
  const uint32_t each = (n + threads - 1) / threads;
  const uint32_t lo = min(n, threadIdx.x * each);
  return {lo, min(n, lo + each)};
}

// f(i, keys(i)) for i in [first, n), a thread's at a distance of `threads`: keys are read some at a
// time, for reads that wait for each other's end are slow.
template <typename Keys, typename F>
__device__ void ForKeys(const Keys& keys, uint32_t first, uint32_t n, uint32_t threads,
                        const F& f) {
  constexpr uint32_t kAtATime = 8;
  for (uint32_t at = first + threadIdx.x; at < n; at += kAtATime * threads) {
    uint32_t key[kAtATime];
#pragma unroll
    for (uint32_t i = 0; i < kAtATime; ++i) {
      key[i] = at + i * threads < n ? keys(at + i * threads) : 0;
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtATime; ++i) {
      if (at + i * threads < n) f(at + i * threads, key[i]);
    }
  }
}

// Which keys are chosen: those above `least`, and of those equal to it the first `ties`.
struct Threshold {
  uint32_t least, ties;
};

// Shared memory of a search: numbers of keys by eight bits of them, or what they weigh, in as many
// copies as keep threads that add at once apart.
template <uint32_t kCopiesT, typename CountT = uint32_t>
struct SearchShared {
  using Count = CountT;
  static constexpr uint32_t kBins = 256, kCopies = kCopiesT;
  Count counts[kBins * kCopies];
  Count totals[kBins];
  Count found[3];  // the bin, and what lies in the bins above it; kBins: there is none
};

template <typename Shared>
__device__ void ClearBins(uint32_t threads, typename Shared::Count* counts) {
  for (uint32_t i = threadIdx.x; i < Shared::kBins * Shared::kCopies; i += threads) counts[i] = 0;
}
template <typename Shared>
__device__ typename Shared::Count* BinOf(typename Shared::Count* counts, uint32_t bin) {
  return counts + bin * Shared::kCopies + threadIdx.x % Shared::kCopies;
}
// totals[bin] from its copies.
template <typename Shared>
__device__ void JoinCopies(uint32_t threads, const typename Shared::Count* counts,
                           typename Shared::Count* totals) {
  for (uint32_t bin = threadIdx.x; bin < Shared::kBins; bin += threads) {
    typename Shared::Count sum = 0;
#pragma unroll 8
    for (uint32_t i = 0; i < Shared::kCopies; ++i) {
      // Neighbours read different banks.
      sum += counts[bin * Shared::kCopies + (i + bin) % Shared::kCopies];
    }
    totals[bin] = sum;
  }
}
// By one warp: the first bin from the top whose totals, with those above it, reach `wanted` > 0,
// and what lies above it.
template <typename Shared>
__device__ void FindBin(const typename Shared::Count* totals, typename Shared::Count wanted,
                        typename Shared::Count* found) {
  using Count = typename Shared::Count;
  constexpr uint32_t kEach = Shared::kBins / 32;
  const uint32_t lane = threadIdx.x, top = Shared::kBins - 1 - lane * kEach;
  Count mine = 0;
  for (uint32_t i = 0; i < kEach; ++i) mine += totals[top - i];
  Count upto = mine;
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const Count other = ShuffleUp(upto, step);
    if (lane >= step) upto += other;
  }
  const uint32_t reached = Ballot(upto >= wanted);
  if (reached == 0) {
    if (lane == 0) found[0] = Shared::kBins;
  } else if (lane == FirstBit(reached)) {
    Count above = upto - mine;
    uint32_t bin = top;
    while (above + totals[bin] < wanted) above += totals[bin--];
    found[0] = bin;
    found[1] = above;
  }
}

// Of keys(i), i < n, the `count` largest; among equals the first ones.
template <typename Shared, typename Keys>
__device__ Threshold FindLargest(const Keys& keys, uint32_t n, uint32_t count, uint32_t threads,
                                 Shared* shared) {
  if (count == 0) return {~0u, 0};
  __syncthreads();                 // what is here may still be read
  uint32_t prefix = 0, known = 0;  // bits of the threshold
  for (int shift = 24; shift >= 0; shift -= 8) {
    ClearBins<Shared>(threads, shared->counts);
    __syncthreads();
    ForKeys(keys, 0, n, threads, [&](uint32_t, uint32_t key) {
      if ((key & known) == prefix) AddShared(BinOf<Shared>(shared->counts, key >> shift & 255), 1);
    });
    __syncthreads();
    JoinCopies<Shared>(threads, shared->counts, shared->totals);
    __syncthreads();
    if (threadIdx.x < 32) FindBin<Shared>(shared->totals, count, shared->found);
    __syncthreads();
    prefix |= shared->found[0] << shift;
    known |= 255u << shift;
    count -= shared->found[1];
  }
  return {prefix, count};
}

}  // namespace quarry::cuda

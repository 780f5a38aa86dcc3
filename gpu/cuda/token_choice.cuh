// How the threads of a block choose a token from a row of logits. Probabilities are whole numbers,
// so that their sums are the same whatever the order, and the same draw chooses the same token.
#pragma once

#include "gpu/cuda/block_ops.cuh"

namespace quarry::cuda {

struct TokenChoiceShared {
  SearchShared<8, uint64_t> search;
  uint64_t wide[32];
  uint32_t narrow[32];
};

// The row's logits; the vocabulary is in tiles.
struct RowOfLogits {
  const float* logits;
  uint32_t row, rows, vocab, tile;

  // The logit of `first` and those behind it in its tile, which begins there and has `ids`.
  __device__ const float* Tile(uint32_t first, uint32_t* ids) const {
    *ids = min(tile, vocab - first);
    return logits + size_t{rows} * first + size_t{row} * *ids;
  }
  __device__ float At(uint32_t id) const {
    uint32_t ids;
    const uint32_t first = id / tile * tile;
    return Tile(first, &ids)[id - first];
  }
  // f(id, its logit), by all threads, in any order.
  template <typename F>
  __device__ void ForAll(uint32_t threads, const F& f) const {
    for (uint32_t first = 0; first < vocab; first += tile) {
      uint32_t ids;
      const float* const from = Tile(first, &ids);
      ForKeys([&](uint32_t i) { return BitsOf(from[i]); }, 0, ids, threads,
              [&](uint32_t i, uint32_t bits) { f(first + i, FloatOf(bits)); });
    }
  }
};

// In the order of the numbers; the two zeros are one.
__device__ inline uint32_t OrderOf(float x) {
  const uint32_t bits = BitsOf(x + 0.0f);
  return bits >> 31 != 0 ? ~bits : bits | 1u << 31;
}

// What a logit of a row weighs beside the row's largest one, which weighs kMost.
struct LogitWeights {
  static constexpr float kMost = 1ull << 40;  // of 2^22 logits the sum is less than 2^63
  float largest, scale;                       // of logits to powers of 2

  // By how many powers of 2 it weighs less, of x that is not the largest; a number even where the
  // two are as far apart as can be and the scale is 0.
  __device__ float Depth(float x) const { return min(largest - x, 3e38f) * scale; }
  __device__ uint64_t Of(float x) const {
    // Where the scale is infinite all others weigh nothing.
    const float less = x == largest ? 0.0f : -Depth(x);
    return static_cast<uint64_t>(Exp2(less) * kMost);
  }
  // Of 256 bins, logits of as many equal parts of what weighs anything; larger ones are higher.
  __device__ uint32_t Bin(float x) const {
    const float depth = x == largest ? 0.0f : Depth(x) * (256.0f / 41.0f);
    return 255 - static_cast<uint32_t>(min(depth, 255.0f));
  }
};

// The fewest tokens, most probable first, of equal ones those with the lowest ids, that together
// weigh at least `wanted`, which is no more than all do and not 0: the last one of them is the
// place-th with `order`, from 0 on, and `weight` is of all.
struct ReachedToken {
  uint32_t order, place;
  uint64_t weight;
};
__device__ inline ReachedToken ReachWeight(const RowOfLogits& row, const LogitWeights& weights,
                                           uint64_t wanted, uint32_t threads,
                                           TokenChoiceShared* shared) {
  using Shared = decltype(TokenChoiceShared::search);
  Shared& s = shared->search;
  uint32_t of_bin = 0, prefix = 0, known = 0;
  uint64_t above = 0;
  // By equal parts first: the bits of all logits begin alike.
  for (int shift = 32; shift >= 0; shift -= 8) {
    __syncthreads();  // what is here may still be read
    ClearBins<Shared>(threads, s.counts);
    __syncthreads();
    row.ForAll(threads, [&](uint32_t, float x) {
      const uint64_t weight = weights.Of(x);
      if (weight == 0) return;
      uint32_t bin = weights.Bin(x);
      if (shift < 32) {
        const uint32_t order = OrderOf(x);
        if (bin != of_bin || (order & known) != prefix) return;
        bin = order >> shift & 255;
      }
      AddShared(BinOf<Shared>(s.counts, bin), weight);
    });
    __syncthreads();
    JoinCopies<Shared>(threads, s.counts, s.totals);
    __syncthreads();
    if (threadIdx.x < 32) FindBin<Shared>(s.totals, wanted - above, s.found);
    __syncthreads();
    const auto found = static_cast<uint32_t>(s.found[0]);
    above += s.found[1];
    if (shift == 32) {
      of_bin = found;
      continue;
    }
    prefix |= found << shift;
    known |= 255u << shift;
  }
  const uint32_t bits = prefix >> 31 != 0 ? prefix & ~(1u << 31) : ~prefix;
  const uint64_t each = weights.Of(FloatOf(bits)), needed = (wanted - above + each - 1) / each;
  return {prefix, static_cast<uint32_t>(needed - 1), above + needed * each};
}

// The id of the place-th logit with `order`: by one thread.
template <typename F>
__device__ void FindToken(const RowOfLogits& row, uint32_t order, uint32_t place, uint32_t threads,
                          TokenChoiceShared* shared, const F& take) {
  const Stretch mine = ShareOf(row.vocab, threads);
  uint32_t count = 0;
  for (uint32_t id = mine.lo; id < mine.hi; ++id) count += OrderOf(row.At(id)) == order;
  const uint32_t before = Fold<Plus>(count, threads, shared->narrow).before;
  if (place < before || place - before >= count) return;
  uint32_t left = place - before;
  for (uint32_t id = mine.lo; id < mine.hi; ++id) {
    if (OrderOf(row.At(id)) == order && left-- == 0) return take(id);
  }
}

__device__ inline void ChooseTokenOfRow(const RowOfLogits& row, const TokenDraw& draw,
                                        uint32_t threads, TokenChoiceShared* shared,
                                        ChosenToken* out) {
  uint64_t best = 0;   // its order, then what is left of 32 bits to its id
  uint32_t unfit = 0;  // the same of what is no finite number
  row.ForAll(threads, [&](uint32_t id, float x) {
    if ((BitsOf(x) >> 23 & 255) == 255) unfit = max(unfit, ~id);
    best = max(best, uint64_t{OrderOf(x)} << 32 | ~id);
  });
  best = Fold<Larger>(best, threads, shared->wide).all;
  unfit = Fold<Larger>(unfit, threads, shared->narrow).all;
  const uint32_t best_id = ~static_cast<uint32_t>(best);
  if (unfit != 0 || !(draw.temperature > 0)) {
    if (threadIdx.x == 0) *out = {best_id, ~unfit};
    return;
  }
  const LogitWeights weights{row.At(best_id),
                             static_cast<float>(1.4426950408889634 / draw.temperature)};
  uint64_t sum = 0;
  row.ForAll(threads, [&](uint32_t, float x) { sum += weights.Of(x); });
  uint64_t kept = Fold<Plus>(sum, threads, shared->wide).all;
  if (draw.top_p < 1) {
    const double wanted = draw.top_p * static_cast<double>(kept);
    uint64_t whole = wanted > 1 ? static_cast<uint64_t>(wanted) : 1;
    whole += static_cast<double>(whole) < wanted;
    kept = ReachWeight(row, weights, min(whole, kept), threads, shared).weight;
  }
  const auto at = static_cast<uint64_t>(draw.at * static_cast<double>(kept));
  const ReachedToken chosen = ReachWeight(row, weights, min(at + 1, kept), threads, shared);
  FindToken(row, chosen.order, chosen.place, threads, shared, [&](uint32_t id) {
    *out = {id, kEveryToken};
  });
}

}  // namespace quarry::cuda

// Attention by tensor instructions, one block of threads for a tile of queries of one KV head. A
// warp owns 16 or 32 queries and walks all key tiles of the block; K and V of the next tile are on
// their way while one is in work.
//
// The group's query heads share K and V, so they are rows of one tile: a decode step is a tile
// with few rows, whose keys are split over blocks, and a prefill a grid of full ones.
#pragma once

#include "gpu/cuda/attention_args.h"
#include "gpu/cuda/tensor_tile.cuh"

namespace quarry::cuda {

// A block's queries: those of one KV head from `first` on.
struct GroupQueries {
  const AttentionArgs& a;
  uint32_t kv_head, first;

  __device__ bool Has(uint32_t i) const { return first + i < a.rows * a.group; }
  __device__ size_t Vector(uint32_t i) const {
    const uint32_t query = first + i;
    return size_t{query / a.group} * a.heads + kv_head * a.group + query % a.group;
  }
  __device__ SeenTokens Seen(uint32_t i) const {
    const uint32_t hi = a.first_token + min((first + i) / a.group, a.rows - 1) + 1;
    return {a.window != 0 && hi > a.window ? hi - a.window : 0, hi};
  }
};

// The tiles of at most kAttentionKeys tokens that queries of a block see, part after part.
class KeyTiles {
 public:
  __device__ KeyTiles(const AttentionArgs& a, SeenTokens seen) : a_(a), seen_(seen) { Enter(); }

  __device__ uint32_t Count() const {
    uint32_t count = 0;
    for (uint32_t p = 0; p < a_.part_count; ++p) {
      const uint32_t lo = max(a_.parts[p].lo, seen_.lo), hi = min(a_.parts[p].hi, seen_.hi);
      if (lo < hi) count += (hi - lo + kAttentionKeys - 1) / kAttentionKeys;
    }
    return count;
  }

  // The present tile: tokens [lo(), hi()) of part().
  __device__ const AttentionPart& part() const { return a_.parts[part_]; }
  __device__ uint32_t lo() const { return lo_; }
  __device__ uint32_t hi() const { return min(lo_ + kAttentionKeys, end_); }
  // To the next one; there is one.
  __device__ void Advance() {
    lo_ += kAttentionKeys;
    if (lo_ < end_) return;
    ++part_;
    Enter();
  }
  __device__ void Skip(uint32_t tiles) {
    for (;;) {
      const uint32_t here =
          part_ < a_.part_count ? (end_ - lo_ + kAttentionKeys - 1) / kAttentionKeys : tiles + 1;
      if (tiles < here) break;
      tiles -= here;
      ++part_;
      Enter();
    }
    lo_ += tiles * kAttentionKeys;
  }

 private:
  // To the first part from here that has visible tokens, if there is one.
  __device__ void Enter() {
    for (; part_ < a_.part_count; ++part_) {
      lo_ = max(a_.parts[part_].lo, seen_.lo);
      end_ = min(a_.parts[part_].hi, seen_.hi);
      if (lo_ < end_) return;
    }
  }

  const AttentionArgs& a_;
  const SeenTokens seen_;
  uint32_t part_ = 0, lo_ = 0, end_ = 0;
};

template <typename Tile>
__device__ void FetchKeys(const KeyTiles& tiles, uint32_t kv_head, char* k_shared) {
  const AttentionPart& part = tiles.part();
  const size_t at = kv_head * part.head_stride +
                    size_t{tiles.lo() - part.lo} * Tile::kVectorBytes;
  FetchVectors<Tile>(part.k + at, part.v + at, tiles.hi() - tiles.lo(), k_shared);
}

// Grid: query tiles, KV heads, splits of each member.
template <typename T, typename Tile>
__device__ void AttendTile(const AttentionArgs& a, char* shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16 * Tile::kRowTiles;
  // The last queries see the most: they come first.
  const uint32_t first = (gridDim.x - 1 - blockIdx.x) * Tile::kQueries;
  const uint32_t kv_head = blockIdx.y, split = blockIdx.z % a.splits;
  const GroupQueries group{a, kv_head, first};
  char* const keys = shared + Tile::kQueries * Tile::kVectorBytes;

  KeyTiles tiles(a, {group.Seen(0).lo, group.Seen(Tile::kQueries - 1).hi});
  const uint32_t count = tiles.Count();
  const auto share = [&](uint32_t s) {
    return static_cast<uint32_t>(static_cast<uint64_t>(count) * s / a.splits);
  };
  const uint32_t steps = share(split + 1) - share(split);
  tiles.Skip(share(split));

  StoreQueries<T, Tile>(group, a.q, shared);
  if (steps > 0) FetchKeys<Tile>(tiles, kv_head, keys);
  EndCopyGroup();

  // Of this warp's queries: what any of them sees, and what all of them see.
  const bool works = group.Has(warp_row);
  const SeenTokens low = group.Seen(warp_row),
                   high = group.Seen(warp_row + 16 * Tile::kRowTiles - 1);
  const char* const queries = shared + warp_row * Tile::kVectorBytes;
  WarpState<T, Tile> state(lane);
  for (uint32_t step = 0; step < steps; ++step) {
    const uint32_t lo = tiles.lo(), hi = tiles.hi();
    char* const k = keys + step % 2 * 2 * Tile::kKvBytes;
    if (step + 1 < steps) {
      tiles.Advance();
      FetchKeys<Tile>(tiles, kv_head, keys + (step + 1) % 2 * 2 * Tile::kKvBytes);
    }
    EndCopyGroup();
    WaitForCopies<1>();
    __syncthreads();
    if (works && lo < high.hi && hi > low.lo) {
      float s[Tile::kRowTiles][Tile::kKeys / 8][4];
      // Else all offsets are computed once, kept, and push sums out of the registers.
      Forget(state.by_rows.flip);
      Forget(state.by_pairs.flip);
      state.Score(queries, k, s);
      if (lo < high.lo || hi > low.hi || hi - lo < kAttentionKeys) {
        WarpState<T, Tile>::Mask(group, warp_row, lo, hi, lane, s);
      }
      state.Weigh(a.scale_log2, s);
      state.AddValues(k + Tile::kKvBytes, s);
    }
    __syncthreads();  // before the next fetch overwrites this stage
  }
  if (!works) return;
  const size_t vectors = size_t{a.members} * a.rows * a.heads;
  state.Finish(group, warp_row, lane, a.o + split * vectors * Tile::kHeadDim,
               a.lse + split * vectors);
}

}  // namespace quarry::cuda

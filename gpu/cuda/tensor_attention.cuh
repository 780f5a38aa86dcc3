// Attention by tensor instructions, one block of threads for a tile of queries of one KV head:
// FlashAttention-2's order (arXiv 2307.08691). A warp owns 16 or 32 queries and walks all key
// tiles of the block; K and V of the next tile are on their way while one is in work.
//
// The group's query heads share K and V, so they are rows of one tile: a decode step is a tile
// with few rows, whose keys are split over blocks, and a prefill a grid of full ones.
//
// Who includes this has included the operations of a warp before: warp_ops.cuh, or a test's
// imitation of them for the host.
#pragma once

#include "gpu/cuda/attention_args.h"

namespace quarry::cuda {

template <int kHeadDimT, int kRowTilesT>
struct TensorTile {
  static constexpr int kHeadDim = kHeadDimT;
  static constexpr int kRowTiles = kRowTilesT;  // 16 queries each, of one warp
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQueries = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = static_cast<int>(kAttentionKeys);
  static constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, in a vector
  static constexpr int kVectorBytes = kHeadDim * 2;
  static constexpr int kKvBytes = kKeys * kVectorBytes;
  // Queries, then two stages of K and V. At head_dim 128 and two row tiles 96 KiB: one block per
  // multiprocessor of sm_86 and sm_89 (99 KiB), two of sm_90.
  static constexpr int kSharedBytes = kQueries * kVectorBytes + 4 * kKvBytes;

  static_assert(kQueries == AttentionQueries(kRowTiles));
  static_assert(kKeys * kChunks % kThreads == 0);

  // Where a chunk of a vector lies: chunks change places within a row, so that the eight rows that
  // one matrix load reads at the same chunk meet all 32 banks. Vectors of 128 and 256 bytes begin
  // at the same bank, those of 192 at one of two.
  static __device__ int Swizzle(int row) { return kHeadDim == 96 ? row / 2 % 4 : row % 8; }
  static __device__ int Offset(int row, int chunk) {
    return row * kVectorBytes + (chunk ^ Swizzle(row)) * 16;
  }
};

// What a lane names for matrix loads: chunk 2 i or 2 i + 1 of a row, for any i. Rows that are a
// multiple of 8 farther have the same swizzle.
template <typename Tile>
struct LaneChunks {
  int row_bytes;
  int flip;
  __device__ LaneChunks(int row, int odd)
      : row_bytes(row * Tile::kVectorBytes), flip((odd ^ Tile::Swizzle(row)) * 16) {}
  __device__ int At(int i, int farther) const {
    return row_bytes + farther * Tile::kVectorBytes + (32 * i ^ flip);
  }
};

// Tokens that a query sees.
struct SeenTokens {
  uint32_t lo, hi;
};

__device__ inline SeenTokens SeenBy(const AttentionArgs& a, uint32_t query) {
  const uint32_t hi = a.first_token + min(query / a.group, a.rows - 1) + 1;
  return {a.window != 0 && hi > a.window ? hi - a.window : 0, hi};
}

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

// Queries [first, first + kQueries) of a KV head, rounded, to shared memory. Zeros behind the last.
template <typename T, typename Tile>
__device__ void StoreQueries(const AttentionArgs& a, uint32_t kv_head, uint32_t first,
                             char* shared) {
  const uint32_t queries = a.rows * a.group;
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kQueries * Tile::kChunks;
       i += Tile::kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const uint32_t query = first + row;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (query < queries) {
      const size_t vector =
          size_t{query / a.group} * a.heads + kv_head * a.group + query % a.group;
      const float4* from =
          reinterpret_cast<const float4*>(a.q + vector * Tile::kHeadDim + chunk * 8);
      const float4 x = from[0], y = from[1];
      packed = make_uint4(T::Pack(x.x, x.y), T::Pack(x.z, x.w), T::Pack(y.x, y.y),
                          T::Pack(y.z, y.w));
    }
    *reinterpret_cast<uint4*>(shared + Tile::Offset(row, chunk)) = packed;
  }
}

// Sets off the copies of a tile's K and V; vectors behind its end become zeros.
template <typename Tile>
__device__ void FetchKeys(const KeyTiles& tiles, uint32_t kv_head, char* k_shared) {
  const AttentionPart& part = tiles.part();
  const size_t at = kv_head * part.head_stride +
                    size_t{tiles.lo() - part.lo} * Tile::kVectorBytes;
  const uint32_t bytes = (tiles.hi() - tiles.lo()) * Tile::kVectorBytes;
  int thread = static_cast<int>(threadIdx.x);
  Forget(thread);  // the tile's offsets are as cheap to compute as to keep
#pragma unroll
  for (int i = 0; i < Tile::kKeys * Tile::kChunks / Tile::kThreads; ++i) {
    const uint32_t piece = i * Tile::kThreads + static_cast<uint32_t>(thread);
    const int row = piece / Tile::kChunks, chunk = piece % Tile::kChunks;
    const bool exists = piece * 16 < bytes;
    // What does not exist is not read, but its address is one that could be.
    const size_t from = at + (exists ? piece * 16 : 0);
    char* to = k_shared + Tile::Offset(row, chunk);
    CopyLater(to, part.k + from, exists);
    CopyLater(to + Tile::kKvBytes, part.v + from, exists);
  }
}

// Softmax attention of a warp's queries over the tiles so far. Of the queries' product rows, a
// lane has rows lane / 4 and lane / 4 + 8 of each row tile ("halves").
template <typename T, typename Tile>
struct WarpState {
  static constexpr int kRowTiles = Tile::kRowTiles;
  static constexpr int kDimTiles = Tile::kHeadDim / 8;
  static constexpr int kKeyTiles = Tile::kKeys / 8;

  // Lanes 0 to 15 name the even chunks of 16 rows, the others the odd ones: queries and values.
  // Of keys, each eight lanes: even and odd chunks of 8 rows, then of the next 8.
  LaneChunks<Tile> by_rows, by_pairs;
  float acc[kRowTiles][kDimTiles][4];
  float max_log2[kRowTiles][2];  // of scores times log2(e); -infinity while nothing was seen
  float sum[kRowTiles][2];       // this lane's columns only

  __device__ explicit WarpState(int lane)
      : by_rows(lane % 16, lane / 16), by_pairs(lane % 8 + lane / 16 * 8, lane / 8 % 2) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max_log2[m][half] = -INFINITY;
        sum[m][half] = 0.0f;
      }
    }
  }

  // s = queries * keys^T. q: the warp's first query.
  __device__ void Score(const char* q, const char* k, float s[kRowTiles][kKeyTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (int d = 0; d < Tile::kHeadDim / 16; ++d) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        LoadMatrices(a[m], q + by_rows.At(d, 16 * m));
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        LoadMatrices(b, k + by_pairs.At(d, 8 * n));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          T::Multiply(s[m][n], a[m], b[0], b[1]);
          T::Multiply(s[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Scores of tokens that a query does not see become -infinity; the tile has tokens [lo, hi).
  static __device__ void Mask(const AttentionArgs& a, uint32_t first_query, uint32_t lo,
                              uint32_t hi, int lane, float s[kRowTiles][kKeyTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const SeenTokens seen = SeenBy(a, first_query + 16 * m + 8 * half + lane / 4);
        const uint32_t from = max(lo, seen.lo), to = min(hi, seen.hi);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const uint32_t token = lo + 8 * n + 2 * (lane % 4) + e;
            if (token < from || token >= to) s[m][n][2 * half + e] = -INFINITY;
          }
        }
      }
    }
  }

  // s becomes its weights, 2^(s scale - maximum); what was summed before is scaled to that maximum.
  __device__ void Weigh(float scale_log2, float s[kRowTiles][kKeyTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = s[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        const float before = max_log2[m][half];
        const float now = fmaxf(before, QuadMax(largest) * scale_log2);
        // Nothing seen yet: weights are 2^(-infinity - 0).
        const float shift = now == -INFINITY ? 0.0f : now;
        const float shrink = Exp2(before - shift);
        max_log2[m][half] = now;
        float total = sum[m][half] * shrink;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[m][n][e] = Exp2(fmaf(s[m][n][e], scale_log2, -shift));
            total += s[m][n][e];
          }
        }
        sum[m][half] = total;
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n) {
          acc[m][n][2 * half] *= shrink;
          acc[m][n][2 * half + 1] *= shrink;
        }
      }
    }
  }

  // acc += weights * values. A lane's products of keys are the operand of the next product as
  // they lie: columns 2 * (lane % 4) and the next of two key tiles.
  __device__ void AddValues(const char* v, const float s[kRowTiles][kKeyTiles][4]) {
#pragma unroll
    for (int key = 0; key < Tile::kKeys / 16; ++key) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = s[m][2 * key + i / 2] + 2 * (i % 2);
          a[m][i] = T::Pack(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kDimTiles; n += 2) {
        uint32_t b[4];
        LoadTransposed(b, v + by_rows.At(n / 2, 16 * key));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          T::Multiply(acc[m][n], a[m], b[0], b[1]);
          T::Multiply(acc[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Writes o and lse of queries [first_query, ...) of a KV head.
  __device__ void Finish(const AttentionArgs& a, uint32_t kv_head, uint32_t first_query, int lane,
                         float* o, float* lse) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = QuadSum(sum[m][half]);
        const uint32_t query = first_query + 16 * m + 8 * half + lane / 4;
        if (query >= a.rows * a.group) continue;
        const size_t vector =
            size_t{query / a.group} * a.heads + kv_head * a.group + query % a.group;
        const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
        float* to = o + vector * Tile::kHeadDim + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n) {
          *reinterpret_cast<float2*>(to + 8 * n) = make_float2(
              acc[m][n][2 * half] * inverse, acc[m][n][2 * half + 1] * inverse);
        }
        if (lane % 4 == 0) {
          constexpr float kLn2 = 0.693147180559945f;
          lse[vector] = total > 0.0f ? max_log2[m][half] * kLn2 + logf(total) : -INFINITY;
        }
      }
    }
  }
};

// Grid: query tiles, KV heads, splits.
template <typename T, typename Tile>
__device__ void AttendTile(const AttentionArgs& a, char* shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16 * Tile::kRowTiles;
  // The last queries see the most: they come first.
  const uint32_t first = (gridDim.x - 1 - blockIdx.x) * Tile::kQueries;
  const uint32_t kv_head = blockIdx.y, split = blockIdx.z;
  char* const keys = shared + Tile::kQueries * Tile::kVectorBytes;

  KeyTiles tiles(a, {SeenBy(a, first).lo, SeenBy(a, first + Tile::kQueries - 1).hi});
  const uint32_t count = tiles.Count();
  const auto share = [&](uint32_t s) {
    return static_cast<uint32_t>(static_cast<uint64_t>(count) * s / a.splits);
  };
  const uint32_t steps = share(split + 1) - share(split);
  tiles.Skip(share(split));

  StoreQueries<T, Tile>(a, kv_head, first, shared);
  if (steps > 0) FetchKeys<Tile>(tiles, kv_head, keys);
  EndCopyGroup();

  // Of this warp's queries: what any of them sees, and what all of them see.
  const uint32_t first_query = first + warp_row;
  const bool works = first_query < a.rows * a.group;
  const SeenTokens low = SeenBy(a, first_query),
                   high = SeenBy(a, first_query + 16 * Tile::kRowTiles - 1);
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
        WarpState<T, Tile>::Mask(a, first_query, lo, hi, lane, s);
      }
      state.Weigh(a.scale_log2, s);
      state.AddValues(k + Tile::kKvBytes, s);
    }
    __syncthreads();  // before the next fetch overwrites this stage
  }
  if (!works) return;
  const size_t vectors = size_t{a.rows} * a.heads;
  state.Finish(a, kv_head, first_query, lane, a.o + split * vectors * Tile::kHeadDim,
               a.lse + split * vectors);
}

}  // namespace quarry::cuda

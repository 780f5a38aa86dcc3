// What the tensor kernels share: queries and keys as tiles in shared memory, and the softmax
// attention of a warp's queries over them, in FlashAttention-2's order (arXiv 2307.08691).
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

// Queries of a block of threads, rounded, to shared memory. Zeros where there is none. `Queries`
// says of query i of the block: Has(i), Vector(i), its place among the vectors of q and o, and
// Seen(i), its tokens.
template <typename T, typename Tile, typename Queries>
__device__ void StoreQueries(const Queries& queries, const float* q, char* shared) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kQueries * Tile::kChunks;
       i += Tile::kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (queries.Has(row)) {
      const float4* from =
          reinterpret_cast<const float4*>(q + queries.Vector(row) * Tile::kHeadDim + chunk * 8);
      const float4 x = from[0], y = from[1];
      packed =
          make_uint4(T::Pack(x.x, x.y), T::Pack(x.z, x.w), T::Pack(y.x, y.y), T::Pack(y.z, y.w));
    }
    *reinterpret_cast<uint4*>(shared + Tile::Offset(row, chunk)) = packed;
  }
}

// Sets off the copies of a tile's `keys` vectors of K and, if wanted, V; vectors behind them become
// zeros.
template <typename Tile, bool kValues = true>
__device__ void FetchVectors(const std::byte* k, const std::byte* v, uint32_t keys,
                             char* k_shared) {
  const uint32_t bytes = keys * Tile::kVectorBytes;
  int thread = static_cast<int>(threadIdx.x);
  Forget(thread);  // the tile's offsets are as cheap to compute as to keep
#pragma unroll
  for (int i = 0; i < Tile::kKeys * Tile::kChunks / Tile::kThreads; ++i) {
    const uint32_t piece = i * Tile::kThreads + static_cast<uint32_t>(thread);
    const int row = piece / Tile::kChunks, chunk = piece % Tile::kChunks;
    const bool exists = piece * 16 < bytes;
    // What does not exist is not read, but its address is one that could be.
    const size_t from = exists ? piece * 16 : 0;
    char* to = k_shared + Tile::Offset(row, chunk);
    CopyLater(to, k + from, exists);
    if constexpr (kValues) CopyLater(to + Tile::kKvBytes, v + from, exists);
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

  // Scores of tokens that a query does not see become -infinity; the tile has tokens [lo, hi), and
  // the warp's first query is the block's `first`.
  template <typename Queries>
  static __device__ void Mask(const Queries& queries, uint32_t first, uint32_t lo, uint32_t hi,
                              int lane, float s[kRowTiles][kKeyTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const SeenTokens seen = queries.Seen(first + 16 * m + 8 * half + lane / 4);
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

  // Scores of keys whose bit is not set become -infinity.
  static __device__ void Mask(uint64_t keys, int lane, float s[kRowTiles][kKeyTiles][4]) {
    const uint64_t mine = keys >> (2 * (lane % 4));
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if ((mine >> (8 * n + e) & 1) != 0) continue;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          s[m][n][e] = -INFINITY;
          s[m][n][2 + e] = -INFINITY;
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

  // Writes o and lse of the block's queries from `first` on.
  template <typename Queries>
  __device__ void Finish(const Queries& queries, uint32_t first, int lane, float* o,
                         float* lse) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = QuadSum(sum[m][half]);
        const uint32_t query = first + 16 * m + 8 * half + lane / 4;
        if (!queries.Has(query)) continue;
        const size_t vector = queries.Vector(query);
        const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
        float* to = o + vector * Tile::kHeadDim + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n) {
          *reinterpret_cast<float2*>(to + 8 * n) =
              make_float2(acc[m][n][2 * half] * inverse, acc[m][n][2 * half + 1] * inverse);
        }
        if (lane % 4 == 0) {
          constexpr float kLn2 = 0.693147180559945f;
          lse[vector] = total > 0.0f ? max_log2[m][half] * kLn2 + logf(total) : -INFINITY;
        }
      }
    }
  }
};

}  // namespace quarry::cuda

// The last queries' attention of all tokens, summed by key and by distance. Scores are made twice
// rather than stored: they would be 64 floats for every key of a head.
#pragma once

#include "gpu/cuda/line_args.h"
#include "gpu/cuda/score_steps.cuh"
#include "gpu/cuda/score_sum.cuh"

namespace quarry::cuda {

// Row tile m of each warp is of line m of those that a block of threads takes together.
template <int kHeadDim>
struct LastTile : TensorTile<kHeadDim, kLinesTogether> {
  using Base = TensorTile<kHeadDim, kLinesTogether>;
  static_assert(kLastQueries == 16 * Base::kWarps && Base::kKeys == kKeyTile);
  // Queries, two stages of keys, and of the sums alone the weights of a tile.
  static constexpr int kMeasureBytes = Base::kQueries * Base::kVectorBytes + 2 * Base::kKvBytes;
  static constexpr int kWeights = static_cast<int>(kLastQueries * kKeyTile);  // of a line
  static constexpr int kSumBytes = kMeasureBytes + Base::kRowTiles * kWeights * 4;

  // Where a query's weight of a key lies among a line's: lanes write eight keys of four queries at
  // a time, and read keys of one query in any order.
  static __device__ int Weight(int query, int key) {
    return query * static_cast<int>(kKeyTile) + (key ^ query % 4 * 8);
  }
};

// The queries of a block's lines.
template <typename Tile>
struct LinesQueries {
  const LastQueryArgs& a;
  uint32_t heads[Tile::kRowTiles];

  __device__ LinesQueries(const LastQueryArgs& args, uint32_t first_line) : a(args) {
    for (int m = 0; m < Tile::kRowTiles; ++m) heads[m] = a.lines[first_line + m].head;
  }
  __device__ uint32_t Head(uint32_t i) const { return heads[i / 16 % Tile::kRowTiles]; }
  __device__ uint32_t Query(uint32_t i) const { return i / (16 * Tile::kRowTiles) * 16 + i % 16; }
  __device__ bool Has(uint32_t i) const { return Head(i) != kNoHead && Query(i) < a.queries; }
  __device__ size_t Vector(uint32_t i) const { return size_t{Query(i)} * a.heads + Head(i); }
};

// Scores of the lines of blockIdx.y with the key tiles of blockIdx.x's stretch, and with `behind`
// more: f(first key, scores times log2(e)), tile by tile, scores of keys that a query
// does not see being -infinity. All threads meet between two calls.
template <typename T, typename Tile, typename F>
__device__ void ScoreStretch(const LastQueryArgs& a, uint32_t behind, char* shared, const F& f) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const LinesQueries<Tile> queries(a, blockIdx.y * Tile::kRowTiles);
  const std::byte* const k = a.k + queries.heads[0] / a.group * a.head_stride;
  const uint32_t begin = blockIdx.x * (kStretchKeys / kKeyTile);
  const uint32_t whole = min(begin + kStretchKeys / kKeyTile, (a.tokens + kKeyTile - 1) / kKeyTile);
  const uint32_t first_token = a.tokens - a.queries;
  const auto fetch = [&](uint32_t step, char* stage) {
    // There may be no keys behind the stretch.
    const uint32_t from = min(step * kKeyTile, a.tokens);
    FetchVectors<Tile, false>(k + (from < a.tokens ? size_t{from} * Tile::kVectorBytes : 0),
                              nullptr, min(from + kKeyTile, a.tokens) - from, stage);
  };
  const auto mask = [&](uint32_t step, auto& s) {
    const uint32_t lo = step * kKeyTile;
    const bool sees_all = lo + kKeyTile <= first_token + 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t seen = first_token + warp * 16 + 8 * half + lane / 4 + 1;
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool sees = sees_all || lo + 8 * n + 2 * (lane % 4) + e < seen;
#pragma unroll
          for (int m = 0; m < Tile::kRowTiles; ++m) {
            float& score = s[m][n][2 * half + e];
            score = sees ? score * a.scale_log2 : -INFINITY;
          }
        }
      }
    }
    f(lo, s);
    __syncthreads();
  };
  ScoreSteps<T, Tile>(queries, a.q, shared, begin, whole + behind, fetch, mask);
}

// Writes parts. Grid: stretches, pairs of lines.
template <typename T, typename Tile>
__device__ void MeasureLastQueries(const LastQueryArgs& a, char* shared) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  // This lane's keys only.
  ScoreSum sums[Tile::kRowTiles][2];
  ScoreStretch<T, Tile>(a, 0, shared, [&](uint32_t, const auto& s) {
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ScoreSum& mine = sums[m][half];
        float now = mine.largest;
#pragma unroll
        for (int n = 0; n < Tile::kKeys / 8; ++n) {
          now = fmaxf(now, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        // Nothing seen yet: weights are 2^(-infinity - 0).
        const float shift = now == -INFINITY ? 0.0f : now;
        float sum = mine.sum * Exp2(mine.largest - shift);
#pragma unroll
        for (int n = 0; n < Tile::kKeys / 8; ++n) {
          sum += Exp2(s[m][n][2 * half] - shift) + Exp2(s[m][n][2 * half + 1] - shift);
        }
        mine.largest = now;
        mine.sum = sum;
      }
    }
  });
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const ScoreSum& mine = sums[m][half];
      const float largest = QuadMax(mine.largest);
      const float shift = largest == -INFINITY ? 0.0f : largest;
      const float sum = QuadSum(mine.sum * Exp2(mine.largest - shift));
      const size_t line = blockIdx.y * Tile::kRowTiles + m;
      const int query = warp * 16 + 8 * half + lane / 4;
      if (lane % 4 != 0) continue;
      *reinterpret_cast<float2*>(a.parts + 2 * ((line * gridDim.x + blockIdx.x) * kLastQueries +
                                                query)) = make_float2(largest, sum);
    }
  }
}

// From parts to shifts; infinity where there is no query. Grid: lines. `threads`: a multiple of
// kLastQueries; shared: [threads].
__device__ inline void JoinMeasures(const LastQueryArgs& a, uint32_t threads, ScoreSum* shared) {
  const uint32_t query = threadIdx.x % kLastQueries;
  const uint32_t stretches = (a.tokens + kStretchKeys - 1) / kStretchKeys;
  const float2* const parts =
      reinterpret_cast<const float2*>(a.parts) + size_t{blockIdx.x} * stretches * kLastQueries;
  ScoreSum mine;
#pragma unroll 4
  for (uint32_t i = threadIdx.x / kLastQueries; i < stretches; i += threads / kLastQueries) {
    const float2 part = parts[i * kLastQueries + query];
    mine.Add({part.x, part.y});
  }
  shared[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x >= kLastQueries) return;
  for (uint32_t i = query + kLastQueries; i < threads; i += kLastQueries) mine.Add(shared[i]);
  const bool exists = a.lines[blockIdx.x].head != kNoHead && query < a.queries;
  a.shifts[blockIdx.x * kLastQueries + query] = exists ? mine.Log2() : INFINITY;
}

// The sums of a line by distance and by key, from a tile's weights in shared memory, [query][key]:
// half of the threads follow diagonals, the others columns, 64 weights each.
template <typename Tile>
class LineSummer {
 public:
  __device__ LineSummer(const LastQueryArgs& a, uint32_t line)
      : a_(a), sums_(a.sums + size_t{line} * 3 * a.width), mine_(threadIdx.x % kKeyTile) {}

  // The tile that begins at key lo; `own`: [begin, end) of the block's stretch.
  __device__ void Add(const float* weights, uint32_t lo, TokenRange own) {
    if (threadIdx.x < kKeyTile) {
      AddDiagonals(weights, static_cast<int>(lo), own);
    } else if (lo < own.hi && lo + mine_ < a_.tokens) {
      AddColumns(weights, lo);
    }
  }

 private:
  static constexpr int kTile = static_cast<int>(kKeyTile);
  static_assert(kLastQueries == kKeyTile && Tile::kThreads == 2 * kKeyTile);

  // A diagonal is that of keys d + i of queries i. Those that end in this tile have d = lo - mine_,
  // and began in the one before unless mine_ is 0; those that begin have d = lo + 64 - mine_.
  __device__ void AddDiagonals(const float* weights, int lo, TokenRange own) {
    const int mine = static_cast<int>(mine_);
    float ends = begun_, begins = 0.0f;
#pragma unroll 16
    for (int i = 0; i < kTile; ++i) {
      const float x = weights[Tile::Weight(i, (i - mine) & (kTile - 1))];
      if (i < mine) {
        begins += x;
      } else {
        ends += x;
      }
    }
    begun_ = begins;
    const int d = lo - mine, tokens = static_cast<int>(a_.tokens);
    const int distance = tokens - static_cast<int>(a_.queries) - d;
    // What began before the first stretch is its own, too.
    const bool is_own =
        d < static_cast<int>(own.hi) && (own.lo == 0 || d >= static_cast<int>(own.lo));
    if (is_own && distance >= 0 && distance < tokens) sums_[2 * size_t{a_.width} + distance] = ends;
  }

  __device__ void AddColumns(const float* weights, uint32_t lo) {
    float before = 0.0f, behind = 0.0f;
#pragma unroll 16
    for (int i = 0; i < kTile; ++i) {
      const float x = weights[Tile::Weight(i, static_cast<int>(mine_))];
      if (i < static_cast<int>(a_.split)) {
        before += x;
      } else {
        behind += x;
      }
    }
    sums_[lo + mine_] = before;
    if (a_.split < a_.queries) sums_[size_t{a_.width} + lo + mine_] = behind;
  }

  const LastQueryArgs& a_;
  float* const sums_;
  const uint32_t mine_;
  float begun_ = 0.0f;  // of the diagonal that ends in the next tile
};

// Writes sums, by shifts. Grid: stretches, pairs of lines.
template <typename T, typename Tile>
__device__ void SumLastQueries(const LastQueryArgs& a, char* shared) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  float* const weights = reinterpret_cast<float*>(shared + Tile::kMeasureBytes);
  const uint32_t first_line = blockIdx.y * Tile::kRowTiles, begin = blockIdx.x * kStretchKeys;
  const TokenRange own{begin, begin + kStretchKeys};
  const int row = warp * 16 + lane / 4;
  float shifts[Tile::kRowTiles][2];
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
    for (int half = 0; half < 2; ++half) {
      shifts[m][half] = a.shifts[(first_line + m) * kLastQueries + row + 8 * half];
    }
  }
  static_assert(Tile::kRowTiles == 2);
  LineSummer<Tile> summers[2] = {{a, first_line}, {a, first_line + 1}};
  // One tile behind the stretch: diagonals that begin in its last tile end there.
  ScoreStretch<T, Tile>(a, 1, shared, [&](uint32_t lo, const auto& s) {
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to = weights + m * Tile::kWeights;
#pragma unroll
        for (int n = 0; n < Tile::kKeys / 8; ++n) {
          const int at = Tile::Weight(row + 8 * half, 8 * n + 2 * (lane % 4));
          *reinterpret_cast<float2*>(to + at) =
              make_float2(Exp2(s[m][n][2 * half] - shifts[m][half]),
                          Exp2(s[m][n][2 * half + 1] - shifts[m][half]));
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) summers[m].Add(weights + m * Tile::kWeights, lo, own);
  });
}

}  // namespace quarry::cuda

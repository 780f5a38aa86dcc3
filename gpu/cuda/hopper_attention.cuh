// Attention over a SparseIndex by Hopper's matrix instructions, which read keys and values where
// the copy engine has put them: in the manner of FlashAttention-3 (arXiv 2407.08608).
//
// A block of threads stays and attends one row tile of a head after the other. Two of its three
// warpgroups attend 64 rows each: one of them multiplies while the other computes weights, and
// while the weights of a step are computed the values of the one before are multiplied by theirs.
// Of the third one warp fetches keys and values, two tiles a step, into a ring of slots in the
// order in which they are used; the others round the queries of the item that comes next.
#pragma once

#include "gpu/cuda/hopper_fetch.cuh"
#include "gpu/cuda/hopper_queries.cuh"

namespace quarry::cuda {

// One of the two warpgroups that attend.
template <typename T, typename Tile>
class HopperAttend {
 public:
  __device__ HopperAttend(const SparseArgs& a, HopperShared<Tile>* shared, int warpgroup)
      : a_(a),
        shared_(*shared),
        warpgroup_(warpgroup),
        thread_(static_cast<int>(threadIdx.x) % Tile::kWarpgroup),
        lane_(thread_ % 32),
        row_(warpgroup * Tile::kRows + thread_ / 32 * 16 + lane_ / 4) {}

  __device__ void Run() {
    if (warpgroup_ == 1) PassTurn();
    for (ItemsOfBlock items(a_); !items.Done(); items.Advance()) {
      Wait(&shared_.rounded[queries_.at], queries_.parity);
      const RowTileItem item(a_, shared_.items[queries_.at]);
      Attend(item, shared_.tiles[queries_.at]);
      Finish(item);
    }
    if (warpgroup_ == 0) TakeTurn();  // so that nobody's turn is left
  }

 private:
  using Place = RingPlace<Tile::kSlots>;
  static constexpr int kScores = Tile::kKeys / 2;  // of a thread
  static constexpr int kWeights = kScores / 2;     // two to a register
  static constexpr int kSums = Tile::kHeadDim / 2;
  // Numbers of a row that are made one at a time: a warp alone waits for each result.
  static constexpr int kChains = 4;
  static constexpr int kTurn = 1;  // barrier of threads, and the next

  // Only who has the turn sets off products.
  __device__ void TakeTurn() { WaitForThreads(kTurn + warpgroup_, 2 * Tile::kWarpgroup); }
  __device__ void PassTurn() { ArriveForThreads(kTurn + 1 - warpgroup_, 2 * Tile::kWarpgroup); }

  __device__ void Attend(const RowTileItem& item, uint32_t tiles) {
    const uint32_t steps = (tiles + 1) / 2;
    float s[kScores];
    uint32_t p[kWeights];
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max_log2_[half] = -INFINITY;
      sum_[half] = 0.0f;
    }
    Place k = Next();
    Pin(s);
    FenceProducts();
    Score(k.at, s);
    EndProducts();
    WaitForProducts<0>();
    Pin(s);
    Weigh(item, k.at, s, shrink);
    Round(s, p);
    Place next = Next();  // the next step's keys; at last the values
    for (uint32_t step = 1; step < steps; ++step) {
      k = next;
      TakeTurn();
      Pin(s);
      FenceProducts();
      Score(k.at, s);
      EndProducts();
      const Place v = Next();
      Pin(acc_);
      FenceProducts();
      AddValues<0>(v.at, p, step > 1);
      AddValues<1>(v.at, p, true);
      EndProducts();
      PassTurn();
      WaitForProducts<1>();
      Pin(s);
      Weigh(item, k.at, s, shrink);
      Pin(s);
      // Nothing is moved across this loop: else the compiler would weigh behind the wait below, and
      // no products would be made meanwhile.
      next = Next();
      WaitForProducts<0>();
      Pin(acc_);
      Release(&shared_.empty[v.at]);
      // Mostly there was no larger score.
      if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) acc_[i] *= shrink[i / 2 % 2];
      }
      Round(s, p);
    }
    Release(&shared_.attended[queries_.at]);
    queries_.Advance();
    const Place v = next;
    Pin(acc_);
    FenceProducts();
    AddValues<0>(v.at, p, steps > 1);
    EndProducts();
    if (tiles % 2 == 0) {  // else there may be anything
      FenceProducts();
      AddValues<1>(v.at, p, true);
      EndProducts();
    }
    WaitForProducts<0>();
    Pin(acc_);
    Release(&shared_.empty[v.at]);
  }

  // The next slot, once it is full.
  __device__ Place Next() {
    const Place place = place_;
    Wait(&shared_.full[place.at], place.parity);
    place_.Advance();
    return place;
  }
  // This warp, all of its lanes, is done with what the barrier is of.
  __device__ void Release(Barrier* barrier) {
    __syncwarp();
    if (lane_ == 0) Arrive(barrier);
  }

  // As matrix instructions find an operand: its first byte, a multiple of 16, and how far apart
  // groups of 8 rows, and panels, are.
  static __device__ uint64_t Describe(const char* operand) {
    constexpr uint64_t kSwizzle = Tile::kRowBytes == 128 ? 1 : 2;
    constexpr uint64_t kFixed = kSwizzle << 62 | uint64_t{8 * Tile::kRowBytes / 16} << 32 |
                                uint64_t{Tile::kPanelBytes / 16} << 16;
    return kFixed | (SharedAddress(operand) & 0x3ffff) >> 4;
  }

  __device__ void Score(int slot, float (&s)[kScores]) {
    const uint64_t q =
        Describe(shared_.queries[queries_.at] + warpgroup_ * Tile::kRows * Tile::kRowBytes);
    const uint64_t k = Describe(shared_.slots[slot]);
#pragma unroll
    for (int d = 0; d < Tile::kHeadDim / 16; ++d) {
      constexpr int kPerPanel = Tile::kPanelDims / 16;
      const int at = d / kPerPanel * Tile::kPanelBytes + d % kPerPanel * 32;
      MultiplyShared<T>(s, q + at / 16, k + at / 16, d > 0);
    }
  }
  // Of a step's tile.
  template <int kTile>
  __device__ void AddValues(int slot, const uint32_t (&p)[kWeights], bool adds) {
    constexpr int kSteps = static_cast<int>(kKeyTile) / 16;  // of an instruction
    const uint64_t v = Describe(shared_.slots[slot]);
#pragma unroll
    for (int key = kTile * kSteps; key < (kTile + 1) * kSteps; ++key) {
      MultiplyHeld<T>(acc_, p + 4 * key, v + key * Tile::kRowBytes, key > kTile * kSteps || adds);
    }
  }

  // Scores become weights, 2^(s scale - maximum), 0 of keys that a row does not see; what was
  // summed before is to be multiplied by `shrink`. Gives the slot of the keys back.
  __device__ void Weigh(const RowTileItem& item, int slot, float (&s)[kScores],
                        float (&shrink)[2]) {
    const TileKeys keys[2] = {shared_.keys[slot][0], shared_.keys[slot][1]};
    Release(&shared_.empty[slot]);
    const int token = static_cast<int>(item.rows.lo);
    const int first_row = token + warpgroup_ * Tile::kRows;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const bool all = keys[tile].exist == ~uint64_t{0} &&
                       keys[tile].first + static_cast<int>(kKeyTile) <= first_row + 1;
      if (all) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int seen = token + row_ + 8 * half + 1 - keys[tile].first;
        uint64_t mine = keys[tile].exist;
        if (seen < static_cast<int>(kKeyTile)) {
          mine = seen <= 0 ? 0 : mine & ((uint64_t{1} << seen) - 1);
        }
        mine >>= 2 * (lane_ % 4);
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const uint32_t bits = static_cast<uint32_t>(mine >> (32 * word));
#pragma unroll
          for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& score = s[4 * (8 * tile + 4 * word + n) + 2 * half + e];
              if ((bits >> (8 * n + e) & 1) == 0) score = -INFINITY;
            }
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most[kChains];
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        most[i] = fmaxf(s[4 * i + 2 * half], s[4 * i + 2 * half + 1]);
      }
#pragma unroll
      for (int i = kChains; i < kScores / 4; ++i) {
        float& largest = most[i % kChains];
        largest = fmaxf(largest, fmaxf(s[4 * i + 2 * half], s[4 * i + 2 * half + 1]));
      }
      const float largest = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
      const float before = max_log2_[half];
      const float now = fmaxf(before, QuadMax(largest) * a_.scale_log2);
      // Nothing seen yet: weights are 2^(-infinity - 0).
      const float shift = now == -INFINITY ? 0.0f : now;
      shrink[half] = Exp2(before - shift);
      max_log2_[half] = now;
      float total[kChains] = {sum_[half] * shrink[half]};
#pragma unroll
      for (int i = 0; i < kScores / 4; ++i) {
#pragma unroll
        for (int e = 4 * i + 2 * half; e < 4 * i + 2 * half + 2; ++e) {
          s[e] = Exp2(fmaf(s[e], a_.scale_log2, -shift));
          total[i % kChains] += s[e];
        }
      }
      sum_[half] = total[0] + total[1] + (total[2] + total[3]);
    }
  }

  // Products of keys are the operand of the next product as they lie.
  static __device__ void Round(const float (&s)[kScores], uint32_t (&p)[kWeights]) {
#pragma unroll
    for (int i = 0; i < kWeights; ++i) p[i] = T::Pack(s[2 * i], s[2 * i + 1]);
  }

  __device__ void Finish(const RowTileItem& item) {
    const bool odd = lane_ % 2 != 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = QuadSum(sum_[half]);
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
      const int row = row_ + 8 * half;
      const bool exists = row < item.Rows();
      const size_t vector = item.Vector(a_, exists ? row : 0);
      float* const to = a_.o + vector * Tile::kHeadDim + lane_ % 4 / 2 * 4 + odd * 8;
      // Neighbours swap, so that each has four dimensions behind one another.
#pragma unroll
      for (int i = 2 * half; i < kSums; i += 8) {
        const float x = acc_[i] * inverse, y = acc_[i + 1] * inverse;
        const float z = acc_[i + 4] * inverse, w = acc_[i + 5] * inverse;
        const float give_x = odd ? x : z, give_y = odd ? y : w;
        const float take_x = __shfl_xor_sync(0xffffffffu, give_x, 1);
        const float take_y = __shfl_xor_sync(0xffffffffu, give_y, 1);
        const float4 both =
            odd ? make_float4(take_x, take_y, z, w) : make_float4(x, y, take_x, take_y);
        if (exists) *reinterpret_cast<float4*>(to + 2 * (i - 2 * half)) = both;
      }
      if (exists && lane_ % 4 == 0) {
        constexpr float kLn2 = 0.693147180559945f;
        a_.lse[vector] = total > 0.0f ? max_log2_[half] * kLn2 + logf(total) : -INFINITY;
      }
    }
  }

  const SparseArgs& a_;
  HopperShared<Tile>& shared_;
  const int warpgroup_, thread_, lane_;
  const int row_;  // of the row tile, the thread's first; the other is 8 farther
  Place place_;
  RingPlace<2> queries_;
  float acc_[kSums];
  float max_log2_[2];  // of scores times log2(e); -infinity while nothing was seen
  float sum_[2];       // this thread's columns only
};

// Grid: any number of blocks.
template <typename T, typename Tile>
__device__ void AttendRowTiles(const HopperArgs& args, char* memory) {
  HopperShared<Tile>* const shared = reinterpret_cast<HopperShared<Tile>*>(memory);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Tile::kSlots; ++slot) {
      InitBarrier(&shared->full[slot], 1);
      InitBarrier(&shared->empty[slot], Tile::kAttendingWarps);
    }
    for (int item = 0; item < 2; ++item) {
      InitBarrier(&shared->rounded[item], Tile::kRounding);
      InitBarrier(&shared->attended[item], Tile::kAttendingWarps);
    }
    FenceBarriers();
  }
  __syncthreads();
  // Said so that the compiler knows that a warp's threads go one way.
  const int warpgroup =
      __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / Tile::kWarpgroup, 0);
  // The registers that a thread begins with are 168.
  if (warpgroup == 0) {
    GiveRegisters<88>();
    if (threadIdx.x < 32) {
      HopperFetch<Tile>(args, shared).Run();
    } else {
      HopperQueries<T, Tile>(args.sparse, shared).Run();
    }
  } else {
    TakeRegisters<208>();
    HopperAttend<T, Tile>(args.sparse, shared, warpgroup - 1).Run();
  }
}

}  // namespace quarry::cuda

// Queries on their way to Hopper's attention.
#pragma once

#include "gpu/cuda/hopper_tile.cuh"

namespace quarry::cuda {

// The warps that round queries. They are an item ahead of those that attend.
template <typename T, typename Tile>
class HopperQueries {
 public:
  __device__ HopperQueries(const SparseArgs& a, HopperShared<Tile>* shared)
      : a_(a), shared_(*shared), thread_(static_cast<int>(threadIdx.x) - 32) {}

  __device__ void Run() {
    RingPlace<2> place;
    ItemsOfBlock items(a_);
    uint32_t number = items.Number(), next = After(&items, number);
    for (bool more = true; more;) {
      const RowTileItem item(a_, number);
      const uint32_t tiles = item.KeyTiles(a_);
      more = next != number;
      if (more) Prefetch(RowTileItem(a_, next));
      number = next;
      next = After(&items, number);
      Wait(&shared_.attended[place.at], place.parity ^ 1);
      Round(item, shared_.queries[place.at]);
      shared_.items[place.at] = item.item;
      shared_.tiles[place.at] = tiles;
      FenceShared();
      Arrive(&shared_.rounded[place.at]);
      place.Advance();
    }
  }

 private:
  static constexpr int kPieces = Tile::kHeadDim / 4;  // of 16 bytes, of a query

  // The item behind the one that `items` is at; if there is none, `last`, the one there.
  static __device__ uint32_t After(ItemsOfBlock* items, uint32_t last) {
    items->Advance();
    return items->Done() ? last : items->Number();
  }
  __device__ const float4* Row(const RowTileItem& item, int row) const {
    return reinterpret_cast<const float4*>(a_.q) + item.Vector(a_, row) * kPieces;
  }
  __device__ void Prefetch(const RowTileItem& item) const {
    constexpr int kLine = 128 / sizeof(float4), kLines = kPieces / kLine;  // of the L2 cache
    static_assert(Tile::kRounding % kLines == 0);
    const float4* const from = Row(item, 0) + thread_ % kLines * kLine;
    const uint32_t row_pieces = a_.heads * kPieces;
    for (int row = thread_ / kLines; row < item.Rows(); row += Tile::kRounding / kLines) {
      PrefetchLine(from + size_t{row_pieces} * row);
    }
  }
  // Zeros where there is no query.
  __device__ void Round(const RowTileItem& item, char* to) const {
    constexpr int kAtATime = 11;  // that registers hold: 4 times in all at head_dim 128
    constexpr int kApart = Tile::kRounding / kPieces;  // rows
    static_assert(Tile::kRounding % kPieces == 0);
    const int piece = thread_ % kPieces;
    const float4* const from = Row(item, 0) + piece;
    const uint32_t row_pieces = a_.heads * kPieces;
    for (int first = thread_ / kPieces; first < static_cast<int>(kRowTile);
         first += kAtATime * kApart) {
      float4 x[kAtATime];
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        const int row = first + i * kApart;
        x[i] = row < item.Rows() ? from[size_t{row_pieces} * row] : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        const int row = first + i * kApart;
        if (row >= static_cast<int>(kRowTile)) break;
        *reinterpret_cast<uint2*>(to + Tile::Offset(row, piece / 2) + piece % 2 * 8) =
            make_uint2(T::Pack(x[i].x, x[i].y), T::Pack(x[i].z, x[i].w));
      }
    }
  }

  const SparseArgs& a_;
  HopperShared<Tile>& shared_;
  const int thread_;
};

}  // namespace quarry::cuda

// What the warps of Hopper's attention share: shared memory, and the items that a block attends.
#pragma once

#include "gpu/cuda/hopper_args.h"
#include "gpu/cuda/warpgroup_ops.cuh"
// After the operations that it uses.
#include "gpu/cuda/sparse_keys.cuh"

namespace quarry::cuda {

template <int kHeadDimT>
struct HopperTile : HopperBox<kHeadDimT> {
  using Box = HopperBox<kHeadDimT>;
  using Box::kPanelBytes, Box::kPanels, Box::kRowBytes;
  static constexpr int kHeadDim = kHeadDimT;
  static constexpr int kWarpgroup = 128;  // threads
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kAttendingWarps = 8;
  static constexpr int kRounding = kWarpgroup - 32;             // threads that round queries
  static constexpr int kRows = 64;                              // of a warpgroup
  static constexpr int kKeys = 2 * static_cast<int>(kKeyTile);  // of a step
  // Queries, keys and values lie in panels of [128][kRowBytes].
  static_assert(kKeys == kRowTile);
  static constexpr int kBytes = kPanels * kPanelBytes;  // of an item's queries, of a slot
  // For a step's keys or its values: what fits beside two items' queries, if that is of use.
  static constexpr int kSlots = kHeadDim == 128 ? 5 : 7;

  // Where the copy engine would put chunk i of 16 bytes of a row.
  static __device__ int Offset(int row, int i) {
    constexpr int kChunks = kRowBytes / 16;  // of a row in a panel: 8 or 4
    const int flip = kChunks == 8 ? row % 8 : row / 2 % 4;
    return i / kChunks * kPanelBytes + row * kRowBytes + (i % kChunks ^ flip) * 16;
  }
};

// Keys of a tile: bit i says that there is one, token first + i. Columns are before all rows. Of
// an item's last step there may be one tile only; of the other one's keys none exist.
struct TileKeys {
  uint64_t exist;
  int first;
};

template <typename Tile>
struct HopperShared {
  char queries[2][Tile::kBytes];
  char slots[Tile::kSlots][Tile::kBytes];
  TileKeys keys[Tile::kSlots][2];
  uint32_t items[2], tiles[2];  // whose queries these are, and its key tiles
  Barrier full[Tile::kSlots], empty[Tile::kSlots];
  Barrier rounded[2], attended[2];  // queries
};

// A place in a ring, and the parity of the phases that end there next.
template <int kPlaces>
struct RingPlace {
  int at = 0;
  uint32_t parity = 0;
  __device__ void Advance() {
    if (++at < kPlaces) return;
    at = 0;
    parity ^= 1;
  }
};

// A row tile of a head.
struct RowTileItem {
  uint32_t item, head, row_tile;
  TokenRange rows;

  __device__ RowTileItem(const SparseArgs& a, uint32_t number)
      : item(number), head(number / a.row_tiles), row_tile(number % a.row_tiles) {
    rows.lo = a.first_token + row_tile * kRowTile;
    rows.hi = min(rows.lo + kRowTile, a.first_token + a.rows);
  }
  __device__ uint32_t KeyTiles(const SparseArgs& a) const {
    return a.order != nullptr ? a.tiles[item] : TilesOfDense(rows);
  }
  __device__ int Rows() const { return static_cast<int>(rows.hi - rows.lo); }
  __device__ size_t Vector(const SparseArgs& a, int row) const {
    return size_t{rows.lo - a.first_token + row} * a.heads + head;
  }
};

// The items that a block attends: one of each round of the grid, from its beginning and from its
// end by turns, since items of a round get cheaper.
class ItemsOfBlock {
 public:
  __device__ explicit ItemsOfBlock(const SparseArgs& a) : a_(a) {}
  __device__ bool Done() const { return Place() >= a_.heads * a_.row_tiles; }
  __device__ uint32_t Number() const {
    const uint32_t place = Place();
    if (a_.order != nullptr) return a_.order[place];
    return place % a_.heads * a_.row_tiles + a_.row_tiles - 1 - place / a_.heads;
  }
  __device__ void Advance() { ++round_; }

 private:
  __device__ uint32_t Place() const {
    return round_ * gridDim.x + (round_ % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  }

  const SparseArgs& a_;
  uint32_t round_ = 0;
};

}  // namespace quarry::cuda

// Keys and values on their way to Hopper's attention.
#pragma once

#include "gpu/cuda/hopper_tile.cuh"

namespace quarry::cuda {

// The warp that fetches keys and values. What says where an item's lie is read while those of the
// one before are fetched.
template <typename Tile>
class HopperFetch {
 public:
  __device__ HopperFetch(const HopperArgs& args, HopperShared<Tile>* shared)
      : args_(args),
        a_(args.sparse),
        shared_(*shared),
        items_(args.sparse),
        lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    number_ = items_.Number();
    Item item = Prepare();
    for (bool more = true; more;) {
      more = !items_.Done();
      Item next = item;
      Fetch(item, more, next);
      item = next;
    }
  }

 private:
  static constexpr uint32_t kAll = 0xffffffffu;  // lanes

  // An item and where its keys lie.
  struct Item {
    uint32_t count, kv_head;  // key tiles
    uint32_t column_tiles, column_first;
    const uint64_t* masks;  // of column tiles
    uint64_t mask;          // of the lane's column tile, of 32
    SparseKeys tiles;
  };
  // Where the keys of a tile lie.
  struct Source {
    int key = 0, head = 0;
    bool column = false;
  };
  struct Step {
    Source tiles[2];
    int count = 0;
  };

  // The item to come next, and which comes after it.
  __device__ Item Prepare() {
    const RowTileItem item(a_, number_);
    items_.Advance();
    if (!items_.Done()) number_ = items_.Number();
    const uint32_t kv_head = item.head / a_.group;
    const uint32_t all = TilesOfDense(item.rows);
    // One word a lane, so that they are waited for together.
    const uint32_t word = a_.order != nullptr ? Word(item) : all;
    const uint32_t count = __shfl_sync(kAll, word, 0);
    if (count == all) {
      return {count,
              kv_head,
              0,
              0,
              nullptr,
              0,
              SparseKeys(a_, item.item, item.head, item.rows, count, 0)};
    }
    const uint32_t column_tiles = (__shfl_sync(kAll, word, 1) + kKeyTile - 1) / kKeyTile;
    const uint32_t column_first = __shfl_sync(kAll, word, 2);
    const uint32_t mask_first = __shfl_sync(kAll, word, 3);
    const uint32_t mask_tiles = __shfl_sync(kAll, word, 4) - mask_first;
    const uint64_t* const masks =
        a_.column_masks + size_t{mask_first} * a_.row_tiles + item.row_tile * mask_tiles;
    const uint64_t mask = lane_ < column_tiles ? masks[lane_] : 0;
    const bool blocks = static_cast<HeadKind>(__shfl_sync(kAll, word, 5)) == HeadKind::kBlocks;
    const uint32_t block = __shfl_sync(kAll, word, 6);
    const uint32_t range = __shfl_sync(kAll, word, 7), end = __shfl_sync(kAll, word, 8);
    const uint32_t first = blocks ? block : FirstRange(range, end, -static_cast<int>(item.rows.lo));
    return {count,
            kv_head,
            column_tiles,
            column_first,
            masks,
            mask,
            SparseKeys(a_, item.item, item.head, item.rows, count, first)};
  }
  __device__ uint32_t Word(const RowTileItem& item) const {
    switch (lane_) {
      case 0:
        return a_.tiles[item.item];
      case 1:
        return a_.columns_seen[item.item];
      case 2:
        return a_.column_first[item.head];
      case 3:
        return a_.mask_first[item.head];
      case 4:
        return a_.mask_first[item.head + 1];
      case 5:
        return static_cast<uint32_t>(a_.kind[item.head]);
      case 6:
        return a_.block_first[item.item];
      case 7:
        return a_.range_first[item.head];
      case 8:
        return a_.range_first[item.head + 1];
      default:
        return 0;
    }
  }

  // FirstRangeBehind by a warp, which looks at 32 ranges at a time.
  __device__ uint32_t FirstRange(uint32_t at, uint32_t end, int key) const {
    while (at < end) {
      const uint32_t apart = (end - at + 31) / 32, mine = at + lane_ * apart;
      const uint32_t behind = __ballot_sync(kAll, mine < end && a_.ranges[mine].hi > key);
      // How many of those looked at are not behind.
      const uint32_t before = behind != 0
                                  ? static_cast<uint32_t>(__ffs(static_cast<int>(behind))) - 1
                                  : (end - at + apart - 1) / apart;
      if (behind != 0) end = at + before * apart;
      if (before > 0) at += (before - 1) * apart + 1;
    }
    return at;
  }

  // Fetches an item, and prepares the next one, if there are more, once the ring has work.
  __device__ void Fetch(Item& item, bool more, Item& next) {
    constexpr uint32_t kStepsBefore = 2;
    Step before;
    for (uint32_t tile = 0; tile < item.count; tile += 2) {
      Step step;
      TileKeys keys[2] = {};
      step.count = tile + 1 < item.count ? 2 : 1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half < step.count) Find(item, tile + half, step.tiles[half], keys[half]);
      }
      Wait(&shared_.empty[place_.at], place_.parity ^ 1);
      if (lane_ == 0) {
        shared_.keys[place_.at][0] = keys[0];
        shared_.keys[place_.at][1] = keys[1];
      }
      Copy(step, &args_.k, &args_.column_k);
      if (tile > 0) CopyValues(before);
      before = step;
      if (more && tile == 2 * (kStepsBefore - 1)) next = Prepare();
    }
    CopyValues(before);
    if (more && item.count <= 2 * (kStepsBefore - 1)) next = Prepare();
  }

  // Where the tile lies that is the item's next, and which of its keys exist.
  __device__ void Find(Item& item, uint32_t tile, Source& from, TileKeys& keys) {
    if (tile > 0) item.tiles.Advance();
    const uint32_t lo = item.tiles.lo();
    if (tile < item.column_tiles) {
      if (tile > 0 && tile % 32 == 0) {
        item.mask = tile + lane_ < item.column_tiles ? item.masks[tile + lane_] : 0;
      }
      from = {static_cast<int>(item.column_first + lo), 0, true};
      keys = {__shfl_sync(kAll, item.mask, static_cast<int>(tile % 32)),
              -static_cast<int>(kKeyTile)};
    } else {
      from = {static_cast<int>(lo), static_cast<int>(item.kv_head), false};
      keys = {~uint64_t{0} >> (kKeyTile - (item.tiles.hi() - lo)), static_cast<int>(lo)};
    }
  }

  __device__ void CopyValues(const Step& step) {
    Wait(&shared_.empty[place_.at], place_.parity ^ 1);
    Copy(step, &args_.v, &args_.column_v);
  }
  // To the next slot, which is empty.
  __device__ void Copy(const Step& step, const CUtensorMap* all, const CUtensorMap* columns) {
    if (lane_ == 0) {
      Barrier* const full = &shared_.full[place_.at];
      ArriveExpecting(full, step.count * (Tile::kBytes / 2));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == step.count) break;
        const Source& from = step.tiles[half];
        char* const to =
            shared_.slots[place_.at] + half * static_cast<int>(kKeyTile) * Tile::kRowBytes;
#pragma unroll
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
          CopyTile(to + panel * Tile::kPanelBytes, from.column ? columns : all,
                   panel * Tile::kPanelDims, from.key, from.head, full);
        }
      }
    }
    __syncwarp();
    place_.Advance();
  }

  const HopperArgs& args_;
  const SparseArgs& a_;
  HopperShared<Tile>& shared_;
  ItemsOfBlock items_;   // the one behind the prepared ones
  uint32_t number_ = 0;  // its number
  const uint32_t lane_;
  RingPlace<Tile::kSlots> place_;
};

}  // namespace quarry::cuda

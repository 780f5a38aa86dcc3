// The walk over the key tiles of a row tile, as sparse_index.h lists them: what every kernel that
// attends an index does. Who includes this has the functions of CUDA, or a test's imitation of
// them.
#pragma once

#include "gpu/cuda/sparse_args.h"

namespace quarry::cuda {

// First of ranges [at, end) that is not all before the row tile's token 0 or `key`, both relative
// to the row tile's first token.
__device__ inline uint32_t FirstRangeBehind(const RelativeRange* ranges, uint32_t at, uint32_t end,
                                            int key) {
  while (at < end) {
    const uint32_t middle = at + (end - at) / 2;
    if (ranges[middle].hi > key) {
      end = middle;
    } else {
      at = middle + 1;
    }
  }
  return at;
}

// Key tiles of a row tile that attends everything; others have fewer.
__device__ inline uint32_t TilesOfDense(TokenRange rows) {
  return (rows.hi + kKeyTile - 1) / kKeyTile;
}

// The first block or range of a row tile that is not dense.
__device__ inline uint32_t FirstToRead(const SparseArgs& a, uint32_t item, uint32_t head,
                                       uint32_t first_token) {
  if (a.kind[head] == HeadKind::kBlocks) return a.block_first[item];
  return FirstRangeBehind(a.ranges, a.range_first[head], a.range_first[head + 1],
                          -static_cast<int>(first_token));
}

// The key tiles of a row tile, one after the other: columns, then ranges, rising; or blocks; or,
// dense, all keys. Who counts them knows where they end.
class SparseKeys {
 public:
  // `count` of them, of the rows that are the item's; `first` is FirstToRead's.
  __device__ SparseKeys(const SparseArgs& a, uint32_t item, uint32_t head, TokenRange rows,
                        uint32_t count, uint32_t first)
      : a_(&a), first_(rows.lo), end_of_rows_(rows.hi) {
    if (count == TilesOfDense(rows)) {
      end_ = rows.hi;
      return;
    }
    blocks_ = a.kind[head] == HeadKind::kBlocks;
    next_ = first;
    if (!blocks_) end_ = a.columns_seen[item];
    ReadAhead();
    if (end_ == 0) Enter();
  }

  // The present tile: keys [lo(), hi()), of the compacted columns or of all tokens.
  __device__ uint32_t lo() const { return lo_; }
  __device__ uint32_t hi() const { return min(lo_ + kKeyTile, end_); }
  // To the next one; there is one.
  __device__ void Advance() {
    lo_ += kKeyTile;
    if (lo_ >= end_) Enter();
  }

 private:
  __device__ void Enter() {
    if (blocks_) {
      lo_ = static_cast<uint32_t>(ahead_.lo) * kKeyTile;
      end_ = min(lo_ + kKeyTile, end_of_rows_);
    } else {
      lo_ = static_cast<uint32_t>(max(0, static_cast<int>(first_) + ahead_.lo));
      end_ = min(static_cast<uint32_t>(static_cast<int>(first_) + ahead_.hi), end_of_rows_);
    }
    ++next_;
    ReadAhead();
  }
  __device__ void ReadAhead() {
    if (blocks_) {
      ahead_.lo = static_cast<int32_t>(a_->blocks[next_]);
    } else {
      ahead_ = a_->ranges[next_];
    }
  }

  const SparseArgs* a_;
  uint32_t first_, end_of_rows_;
  bool blocks_ = false;
  uint32_t lo_ = 0, end_ = 0;
  uint32_t next_ = 0;    // range or block behind the present one
  RelativeRange ahead_;  // which it is; of a block only lo, its number
};

}  // namespace quarry::cuda

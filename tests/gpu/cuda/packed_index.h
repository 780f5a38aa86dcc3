// A sparse index of the host as one piece of memory, as the kernels read it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "gpu/cuda/sparse_args.h"
#include "gpu/sparse/sparse_index.h"

namespace quarry::cuda {

class PackedIndex {
 public:
  // O(the index), and a sort of its row tiles by what they cost.
  explicit PackedIndex(const SparseIndex& index);

  // What a device needs a copy of, at a multiple of 16 bytes.
  std::span<const std::byte> bytes() const { return bytes_; }
  size_t columns() const { return columns_; }  // of all heads
  size_t masks() const { return masks_; }      // of 64 columns each
  uint32_t items() const { return items_; }

  // Everything of `args` that is the index's, its copy being at `at`.
  void Describe(const std::byte* at, SparseArgs* args) const;

 private:
  // Where each array begins.
  struct Places {
    size_t kind, range_first, ranges, column_first, columns, block_first, blocks, tiles,
        columns_seen, order, mask_first;
  };
  template <typename T>
  size_t Add(std::span<const T> values);

  std::vector<std::byte> bytes_;
  Places places_ = {};
  size_t columns_ = 0, masks_ = 0;
  uint32_t items_ = 0;
  uint32_t heads_, rows_, first_token_, row_tiles_;
};

}  // namespace quarry::cuda

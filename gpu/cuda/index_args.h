// What the kernels that make an index are told. Plain C++, as sparse_args.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpu/cuda/line_args.h"

namespace quarry::cuda {

// An index of consecutive rows by a plan: SparseIndex's arrays of row tiles.
struct IndexArgs {
  PlanArrays plan;
  uint32_t heads, first_token, rows, row_tiles;
  // Of heads of block patterns, [those heads][row_tiles][block_stride].
  uint32_t block_stride;

  uint32_t* tiles;         // [heads][row_tiles]; of block patterns by who chooses the blocks
  uint32_t* columns_seen;  // [heads][row_tiles]
  uint32_t* block_first;   // [heads][row_tiles]: where blocks begin, if there are any
  uint32_t* order;         // items by falling tiles, nearly
};

}  // namespace quarry::cuda

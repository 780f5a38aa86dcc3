// What the kernels of sparse prefill attention are told. Plain C++, as attention_args.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpu/sparse/sparse_index.h"

namespace quarry::cuda {

// All rows of an index. A block of threads attends one row tile of one query head; item i of the
// index's [heads][row_tiles] arrays is row tile i % row_tiles of head i / row_tiles.
struct SparseArgs {
  const float* q;      // [rows][heads][head_dim]
  float* o;            // the same
  float* lse;          // [rows][heads]
  const std::byte* k;  // as DeviceKv, tokens from 0
  const std::byte* v;
  size_t head_stride;  // bytes
  uint32_t heads, group, head_dim, rows, first_token, row_tiles;
  float scale_log2;  // of scores: log2(e) / sqrt(head_dim)

  // SparseIndex's arrays. What lies one behind the last range and the last block may be read.
  const HeadKind* kind;
  const uint32_t* range_first;
  const RelativeRange* ranges;
  const uint32_t* column_first;
  const uint32_t* columns;
  const uint32_t* block_first;
  const uint32_t* blocks;
  const uint32_t* tiles;
  const uint32_t* columns_seen;
  const uint32_t* order;       // items, those with the most tiles first
  const uint32_t* mask_first;  // [heads + 1], see below

  // Working memory. K and V of all heads' columns, one head's behind the other's:
  // [columns][head_dim].
  std::byte* column_k;
  std::byte* column_v;
  // Which of 64 columns lie outside the row tile's ranges, bit by bit: of head h, with
  // n = mask_first[h + 1] - mask_first[h] tiles of columns, [row_tiles][n] from
  // mask_first[h] * row_tiles on.
  uint64_t* column_masks;
};

}  // namespace quarry::cuda

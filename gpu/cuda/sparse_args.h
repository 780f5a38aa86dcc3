// What the kernels of sparse prefill are told. Plain C++, as attention_args.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpu/sparse/sparse_index.h"
#include "proto/types.h"

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
  DType dtype;       // of K and V

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

  uint32_t column_count;  // of all heads

  // Working memory. K and V of all heads' columns, one head's behind the other's:
  // [column_count][head_dim].
  std::byte* column_k;
  std::byte* column_v;
  // Which of 64 columns lie outside the row tile's ranges, bit by bit: of head h, with
  // n = mask_first[h + 1] - mask_first[h] tiles of columns, [row_tiles][n] from
  // mask_first[h] * row_tiles on.
  uint64_t* column_masks;
};

// Scores of queries and keys of consecutive heads.
struct ScoreArgs {
  const float* q;      // [queries][heads][head_dim]
  const std::byte* k;  // of each KV head [keys][head_dim]
  size_t head_stride;  // bytes, of k
  float* out;          // [launched_heads][queries][width], of scores times log2(e)
  uint32_t heads, group, head_dim, queries, keys;
  uint32_t width;  // at least keys, and even; what is behind the keys may be written
  uint32_t first_head, launched_heads;
  float scale_log2;  // as in SparseArgs
  DType dtype;       // of k
};

// Heads whose rows, all of them, ask for key blocks. Means are as MeanArgs lists them.
struct SeekArgs {
  const float* q;          // [rows][heads][head_dim]
  const std::byte* means;  // of each KV head
  size_t head_stride;      // bytes, of means
  uint32_t heads, group, head_dim, first_token, rows;
  uint32_t whole_blocks;  // means before those of row tiles' last blocks
  uint32_t first_head, launched_heads;
  float scale_log2, below_log2;  // as in SparseArgs; log2 of the threshold
  DType dtype;                   // of means

  // Of launched heads, block_head_stride apart, and row tiles, block_stride apart: of each block
  // before the row tile ~0 if a row asks for it, else 0.
  uint32_t* blocks;
  size_t block_head_stride;
  uint32_t block_stride;
};

// Key blocks of consecutive heads. Of block-sparse ones by scores of mean queries, two of each row
// tile, with means of keys as MeanArgs lists them; of row tile t the last block, where the row tile
// ends within it, is the one at whole_blocks + t. Of block-scored ones by what SeekArgs wrote.
struct ChoiceArgs {
  const float* scores;  // [launched_heads][queries][width]; null: block-scored
  float* stats;  // [launched_heads][queries][2]: the largest score, and log2 of the sum of 2^score
  uint32_t first_head, launched_heads, queries, width;
  uint32_t first_token, rows, whole_blocks;
  const uint32_t* wanted;  // [heads]: block-sparse, how many blocks

  // The blocks of row tiles, which lie as SeekArgs' do.
  uint32_t* blocks;
  size_t block_head_stride;
  uint32_t block_stride;
  uint32_t* tiles;  // [heads][row_tiles], as SparseIndex
};

// Mean keys: of the `blocks` whole blocks of 64 tokens from token 0, then of each row tile's last
// block, where it ends within one (else zeros), up to its end.
struct MeanArgs {
  const std::byte* k;  // as DeviceKv
  size_t head_stride;
  std::byte* out;  // [kv_heads][blocks + row_tiles][head_dim], of k's dtype
  uint32_t kv_heads, head_dim, blocks, first_token, rows;
  DType dtype;
};

// Mean queries of the halves of row tiles; zeros where a half has no rows.
struct PoolArgs {
  const float* q;  // [rows][heads][head_dim]
  float* out;      // [2 * row_tiles][heads][head_dim]
  uint32_t heads, head_dim, rows;
};

constexpr uint32_t RowTilesOf(uint32_t rows) { return (rows + kRowTile - 1) / kRowTile; }

}  // namespace quarry::cuda

// What sparse prefill asks of a card: its kernels, in the order of one stream. The card's, and in
// tests an imitation's.
#pragma once

#include "absl/status/status.h"
#include "gpu/cuda/index_args.h"
#include "gpu/cuda/line_args.h"
#include "gpu/cuda/sparse_args.h"

namespace quarry::cuda {

// Addresses are the device's. K, V and means are bf16 or fp16 of head_dim 64, 96 or 128; they, q
// and o lie at multiples of 16 bytes. No shape is empty.
class SparseKernels {
 public:
  virtual ~SparseKernels() = default;
  // Fills column_k, column_v and column_masks, if there are columns, then attends all rows.
  virtual absl::Status Attend(const SparseArgs& args) = 0;
  virtual absl::Status Score(const ScoreArgs& args) = 0;
  // Of scores: writes stats.
  virtual absl::Status Measure(const ChoiceArgs& args) = 0;
  // Of means: writes what rows ask for.
  virtual absl::Status SeekBlocks(const SeekArgs& args) = 0;
  // Of scores and stats, or of what rows ask for: writes blocks and tiles.
  virtual absl::Status ChooseBlocks(const ChoiceArgs& args) = 0;
  virtual absl::Status MeanKeys(const MeanArgs& args) = 0;
  virtual absl::Status PoolQueries(const PoolArgs& args) = 0;

  // Writes parts, shifts and sums.
  virtual absl::Status SumLastQueries(const LastQueryArgs& args) = 0;
  // Of sums: writes what was tried, and keeps the best.
  virtual absl::Status ChooseLines(const KeepLinesArgs& args) = 0;
  // Of what was kept: writes a plan's lists.
  virtual absl::Status EmitLines(const EmitLinesArgs& args) = 0;

  // Of a plan: writes an index's arrays, but order, and tiles of block patterns.
  virtual absl::Status CountRowTiles(const IndexArgs& args) = 0;
  // Of tiles: writes order.
  virtual absl::Status OrderItems(const IndexArgs& args) = 0;
};

}  // namespace quarry::cuda

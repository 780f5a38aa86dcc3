// What sparse prefill asks of a card: its kernels, in the order of one stream. The card's, and in
// tests an imitation's.
#pragma once

#include "absl/status/status.h"
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
  // Of scores and stats: writes out.
  virtual absl::Status SumLastQueries(const ChoiceArgs& args) = 0;
  virtual absl::Status WeighBlocks(const ChoiceArgs& args) = 0;
  virtual absl::Status MeanKeys(const MeanArgs& args) = 0;
  virtual absl::Status PoolQueries(const PoolArgs& args) = 0;
};

}  // namespace quarry::cuda

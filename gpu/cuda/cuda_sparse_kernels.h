// The card's kernels of sparse prefill.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu/cuda/cuda_status.h"
#include "gpu/cuda/sparse_kernels.h"
#include "gpu/cuda/sparse_launch.h"

namespace quarry::cuda {

// The device is current at every call.
class CudaSparseKernels final : public SparseKernels {
 public:
  explicit CudaSparseKernels(cudaStream_t stream, AttentionPath path = AttentionPath::kBest)
      : stream_(stream), path_(path) {}

  absl::Status Attend(const SparseArgs& args) override {
    return CudaStatus(LaunchSparseAttention(args, path_, stream_), "sparse attention");
  }
  absl::Status Score(const ScoreArgs& args) override {
    return CudaStatus(LaunchScores(args, stream_), "scores of keys");
  }
  absl::Status Measure(const ChoiceArgs& args) override {
    return CudaStatus(LaunchMeasure(args, stream_), "largest scores");
  }
  absl::Status SeekBlocks(const SeekArgs& args) override {
    return CudaStatus(LaunchSeekBlocks(args, stream_), "key blocks that rows ask for");
  }
  absl::Status ChooseBlocks(const ChoiceArgs& args) override {
    return CudaStatus(LaunchChooseBlocks(args, stream_), "choice of key blocks");
  }
  absl::Status MeanKeys(const MeanArgs& args) override {
    return CudaStatus(LaunchMeanKeys(args, stream_), "means of key blocks");
  }
  absl::Status PoolQueries(const PoolArgs& args) override {
    return CudaStatus(LaunchPoolQueries(args, stream_), "means of queries");
  }

  absl::Status SumLastQueries(const LastQueryArgs& args) override {
    return CudaStatus(LaunchSumLastQueries(args, stream_), "sums of the last queries");
  }
  absl::Status ChooseLines(const KeepLinesArgs& args) override {
    return CudaStatus(LaunchChooseLines(args, stream_), "choice of columns and slashes");
  }
  absl::Status EmitLines(const EmitLinesArgs& args) override {
    return CudaStatus(LaunchEmitLines(args, stream_), "lists of columns and slashes");
  }
  absl::Status CountRowTiles(const IndexArgs& args) override {
    return CudaStatus(LaunchCountRowTiles(args, stream_), "key tiles of row tiles");
  }
  absl::Status OrderItems(const IndexArgs& args) override {
    return CudaStatus(LaunchOrderItems(args, stream_), "order of row tiles");
  }

 private:
  const cudaStream_t stream_;
  const AttentionPath path_;
};

}  // namespace quarry::cuda

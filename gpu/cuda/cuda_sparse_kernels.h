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
  absl::Status SumLastQueries(const ChoiceArgs& args) override {
    return CudaStatus(LaunchSumLastQueries(args, stream_), "sums of the last queries");
  }
  absl::Status WeighBlocks(const ChoiceArgs& args) override {
    return CudaStatus(LaunchWeighBlocks(args, stream_), "weights of key blocks");
  }
  absl::Status MeanKeys(const MeanArgs& args) override {
    return CudaStatus(LaunchMeanKeys(args, stream_), "means of key blocks");
  }
  absl::Status PoolQueries(const PoolArgs& args) override {
    return CudaStatus(LaunchPoolQueries(args, stream_), "means of queries");
  }

 private:
  const cudaStream_t stream_;
  const AttentionPath path_;
};

}  // namespace quarry::cuda

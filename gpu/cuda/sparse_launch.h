// Launchers of sparse prefill's kernels: what SparseKernels asks for, with its conditions.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu/cuda/sparse_args.h"

namespace quarry::cuda {

// Loads the kernels and allows them their shared memory.
cudaError_t PrepareSparseKernels();

// Which kernel attends: the card's own where there is one (sm_90a's), or the one for sm_80 and
// later, which every card runs.
enum class AttentionPath { kBest, kPortable };
cudaError_t LaunchSparseAttention(const SparseArgs& args, AttentionPath path, cudaStream_t stream);
cudaError_t LaunchScores(const ScoreArgs& args, cudaStream_t stream);
cudaError_t LaunchMeasure(const ChoiceArgs& args, cudaStream_t stream);
cudaError_t LaunchSumLastQueries(const ChoiceArgs& args, cudaStream_t stream);
cudaError_t LaunchWeighBlocks(const ChoiceArgs& args, cudaStream_t stream);
cudaError_t LaunchMeanKeys(const MeanArgs& args, cudaStream_t stream);
cudaError_t LaunchPoolQueries(const PoolArgs& args, cudaStream_t stream);

// The tensor kernels by head_dim, in files of their own so that they compile side by side.
struct SparseTensorKernels {
  cudaError_t (*prepare)();
  cudaError_t (*attend)(const SparseArgs&, cudaStream_t);
  cudaError_t (*score)(const ScoreArgs&, cudaStream_t);
};
extern const SparseTensorKernels kSparseTensorKernels64;
extern const SparseTensorKernels kSparseTensorKernels96;
extern const SparseTensorKernels kSparseTensorKernels128;

}  // namespace quarry::cuda

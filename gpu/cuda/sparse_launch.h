// Launchers of sparse prefill's kernels: what SparseKernels asks for, with its conditions.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu/cuda/index_args.h"
#include "gpu/cuda/line_args.h"
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
cudaError_t LaunchSeekBlocks(const SeekArgs& args, cudaStream_t stream);
cudaError_t LaunchChooseBlocks(const ChoiceArgs& args, cudaStream_t stream);
cudaError_t LaunchMeanKeys(const MeanArgs& args, cudaStream_t stream);
cudaError_t LaunchPoolQueries(const PoolArgs& args, cudaStream_t stream);

// line_launch.cu.
cudaError_t PrepareLineKernels();
cudaError_t LaunchSumLastQueries(const LastQueryArgs& args, cudaStream_t stream);
cudaError_t LaunchChooseLines(const KeepLinesArgs& args, cudaStream_t stream);
cudaError_t LaunchEmitLines(const EmitLinesArgs& args, cudaStream_t stream);
cudaError_t LaunchCountRowTiles(const IndexArgs& args, cudaStream_t stream);
cudaError_t LaunchOrderItems(const IndexArgs& args, cudaStream_t stream);

// The tensor kernels by head_dim, in files of their own so that they compile side by side.
struct SparseTensorKernels {
  cudaError_t (*prepare)();
  cudaError_t (*attend)(const SparseArgs&, cudaStream_t);
  cudaError_t (*score)(const ScoreArgs&, cudaStream_t);
  cudaError_t (*seek)(const SeekArgs&, cudaStream_t);
  // Write parts; sums.
  cudaError_t (*measure_last)(const LastQueryArgs&, cudaStream_t);
  cudaError_t (*sum_last)(const LastQueryArgs&, cudaStream_t);
};
extern const SparseTensorKernels kSparseTensorKernels64;
extern const SparseTensorKernels kSparseTensorKernels96;
extern const SparseTensorKernels kSparseTensorKernels128;
// Those for heads of 64, 96 or 128.
const SparseTensorKernels& TensorKernelsOf(uint32_t head_dim);

}  // namespace quarry::cuda

// Launchers of sparse prefill's attention: bf16 or fp16 K and V of head_dim 64, 96 or 128
// (HasTensorAttention), whose vectors, like q and o, lie at multiples of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu/cuda/sparse_args.h"
#include "proto/types.h"

namespace quarry::cuda {

// Loads the kernels and allows them their shared memory.
cudaError_t PrepareSparseAttention();

// Fills column_k, column_v and column_masks, then attends all rows.
cudaError_t LaunchSparseAttention(const SparseArgs& args, DType dtype, cudaStream_t stream);

// By head_dim, in files of their own so that they compile side by side.
cudaError_t PrepareSparseAttention64();
cudaError_t PrepareSparseAttention96();
cudaError_t PrepareSparseAttention128();
cudaError_t LaunchSparseAttention64(const SparseArgs&, DType, cudaStream_t);
cudaError_t LaunchSparseAttention96(const SparseArgs&, DType, cudaStream_t);
cudaError_t LaunchSparseAttention128(const SparseArgs&, DType, cudaStream_t);

}  // namespace quarry::cuda

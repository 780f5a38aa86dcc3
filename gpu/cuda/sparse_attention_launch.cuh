// Instances and launchers of the sparse tensor kernel for one head_dim.
#pragma once

#include "gpu/cuda/sparse_kernels.h"
#include "gpu/cuda/warp_ops.cuh"
// After the operations that it uses.
#include "gpu/cuda/sparse_attention.cuh"

namespace quarry::cuda {

// Two blocks of a multiprocessor, as in tensor_attention_launch.cuh.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    SparseTensorAttention(const __grid_constant__ SparseArgs args) {
  extern __shared__ __align__(128) char shared[];
  AttendRowTile<T, Tile>(args, shared);
}

template <int kHeadDim>
cudaError_t PrepareSparseHeadDim() {
  using Tile = SparseTile<kHeadDim>;
  for (const auto kernel : {SparseTensorAttention<Bf16, Tile>, SparseTensorAttention<Fp16, Tile>}) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <int kHeadDim>
cudaError_t LaunchSparseHeadDim(const SparseArgs& args, DType dtype, cudaStream_t stream) {
  using Tile = SparseTile<kHeadDim>;
  const auto kernel =
      dtype == DType::kBf16 ? SparseTensorAttention<Bf16, Tile> : SparseTensorAttention<Fp16, Tile>;
  kernel<<<args.heads * args.row_tiles, Tile::kThreads, Tile::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace quarry::cuda

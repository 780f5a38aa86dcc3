#include "gpu/cuda/sparse_kernels.h"

#include "gpu/cuda/warp_ops.cuh"
// After the operations that it uses.
#include "gpu/cuda/sparse_attention.cuh"

namespace quarry::cuda {
namespace {

constexpr uint32_t kThreads = 256, kBlocksPerHead = 64;

__global__ void __launch_bounds__(kThreads) Compact(const __grid_constant__ SparseArgs args) {
  CompactColumns(args, kThreads);
}

__global__ void __launch_bounds__(kThreads) Mask(const __grid_constant__ SparseArgs args) {
  MaskColumns(args, kThreads);
}

}  // namespace

cudaError_t PrepareSparseAttention() {
  for (const auto prepare :
       {PrepareSparseAttention64, PrepareSparseAttention96, PrepareSparseAttention128}) {
    if (const cudaError_t error = prepare(); error != cudaSuccess) return error;
  }
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, Compact);
  return error != cudaSuccess ? error : cudaFuncGetAttributes(&attributes, Mask);
}

cudaError_t LaunchSparseAttention(const SparseArgs& args, DType dtype, cudaStream_t stream) {
  if (args.column_k != nullptr) {
    const dim3 grid(kBlocksPerHead, args.heads);
    Compact<<<grid, kThreads, 0, stream>>>(args);
    Mask<<<grid, kThreads, 0, stream>>>(args);
  }
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (args.head_dim == 64) return LaunchSparseAttention64(args, dtype, stream);
  if (args.head_dim == 96) return LaunchSparseAttention96(args, dtype, stream);
  return LaunchSparseAttention128(args, dtype, stream);
}

}  // namespace quarry::cuda

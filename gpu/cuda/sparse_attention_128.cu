#include "gpu/cuda/sparse_attention_launch.cuh"

namespace quarry::cuda {

cudaError_t PrepareSparseAttention128() { return PrepareSparseHeadDim<128>(); }

cudaError_t LaunchSparseAttention128(const SparseArgs& args, DType dtype, cudaStream_t stream) {
  return LaunchSparseHeadDim<128>(args, dtype, stream);
}

}  // namespace quarry::cuda

#include "gpu/cuda/sparse_attention_launch.cuh"

namespace quarry::cuda {

cudaError_t PrepareSparseAttention64() { return PrepareSparseHeadDim<64>(); }

cudaError_t LaunchSparseAttention64(const SparseArgs& args, DType dtype, cudaStream_t stream) {
  return LaunchSparseHeadDim<64>(args, dtype, stream);
}

}  // namespace quarry::cuda

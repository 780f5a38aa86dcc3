#include "gpu/cuda/sparse_attention_launch.cuh"

namespace quarry::cuda {

cudaError_t PrepareSparseAttention96() { return PrepareSparseHeadDim<96>(); }

cudaError_t LaunchSparseAttention96(const SparseArgs& args, DType dtype, cudaStream_t stream) {
  return LaunchSparseHeadDim<96>(args, dtype, stream);
}

}  // namespace quarry::cuda

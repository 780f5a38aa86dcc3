#include "gpu/cuda/tensor_attention_launch.cuh"

namespace quarry::cuda {

cudaError_t PrepareAttention96() { return PrepareHeadDim<96>(); }

cudaError_t LaunchAttention96(const AttentionArgs& args, DType dtype, uint32_t row_tiles,
                              cudaStream_t stream) {
  return LaunchHeadDim<96>(args, dtype, row_tiles, stream);
}

}  // namespace quarry::cuda

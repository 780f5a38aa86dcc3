#include "gpu/cuda/tensor_attention_launch.cuh"

namespace quarry::cuda {

cudaError_t PrepareAttention64() { return PrepareHeadDim<64>(); }

cudaError_t LaunchAttention64(const AttentionArgs& args, DType dtype, uint32_t row_tiles,
                              cudaStream_t stream) {
  return LaunchHeadDim<64>(args, dtype, row_tiles, stream);
}

}  // namespace quarry::cuda

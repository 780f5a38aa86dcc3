#include "gpu/cuda/tensor_attention_launch.cuh"

namespace quarry::cuda {

cudaError_t PrepareAttention128() { return PrepareHeadDim<128>(); }

cudaError_t LaunchAttention128(const AttentionArgs& args, DType dtype, uint32_t row_tiles,
                              cudaStream_t stream) {
  return LaunchHeadDim<128>(args, dtype, row_tiles, stream);
}

}  // namespace quarry::cuda

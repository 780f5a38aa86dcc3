#include "gpu/cuda/hopper_attention_launch.cuh"

namespace quarry::cuda {

const HopperKernels kHopperKernels64 = HopperHeadDim<64>::kAll;

}  // namespace quarry::cuda

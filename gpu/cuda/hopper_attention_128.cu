#include "gpu/cuda/hopper_attention_launch.cuh"

namespace quarry::cuda {

const HopperKernels kHopperKernels128 = HopperHeadDim<128>::kAll;

}  // namespace quarry::cuda

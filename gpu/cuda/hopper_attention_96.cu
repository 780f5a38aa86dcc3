#include "gpu/cuda/hopper_attention_launch.cuh"

namespace quarry::cuda {

const HopperKernels kHopperKernels96 = HopperHeadDim<96>::kAll;

}  // namespace quarry::cuda

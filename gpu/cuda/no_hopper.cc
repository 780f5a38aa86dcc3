#include "gpu/cuda/hopper_launch.h"

namespace quarry::cuda {

const HopperKernels* HopperKernelsHere(uint32_t) { return nullptr; }

}  // namespace quarry::cuda

#include "gpu/cuda/hopper_launch.h"

namespace quarry::cuda {
namespace {

// 0 where it cannot be asked.
int Attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}

}  // namespace

uint32_t Multiprocessors() {
  return static_cast<uint32_t>(Attribute(cudaDevAttrMultiProcessorCount));
}

const HopperKernels* HopperKernelsHere(uint32_t head_dim) {
  // sm_90a's code runs on 9.0 and nothing later.
  if (Attribute(cudaDevAttrComputeCapabilityMajor) != 9 ||
      Attribute(cudaDevAttrComputeCapabilityMinor) != 0) {
    return nullptr;
  }
  if (head_dim == 64) return &kHopperKernels64;
  if (head_dim == 96) return &kHopperKernels96;
  return &kHopperKernels128;
}

}  // namespace quarry::cuda

// Kernels before their first launch: what is loaded then would take memory beside the budget, and
// one that has no code for the card would fail late.
#pragma once

#include <cuda_runtime_api.h>

namespace quarry::cuda {

template <typename Kernel>
cudaError_t LoadKernel(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

// Loads it, and lets it have so much shared memory that is asked for at a launch.
template <typename Kernel>
cudaError_t LoadKernel(Kernel* kernel, int shared_bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

}  // namespace quarry::cuda

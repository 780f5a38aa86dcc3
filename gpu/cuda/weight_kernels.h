// Kernels of weights as codes. Pointers are the device's; shapes are checked by who launches, and
// no shape is empty.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "gpu/cuda/code_args.h"
#include "gpu/device.h"
#include "proto/types.h"

namespace quarry::cuda {

// Loads the kernels.
cudaError_t PrepareWeightKernels();

// Activations are rounded to `dtype`, bf16 or fp16; sums are fp32.
cudaError_t LaunchCodeProduct(const CodeProductArgs& args, WeightForm form, DType dtype,
                              cudaStream_t stream);

// to [out][in] of `dtype`, bf16 or fp16: what the codes stand for, rounded to nearest even.
cudaError_t LaunchDecode(const CodedWeights& weights, WeightForm form, DType dtype, void* to,
                         cudaStream_t stream);

}  // namespace quarry::cuda

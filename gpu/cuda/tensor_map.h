// Tensor maps: how the copy engine of sm_90 and later finds a tile.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace quarry::cuda {

// [heads][tokens][head_dim] of elements of two bytes, of which a box is [1][box_tokens][box_dims]:
// 32 or 64 dimensions, which come swizzled over their 64 or 128 bytes. What is behind the tokens
// comes as zeros.
struct TensorMapShape {
  const void* data;    // at a multiple of 16 bytes
  size_t head_stride;  // bytes, a multiple of 16
  uint32_t heads, tokens, head_dim;
  uint32_t box_tokens, box_dims;
};

// cudaErrorNotSupported where the driver has no such maps.
cudaError_t MakeTensorMap(const TensorMapShape& shape, CUtensorMap* out);

}  // namespace quarry::cuda

#include "gpu/cuda/tensor_map.h"

#include <cudaTypedefs.h>

#include <algorithm>

namespace quarry::cuda {
namespace {

// The driver's own function, which the runtime finds; null where there is none.
PFN_cuTensorMapEncodeTiled_v12000 Encode() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

}  // namespace

cudaError_t MakeTensorMap(const TensorMapShape& shape, CUtensorMap* out) {
  if (Encode() == nullptr) return cudaErrorNotSupported;
  constexpr size_t kElementBytes = 2;
  const cuuint64_t row_bytes = shape.head_dim * kElementBytes;
  const cuuint64_t sizes[3] = {shape.head_dim, shape.tokens, shape.heads};
  // Of one head nobody need have said how far the next would be.
  const cuuint64_t strides[2] = {row_bytes, std::max<cuuint64_t>(shape.head_stride, row_bytes)};
  const cuuint32_t box[3] = {shape.box_dims, shape.box_tokens, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      Encode()(out, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(shape.data), sizes,
               strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               shape.box_dims == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace quarry::cuda

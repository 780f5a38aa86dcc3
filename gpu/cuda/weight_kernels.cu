#include "gpu/cuda/weight_kernels.h"

#include <algorithm>

#include "gpu/cuda/element.cuh"
#include "gpu/cuda/kernel_loading.h"
#include "gpu/cuda/warp_ops.cuh"
// After the operations that it uses.
#include "gpu/cuda/code_product.cuh"

namespace quarry::cuda {
namespace {

template <typename Element, typename Codes>
__global__ void __launch_bounds__(kCodeThreads) CodeProduct(const CodeProductArgs a) {
  __shared__ float shared[kCodeWarps][32][4];
  MultiplyCodes<Element, Codes>(a, shared);
}

constexpr uint32_t kThreads = 256;

// Eight codes of a word, or of two, as floats.
__device__ void Unpack(uint32_t word, uint32_t, Int4Codes, float out[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = static_cast<float>(static_cast<int>(word >> (4 * i) & 15) - 8);
    out[2 * i + 1] = static_cast<float>(static_cast<int>(word >> (4 * i + 16) & 15) - 8);
  }
}
__device__ void Unpack(uint32_t first, uint32_t second, Int8Codes, float out[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = ByteLess128(first, i);
    out[i + 4] = ByteLess128(second, i);
  }
}

template <typename T>
struct alignas(16) Eight {
  T x[8];
};

// A thread for eight columns of every gridDim.y-th row.
template <typename T, typename Codes>
__global__ void __launch_bounds__(kThreads) Decode(const CodedWeights w, T* to) {
  constexpr uint32_t kWords = Codes::kGroupBytes == kGroupCodes ? 2 : 1;  // of eight codes
  const uint32_t column = (blockIdx.x * kThreads + threadIdx.x) * 8;
  if (column >= w.in) return;
  const size_t row_words = size_t{w.groups} * (Codes::kGroupBytes / 4);
  for (uint32_t row = blockIdx.y; row < w.out; row += gridDim.y) {
    const uint32_t* const words =
        reinterpret_cast<const uint32_t*>(w.codes) + row * row_words + column / 8 * kWords;
    float codes[8];
    Unpack(words[0], words[kWords - 1], Codes(), codes);
    const float scale = Bf16AsFloat(
        w.scales[Codes::kScaledByGroup ? size_t{row} * w.groups + column / kGroupCodes : row]);
    Eight<T> out;
#pragma unroll
    for (int e = 0; e < 8; ++e) out.x[e] = FromFloat<T>(scale * codes[e]);
    T* const at = to + size_t{row} * w.in + column;
    if (w.in % 8 == 0) {
      *reinterpret_cast<Eight<T>*>(at) = out;
      continue;
    }
#pragma unroll
    for (uint32_t e = 0; e < 8; ++e) {
      if (column + e < w.in) at[e] = out.x[e];
    }
  }
}

template <typename Element, typename T>
struct Kernels {
  using Elements = Element;
  using Stored = T;
};

// f(kernels' elements, codes).
template <typename F>
cudaError_t With(WeightForm form, DType dtype, const F& f) {
  const auto with_element = [&](auto codes) {
    if (dtype == DType::kFp16) {
      f(Kernels<Fp16, __half>(), codes);
    } else {
      f(Kernels<Bf16, __nv_bfloat16>(), codes);
    }
  };
  if (form == WeightForm::kInt8) {
    with_element(Int8Codes());
  } else {
    with_element(Int4Codes());
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t PrepareWeightKernels() {
  cudaError_t first = cudaSuccess;
  for (const WeightForm form : {WeightForm::kInt8, WeightForm::kInt4}) {
    for (const DType dtype : {DType::kBf16, DType::kFp16}) {
      const cudaError_t last = With(form, dtype, [&](auto kernels, auto codes) {
        using K = decltype(kernels);
        for (const cudaError_t error :
             {LoadKernel(CodeProduct<typename K::Elements, decltype(codes)>),
              LoadKernel(Decode<typename K::Stored, decltype(codes)>)}) {
          if (first == cudaSuccess) first = error;
        }
      });
      if (first == cudaSuccess) first = last;
    }
  }
  return first;
}

cudaError_t LaunchCodeProduct(const CodeProductArgs& args, WeightForm form, DType dtype,
                              cudaStream_t stream) {
  return With(form, dtype, [&](auto kernels, auto codes) {
    const uint32_t blocks = (args.w.out + kOutRows - 1) / kOutRows;
    CodeProduct<typename decltype(kernels)::Elements, decltype(codes)>
        <<<blocks, kCodeThreads, 0, stream>>>(args);
  });
}

cudaError_t LaunchDecode(const CodedWeights& weights, WeightForm form, DType dtype, void* to,
                         cudaStream_t stream) {
  return With(form, dtype, [&](auto kernels, auto codes) {
    using T = typename decltype(kernels)::Stored;
    constexpr uint32_t kColumns = 8 * kThreads, kMaxGridRows = 65535;
    const dim3 grid((weights.in + kColumns - 1) / kColumns, std::min(weights.out, kMaxGridRows));
    Decode<T, decltype(codes)><<<grid, kThreads, 0, stream>>>(weights, static_cast<T*>(to));
  });
}

}  // namespace quarry::cuda

// The inner product for hnswlib, whose own one is chosen when it is compiled.
#pragma once

#include <cstddef>

namespace quarry::baselines {

using InnerProduct = float (*)(const float* a, const float* b, size_t n);

// Each in its own file, compiled for that instruction set alone; n is a multiple of 16.
float InnerProductScalar(const float* a, const float* b, size_t n);
float InnerProductAvx2(const float* a, const float* b, size_t n);
float InnerProductAvx512(const float* a, const float* b, size_t n);

}  // namespace quarry::baselines

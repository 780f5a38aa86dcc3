// The head dimensions that the kernels take.
#pragma once

#include <cstdint>

namespace quarry {

inline constexpr uint32_t kHeadDimStep = 16, kMaxHeadDim = 512;

constexpr bool IsHeadDim(uint32_t dim) {
  return dim > 0 && dim <= kMaxHeadDim && dim % kHeadDimStep == 0;
}

}  // namespace quarry

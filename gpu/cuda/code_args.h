// What kernels of weights as codes are launched with. Plain types: sources of kernels include it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quarry::cuda {

inline constexpr uint32_t kGroupCodes = 128;  // kCodeGroup

// Weights [out][in] as codes, as gpu/weights/codes.h has them.
struct CodedWeights {
  const std::byte* codes;  // [out][row_bytes], 16 bytes aligned
  const uint16_t* scales;  // bf16, [out] or [out][groups]
  uint32_t out, in;
  uint32_t groups;  // of kGroupCodes codes, in a row
};

// y [rows][out] = x [rows][in] * weights^T, or added to y; at most kMaxCodeRows rows.
inline constexpr uint32_t kMaxCodeRows = 8;
struct CodeProductArgs {
  CodedWeights w;
  const float* x;
  float* y;
  uint32_t rows;
  bool adds;
  bool vectors;  // x is 16 bytes aligned, and so is every row of it
};

}  // namespace quarry::cuda

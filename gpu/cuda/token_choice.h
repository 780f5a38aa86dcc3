// The choice of tokens from logits on the card.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/device.h"
#include "gpu/sampler.h"

namespace quarry::cuda {

// Rows of one launch: their draws travel as kernel parameters.
inline constexpr uint32_t kMaxDraws = 64;
struct TokenChoiceArgs {
  DeviceLogits logits;
  uint32_t first_row, rows;  // of the logits' rows, those that are chosen for
  ChosenToken* out;          // [rows]
  TokenDraw draws[kMaxDraws];
};

static_assert(sizeof(TokenChoiceArgs) <= 4096);  // what a kernel's parameters may have everywhere

cudaError_t PrepareTokenChoice();
cudaError_t LaunchTokenChoice(const TokenChoiceArgs& args, cudaStream_t stream);

}  // namespace quarry::cuda

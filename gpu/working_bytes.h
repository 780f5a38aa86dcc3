// What a sequence takes of a device's memory beside the model's weights.
#pragma once

#include <cstdint>

#include "gpu/model_config.h"
#include "gpu/sequence.h"

namespace quarry {

// A margin for what a card's operations take while they run: rounded activations of a product (112
// MiB for 4,096 rows of 14,336), widened codes, partials of attention, scores and lists of a sparse
// prefill, CUDA code that is loaded late.
inline constexpr uint64_t kOperationBytes = uint64_t{1} << 30;

// Of one sequence of at most max_tokens tokens, at its largest: the prefill of all of them at once.
// `with_service` as the sequence will have it: without one all K/V stay on the device. With
// kOperationBytes.
uint64_t WorkingBytes(const ModelConfig& config, const SequenceOptions& options,
                      uint32_t max_tokens, bool with_service);

}  // namespace quarry

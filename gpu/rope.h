// Rotary embeddings as Hugging Face transformers computes them.
#pragma once

#include <cstdint>
#include <vector>

#include "proto/model_spec.h"

namespace quarry {

// What a model's configuration says about its rotary embedding.
struct RopeConfig {
  enum class Type { kDefault, kLlama3, kLongRope } type = Type::kDefault;
  double theta = 10000;
  double partial_rotary_factor = 1;
  uint32_t original_max_tokens = 0;  // llama3, longrope: the length before it was stretched
  // llama3
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4;
  // longrope: one per pair of rotated dimensions
  std::vector<double> short_factor, long_factor;
  double attention_factor = 0;  // 0: computed from the lengths
};

// Dimensions of a head that turn; even.
uint32_t RotaryDim(const RopeConfig& config, uint32_t head_dim);

// The embedding of a context of at most max_tokens tokens of a model of model_max_tokens.
// LongRoPE's regime is pinned by the former: long iff max_tokens > original_max_tokens, whatever
// the context's present length, for keys of two regimes must never meet.
// inv_freq is computed in fp32; angles are to be fp32(position) * inv_freq.
RopeSpec ComputeRope(const RopeConfig& config, uint32_t head_dim, uint32_t model_max_tokens,
                     uint32_t max_tokens);

}  // namespace quarry

#include "gpu/rope.h"

#include <cmath>
#include <numbers>

namespace quarry {
namespace {

// Llama 3.1: slow frequencies are stretched, fast ones kept, those between blended.
float Llama3Frequency(float frequency, const RopeConfig& rope) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  const double original = rope.original_max_tokens;
  if (wavelength < original / rope.high_freq_factor) return frequency;
  if (wavelength > original / rope.low_freq_factor) {
    return frequency / static_cast<float>(rope.factor);
  }
  const double smooth = (original / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return static_cast<float>((1 - smooth) * frequency / rope.factor + smooth * frequency);
}

// LongRoPE's factor of cosines and sines: sqrt(1 + ln s / ln L), where a model of length L was
// stretched s times (arXiv 2402.13753).
float LongRopeScale(const RopeConfig& rope, uint32_t model_max_tokens) {
  if (rope.attention_factor > 0) return static_cast<float>(rope.attention_factor);
  const double original = rope.original_max_tokens;
  const double stretch = model_max_tokens / original;
  if (stretch <= 1) return 1.0f;
  return static_cast<float>(std::sqrt(1 + std::log(stretch) / std::log(original)));
}

}  // namespace

uint32_t RotaryDim(const RopeConfig& config, uint32_t head_dim) {
  return static_cast<uint32_t>(head_dim * config.partial_rotary_factor) / 2 * 2;
}

RopeSpec ComputeRope(const RopeConfig& config, uint32_t head_dim, uint32_t model_max_tokens,
                     uint32_t max_tokens) {
  RopeSpec spec;
  spec.rotary_dim = RotaryDim(config, head_dim);
  spec.dtype = DType::kFp32;
  const std::vector<double>* factors = nullptr;
  if (config.type == RopeConfig::Type::kLongRope) {
    const bool is_long = max_tokens > config.original_max_tokens;
    spec.regime = is_long ? RopeRegime::kLong : RopeRegime::kShort;
    spec.regime_max_tokens = is_long ? 0 : config.original_max_tokens;
    spec.attention_scale = LongRopeScale(config, model_max_tokens);
    factors = is_long ? &config.long_factor : &config.short_factor;
  }
  for (uint32_t i = 0; i < spec.rotary_dim / 2; ++i) {
    const auto power = static_cast<float>(std::pow(config.theta, 2.0 * i / spec.rotary_dim));
    const float factor = factors != nullptr ? static_cast<float>((*factors)[i]) : 1.0f;
    float frequency = 1.0f / (factor * power);
    if (config.type == RopeConfig::Type::kLlama3) frequency = Llama3Frequency(frequency, config);
    spec.inv_freq.push_back(frequency);
  }
  return spec;
}

}  // namespace quarry

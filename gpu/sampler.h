// Chooses the next token from logits.
#pragma once

#include <cstdint>
#include <random>
#include <span>

namespace quarry {

// How one token is chosen.
struct TokenDraw {
  double temperature = 0;  // 0: the largest logit's, of several the lowest id
  double top_p = 1;        // among the fewest tokens, most probable first, whose probability
                           // reaches this; of equal ones lower ids come first
  double at = 0;           // of [0, 1): where among those, by their probability
};

inline constexpr uint32_t kEveryToken = ~0u;
// The first id whose logit is no finite number, from which no token is to be chosen; kEveryToken:
// all are.
uint32_t FirstUnfit(std::span<const float> logits);

// logits: at least one, finite.
uint32_t ChooseToken(std::span<const float> logits, const TokenDraw& draw);

struct SamplerOptions {
  double temperature = 0;
  double top_p = 1;
  uint64_t seed = 0;
};

// Not thread-safe.
class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options) : options_(options), random_(options.seed) {}
  TokenDraw Draw();
  uint32_t Next(std::span<const float> logits) { return ChooseToken(logits, Draw()); }

 private:
  const SamplerOptions options_;
  std::mt19937_64 random_;
};

}  // namespace quarry

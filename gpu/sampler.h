// Chooses the next token from logits.
#pragma once

#include <cstdint>
#include <random>
#include <span>

namespace quarry {

struct SamplerOptions {
  double temperature = 0;  // 0: greedy
  double top_p = 1;        // the fewest tokens whose probability reaches this
  uint64_t seed = 0;
};

// Not thread-safe.
class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options) : options_(options), random_(options.seed) {}
  // The lowest id of the largest logits when greedy.
  uint32_t Next(std::span<const float> logits);

 private:
  const SamplerOptions options_;
  std::mt19937_64 random_;
};

}  // namespace quarry

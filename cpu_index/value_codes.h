// Values in 2 bits a dimension, around the mean of their leaf.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace quarry {

// The codes of a reordered run's values, in blocks of 16 tokens: a leaf each. Uniform steps fitted
// to each dimension's deviation from the leaves' means, and to each token's length: what is
// attended is often longer than the rest, and would be cut off. Immutable after the last Store;
// thread-safe then.
class ValueCodes {
 public:
  static constexpr uint32_t kBlockTokens = 16;
  static constexpr uint32_t kBits = 2;

  // deviation: [head_dim] standard deviation of what will be stored.
  ValueCodes(uint32_t tokens, std::span<const float> deviation);

  // difference: [head_dim] of the token's value from its leaf's mean.
  void Store(uint32_t token, std::span<const float> difference);

  // sums[i * head_dim + d] += the weighted sum over the tokens of the blocks `which` of what is
  // stored. weights: [queries][which.size() * kBlockTokens], not negative; those of a block are
  // rounded to the 127th part of the block's largest.
  void AddWeighted(std::span<const uint32_t> which, std::span<const float> weights,
                   uint32_t queries, std::span<float> sums) const;

  // Of a block's codes and scales.
  uint64_t block_bytes() const { return code_bytes() + kBlockTokens * sizeof(uint16_t); }
  uint64_t memory_bytes() const { return codes_.size() + 2 * scale_.size() + 8 * step_.size(); }

 private:
  uint64_t code_bytes() const { return size_t{head_dim_} * kBlockTokens * kBits / 8; }

  const uint32_t head_dim_;
  std::vector<float> step_, inverse_step_;  // [head_dim]
  std::vector<uint8_t> codes_;              // [blocks][head_dim / 16][64]
  std::vector<uint16_t> scale_;             // bf16 [blocks * kBlockTokens] of each token's steps
};

}  // namespace quarry

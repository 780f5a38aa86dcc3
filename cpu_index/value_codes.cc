#include "cpu_index/value_codes.h"

#include <algorithm>
#include <cmath>

#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/half.h"

namespace quarry {
namespace {

// The step of the uniform quantiser of 4 levels with the least mean square error for a normal
// distribution, in standard deviations.
constexpr float kStep = 0.9957f;

}  // namespace

ValueCodes::ValueCodes(uint32_t tokens, std::span<const float> deviation)
    : head_dim_(static_cast<uint32_t>(deviation.size())),
      codes_(size_t{(tokens + kBlockTokens - 1) / kBlockTokens} * code_bytes()),
      scale_(size_t{(tokens + kBlockTokens - 1) / kBlockTokens} * kBlockTokens) {
  for (float d : deviation) {
    step_.push_back(d * kStep);
    inverse_step_.push_back(d > 0 ? 1 / (d * kStep) : 0);
  }
}

void ValueCodes::Store(uint32_t token, std::span<const float> difference) {
  uint8_t* const block = codes_.data() + token / kBlockTokens * code_bytes();
  float squares = 0;
  for (uint32_t d = 0; d < head_dim_; ++d) {
    const float steps = difference[d] * inverse_step_[d] * kStep;
    squares += steps * steps;
  }
  scale_[token] = FloatToBf16(std::sqrt(squares / static_cast<float>(head_dim_)));
  const float scale = Bf16ToFloat(scale_[token]);
  const float inverse = scale > 0 ? 1 / scale : 0;
  const uint32_t lane_byte = token % 4, shift = token % kBlockTokens / 4 * 2;
  for (uint32_t d = 0; d < head_dim_; ++d) {
    const float level = std::clamp(difference[d] * inverse_step_[d] * inverse + 2.0f, 0.0f, 3.5f);
    block[size_t{d} * 4 + lane_byte] |= static_cast<uint8_t>(static_cast<uint32_t>(level) << shift);
  }
}

void ValueCodes::AddWeighted(std::span<const uint32_t> which, std::span<const float> weights,
                             uint32_t queries, std::span<float> sums) const {
  const size_t row = which.size() * kBlockTokens;
  QUARRY_CHECK(weights.size() == queries * row && sums.size() == size_t{queries} * head_dim_);
  std::vector<int8_t> rounded(weights.size());
  std::vector<float> unit(queries * which.size());
  std::vector<float> total(queries);  // of the rounded weights
  for (size_t b = 0; b < unit.size(); ++b) {
    float w[kBlockTokens];
    const uint16_t* const scale = scale_.data() + size_t{which[b % which.size()]} * kBlockTokens;
    for (uint32_t t = 0; t < kBlockTokens; ++t) {
      w[t] = weights[b * kBlockTokens + t] * Bf16ToFloat(scale[t]);
    }
    const float largest = *std::max_element(w, w + kBlockTokens);
    if (largest <= 0) continue;
    unit[b] = largest / 127;
    const float inverse = 127 / largest;
    int sum = 0;
    for (uint32_t t = 0; t < kBlockTokens; ++t) {
      const int level = static_cast<int>(w[t] * inverse + 0.5f);
      rounded[b * kBlockTokens + t] = static_cast<int8_t>(level);
      sum += level;
    }
    total[b / which.size()] += unit[b] * static_cast<float>(sum);
  }
  std::vector<float> acc(sums.size());
  kernels::ValueTile tile{};
  tile.codes = codes_.data();
  tile.which = which.data();
  tile.blocks = static_cast<uint32_t>(which.size());
  tile.head_dim = head_dim_;
  tile.weights = rounded.data();
  tile.unit = unit.data();
  tile.queries = queries;
  tile.acc = acc.data();
  Kernels().add_values(tile);
  for (uint32_t i = 0; i < queries; ++i) {
    for (uint32_t d = 0; d < head_dim_; ++d) {
      // A code stands for the middle of its interval: levels -1.5, -0.5, 0.5, 1.5.
      sums[size_t{i} * head_dim_ + d] +=
          step_[d] * (acc[size_t{i} * head_dim_ + d] - 1.5f * total[i]);
    }
  }
}

}  // namespace quarry

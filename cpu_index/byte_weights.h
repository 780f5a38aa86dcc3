// A query's weights of coded coordinates, in a byte each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "proto/check.h"

namespace quarry {

// A score is scale * (the sum of weights by codes) + offset.
struct CodedScore {
  float scale = 0, offset = 0;
};

// Coordinate c of a key is stored as a code that stands for step[c] * (code + middle(c)).
// weight[c]: coordinates[c] * step[c], as multiples in [-127, 127] of one scale; those behind the
// coordinates stay as they are. offset: of a key whose coordinates are all 0.
template <typename Middle>
CodedScore ToByteWeights(std::span<const float> coordinates, std::span<const float> step,
                         Middle middle, float offset, std::span<int8_t> weight) {
  QUARRY_CHECK(coordinates.size() <= step.size() && coordinates.size() <= weight.size());
  float largest = 0;
  for (size_t c = 0; c < coordinates.size(); ++c) {
    largest = std::max(largest, std::fabs(coordinates[c] * step[c]));
  }
  const float scale = largest / 127;
  if (largest == 0) return {scale, offset};
  for (size_t c = 0; c < coordinates.size(); ++c) {
    weight[c] = static_cast<int8_t>(std::lround(coordinates[c] * step[c] / scale));
    offset += scale * static_cast<float>(weight[c]) * middle(c);
  }
  return {scale, offset};
}

}  // namespace quarry

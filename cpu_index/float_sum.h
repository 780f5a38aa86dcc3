// The sum of many floats.
#pragma once

#include <cstddef>
#include <span>

namespace quarry {

// In four sums, so that additions need not wait for one another.
inline float FloatSum(std::span<const float> x) {
  float sum[4] = {};
  size_t i = 0;
  for (; i + 4 <= x.size(); i += 4) {
    for (size_t j = 0; j < 4; ++j) sum[j] += x[i + j];
  }
  for (; i < x.size(); ++i) sum[0] += x[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace quarry

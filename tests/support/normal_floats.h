// Made numbers of tests.
#pragma once

#include <cstddef>
#include <random>
#include <vector>

namespace quarry {

// n of them, normal around 0 with that deviation.
template <typename Engine>
std::vector<float> NormalFloats(Engine& random, size_t n, float size = 1.0f) {
  std::normal_distribution<float> normal(0.0f, size);
  std::vector<float> out(n);
  for (float& x : out) x = normal(random);
  return out;
}

}  // namespace quarry

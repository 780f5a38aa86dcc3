// Sums of 2^score that do not overflow.
#pragma once

namespace quarry::cuda {

// The largest of some scores, and the sum of 2^(score - largest).
struct ScoreSum {
  float largest = -INFINITY, sum = 0.0f;

  __device__ void Add(const ScoreSum& other) {
    const float now = fmaxf(largest, other.largest);
    if (now == -INFINITY) return;
    sum = sum * Exp2(largest - now) + other.sum * Exp2(other.largest - now);
    largest = now;
  }
  // log2 of the sum of 2^score.
  __device__ float Log2() const { return largest + log2f(sum); }
};

}  // namespace quarry::cuda

// Merging of a finished partial into another one, as MergeFinished (cpu_index/partial.h).
#pragma once

#include <cmath>

namespace quarry::cuda {

// The weights of partials a and b, by their lse. An empty partial's outputs count for nothing,
// whatever they are.
class MergeWeights {
 public:
  __device__ MergeWeights(float lse_a, float lse_b)
      : a_is_empty_(lse_a == -INFINITY), nothing_(lse_b == -INFINITY) {
    if (nothing_) return;
    largest_ = fmaxf(lse_a, lse_b);
    weight_a_ = a_is_empty_ ? 0.0f : expf(lse_a - largest_);
    weight_b_ = expf(lse_b - largest_);
    total_ = weight_a_ + weight_b_;
  }
  // b is empty: a stays as it is.
  __device__ bool nothing() const { return nothing_; }
  __device__ float Of(float o_a, float o_b) const {
    return (weight_a_ * (a_is_empty_ ? 0.0f : o_a) + weight_b_ * o_b) / total_;
  }
  __device__ float lse() const { return largest_ + logf(total_); }

 private:
  const bool a_is_empty_, nothing_;
  float largest_ = 0, weight_a_ = 0, weight_b_ = 0, total_ = 1;
};

}  // namespace quarry::cuda

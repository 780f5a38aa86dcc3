// Rotation: the turn that a rotary embedding gives over a distance between positions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "proto/model_spec.h"

namespace quarry {

// Of keys that were stored at position p and are used at p + distance: (R(p + D) k) . q is the
// stored key's product with the query turned back by D (RoFormer, arXiv 2104.09864). Only turns:
// the rope's attention_scale is in stored keys and in queries already. Dimensions beyond rotary_dim
// stay as they are. Immutable, thread-safe.
//
// The angle is distance * inv_freq in double; a model's own is rounded to fp32 at each position, so
// what is turned differs from what the model would have computed by up to half a unit in the last
// place of each of its two angles: 2e-4 radians below position 4,096, 0.06 at a million, in the
// fastest pairs only (tests/daemon/rotation_test.cc).
class Rotation {
 public:
  // `rope` as ValidateModelSpec accepts it.
  Rotation(const RopeSpec& rope, int32_t distance);

  int32_t distance() const { return distance_; }
  // Vectors [count][head_dim], in place: keys to where they are used.
  void TurnKeys(float* keys, size_t count, uint32_t head_dim) const;
  // The same of keys of a dtype, rounded to it.
  void TurnStoredKeys(void* keys, size_t count, uint32_t head_dim, DType dtype) const;
  // Queries back to where keys were stored.
  void TurnQueries(float* queries, size_t count, uint32_t head_dim) const;

 private:
  void Turn(float* vectors, size_t count, uint32_t head_dim, float direction) const;

  const int32_t distance_;
  const bool interleaved_;
  std::vector<float> cos_, sin_;  // [rotary_dim / 2]
};

// Of keys that stay where they are: 0, for which there need not be one.
inline int32_t DistanceOf(const Rotation* turn) { return turn == nullptr ? 0 : turn->distance(); }

}  // namespace quarry

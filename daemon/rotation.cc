#include "daemon/rotation.h"

#include <cmath>

#include "proto/half.h"

namespace quarry {

Rotation::Rotation(const RopeSpec& rope, int32_t distance)
    : distance_(distance), interleaved_(rope.interleaved) {
  for (const float frequency : rope.inv_freq) {
    const double angle = double{frequency} * distance;
    cos_.push_back(static_cast<float>(std::cos(angle)));
    sin_.push_back(static_cast<float>(std::sin(angle)));
  }
}

void Rotation::TurnKeys(float* keys, size_t count, uint32_t head_dim) const {
  Turn(keys, count, head_dim, 1.0f);
}

void Rotation::TurnStoredKeys(void* keys, size_t count, uint32_t head_dim, DType dtype) const {
  std::vector<float> wide(count * head_dim);
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = LoadAsFloat(keys, i, dtype);
  TurnKeys(wide.data(), count, head_dim);
  for (size_t i = 0; i < wide.size(); ++i) StoreFromFloat(keys, i, dtype, wide[i]);
}

void Rotation::TurnQueries(float* queries, size_t count, uint32_t head_dim) const {
  Turn(queries, count, head_dim, -1.0f);
}

void Rotation::Turn(float* vectors, size_t count, uint32_t head_dim, float direction) const {
  const size_t pairs = cos_.size();
  for (size_t n = 0; n < count; ++n) {
    float* const x = vectors + n * head_dim;
    for (size_t i = 0; i < pairs; ++i) {
      float& a = x[interleaved_ ? 2 * i : i];
      float& b = x[interleaved_ ? 2 * i + 1 : i + pairs];
      const float sine = direction * sin_[i];
      const float turned = a * cos_[i] - b * sine;
      b = b * cos_[i] + a * sine;
      a = turned;
    }
  }
}

}  // namespace quarry

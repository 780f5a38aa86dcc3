#include "cpu_index/partial.h"

#include <algorithm>
#include <cmath>

namespace quarry {
namespace {

constexpr float kEmpty = -__builtin_inff();

// e^(x - largest); an empty side has x = -infinity and weighs 0, also beside another empty one.
float Weight(float x, float largest) { return x == kEmpty ? 0.0f : std::exp(x - largest); }

}  // namespace

void Partial::Merge(const Partial& other) {
  tokens += other.tokens;
  bytes += other.bytes;
  if (other.max == kEmpty) return;
  const float largest = std::max(max, other.max);
  const float mine = Weight(max, largest), theirs = Weight(other.max, largest);
  for (size_t d = 0; d < acc.size(); ++d) acc[d] = mine * acc[d] + theirs * other.acc[d];
  sum = mine * sum + theirs * other.sum;
  doubt = mine * mine * doubt + theirs * theirs * other.doubt;
  max = largest;
}

float Partial::Finish(std::span<float> o) const {
  if (max == kEmpty) {
    std::fill(o.begin(), o.end(), 0.0f);
    return kEmpty;
  }
  const float scale = 1.0f / sum;
  for (size_t d = 0; d < o.size(); ++d) o[d] = acc[d] * scale;
  return max + std::log(sum);
}

float Partial::LogLength() const {
  double square = 0;
  for (float x : acc) square += double{x} * x;
  return square > 0 ? max + static_cast<float>(0.5 * std::log(square)) : kEmpty;
}

float Partial::RelativeError() const {
  float squares = 0;
  for (float x : acc) squares += x * x;
  return doubt > 0 ? std::sqrt(doubt / std::max(squares, 1e-30f)) : 0;
}

double ErrorRatio(double actual, double predicted) {
  constexpr double kRounding = 1e-3;
  return std::max(actual, kRounding) / std::max(predicted, kRounding);
}

void MergeFinished(std::span<float> o_a, float* lse_a, std::span<const float> o_b, float lse_b) {
  if (lse_b == kEmpty) return;
  const float largest = std::max(*lse_a, lse_b);
  const float a = Weight(*lse_a, largest), b = Weight(lse_b, largest);
  const float total = a + b;
  for (size_t d = 0; d < o_a.size(); ++d) o_a[d] = (a * o_a[d] + b * o_b[d]) / total;
  *lse_a = largest + std::log(total);
}

}  // namespace quarry

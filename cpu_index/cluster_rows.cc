#include "cpu_index/cluster_rows.h"

#include <algorithm>
#include <cmath>

#include "cpu_index/balanced_tree.h"
#include "cpu_index/run_rows.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr uint32_t kWidth = KeyCodes::kCoordinates;

}  // namespace

std::vector<float> Narrowed(std::span<const float> rows, uint32_t width) {
  std::vector<float> out(rows.size() / width * kWidth);
  const uint32_t taken = std::min(width, kWidth);
  for (size_t t = 0; t < rows.size() / width; ++t) {
    std::copy_n(rows.data() + t * width, taken, out.data() + t * kWidth);
  }
  return out;
}

std::vector<float> Differences(std::span<const float> coordinates, std::span<const uint32_t> order,
                               const NodeLevel& leaves, std::span<const float> step) {
  const size_t width = coordinates.size() / order.size();
  std::vector<float> out(coordinates.size());
  float centre[kWidth];
  for (size_t at = 0; at < order.size(); ++at) {
    if (at % kLeafRows == 0) leaves.Centre(static_cast<uint32_t>(at / kLeafRows), step, centre);
    const float* const row = coordinates.data() + order[at] * width;
    float* const difference = out.data() + at * width;
    std::copy_n(row, width, difference);
    for (size_t c = 0; c < std::min<size_t>(width, kWidth); ++c) difference[c] -= centre[c];
  }
  return out;
}

std::vector<uint16_t> RoundedToBf16(std::span<const float> numbers) {
  std::vector<uint16_t> out(numbers.size());
  std::transform(numbers.begin(), numbers.end(), out.begin(), FloatToBf16);
  return out;
}

std::vector<float> SecondMoments(std::span<const float> rows, uint32_t width) {
  std::vector<double> sum(width);
  for (size_t at = 0; at < rows.size(); at += width) {
    for (uint32_t c = 0; c < width; ++c) sum[c] += rows[at + c] * rows[at + c];
  }
  std::vector<float> out;
  for (double s : sum) {
    out.push_back(static_cast<float>(s * width / static_cast<double>(rows.size())));
  }
  return out;
}

std::vector<uint16_t> Equalise(std::span<const float> variance, std::span<float> rows) {
  constexpr float kHeld = 3;  // deviations
  const size_t width = variance.size();
  std::vector<float> inverse;
  uint32_t varying = 0;
  for (float x : variance) {
    inverse.push_back(x > 0 ? 1 / x : 0);
    varying += x > 0 ? 1 : 0;
  }
  std::vector<uint16_t> scale;
  scale.reserve(rows.size() / width + kLeafRows);
  for (size_t at = 0; at < rows.size(); at += width) {
    float squares = 0, most = 0;
    for (size_t c = 0; c < width; ++c) {
      const float square = rows[at + c] * rows[at + c] * inverse[c];
      squares += square;
      most = std::max(most, square);
    }
    const float mean = squares / static_cast<float>(std::max(1u, varying));
    scale.push_back(FloatToBf16(std::sqrt(std::max(mean, most / (kHeld * kHeld)))));
    const float s = Bf16ToFloat(scale.back());
    const float shrink = s > 0 ? 1 / s : 0;
    for (size_t c = 0; c < width; ++c) rows[at + c] *= shrink;
  }
  return scale;
}

LeafMeans MeanValues(const KvView& run, std::span<const uint32_t> order) {
  const RunRows values(run, KvPart::kValue);
  const auto n = static_cast<uint32_t>(order.size());
  LeafMeans out;
  out.head_dim = run.head_dim;
  out.rows = n;
  out.means.resize(size_t{(n + kLeafRows - 1) / kLeafRows} * run.head_dim);
  std::vector<float> value(run.head_dim);
  for (uint32_t at = 0; at < n; ++at) {
    const uint32_t leaf = at / kLeafRows;
    const float share = 1.0f / static_cast<float>(std::min(kLeafRows, n - leaf * kLeafRows));
    values.Widen(order[at], value.data());
    float* const mean = out.means.data() + size_t{leaf} * run.head_dim;
    for (uint32_t d = 0; d < run.head_dim; ++d) mean[d] += share * value[d];
  }
  return out;
}

}  // namespace quarry

#include "cpu_index/node_level.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_index/byte_weights.h"
#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr uint32_t kWidth = KeyCodes::kCoordinates;
static_assert(NodeLevel::kBlockNodes * NodeLevel::kCentreBytes == kernels::kCentroidBlockBytes);

// Later runs of the same head may lie a little farther out than those that the step was made for.
constexpr float kMargin = 1.25f;

// The mean of rows, and the sum of the coordinates' variances around it.
float MeanOf(const float* rows, size_t stride, uint32_t count, float* centre) {
  const auto width = static_cast<uint32_t>(std::min<size_t>(stride, kWidth));
  float squares[kWidth] = {};
  std::fill_n(centre, kWidth, 0.0f);
  for (uint32_t t = 0; t < count; ++t) {
    const float* const row = rows + t * stride;
    for (uint32_t c = 0; c < width; ++c) {
      centre[c] += row[c];
      squares[c] += row[c] * row[c];
    }
  }
  const float share = 1.0f / static_cast<float>(count);
  float variance = 0;
  for (uint32_t c = 0; c < kWidth; ++c) {
    centre[c] *= share;
    variance += std::max(0.0f, squares[c] * share - centre[c] * centre[c]);
  }
  return variance;
}

}  // namespace

std::vector<float> NodeLevel::StepFor(std::span<const float> rows, size_t stride,
                                      uint32_t rows_per_node) {
  const auto n = static_cast<uint32_t>(rows.size() / stride);
  std::vector<float> step(kWidth);
  float centre[kWidth];
  for (uint32_t lo = 0; lo < n; lo += rows_per_node) {
    MeanOf(rows.data() + lo * stride, stride, std::min(rows_per_node, n - lo), centre);
    for (uint32_t c = 0; c < kWidth; ++c) step[c] = std::max(step[c], std::fabs(centre[c]));
  }
  for (float& s : step) s *= kMargin / 127;
  return step;
}

NodeLevel::NodeLevel(uint32_t rows, uint32_t rows_per_node)
    : rows_(rows),
      rows_per_node_(rows_per_node),
      nodes_((rows + rows_per_node - 1) / rows_per_node),
      centres_(size_t{blocks()} * kBlockNodes * kCentreBytes, 128),
      // Lanes without a node score as low as can be.
      variance_(size_t{blocks()} * kBlockNodes, -std::numeric_limits<float>::infinity()) {}

void NodeLevel::Write(IndexWriter* out) const {
  out->PutAll(std::span<const float>(variance_).first(nodes_));
  out->PutAll(std::span<const uint8_t>(centres_));
}

absl::StatusOr<NodeLevel> NodeLevel::Read(IndexReader* in, uint32_t rows, uint32_t rows_per_node) {
  const uint64_t nodes = (uint64_t{rows} + rows_per_node - 1) / rows_per_node;
  QUARRY_RETURN_IF_ERROR(in->Want<float>(nodes));
  NodeLevel level(rows, rows_per_node);
  std::vector<float> variance;
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("variance of nodes", level.nodes_, 0, &variance));
  std::copy(variance.begin(), variance.end(), level.variance_.begin());
  QUARRY_RETURN_IF_ERROR(in->GetVector(
      uint64_t{level.blocks()} * kBlockNodes * kCentreBytes, &level.centres_));
  return level;
}

void NodeLevel::Store(uint32_t node, const float* rows, size_t stride, std::span<const float> step,
                      float lost_variance) {
  float centre[kWidth];
  variance_[node] = MeanOf(rows, stride, count(node), centre) + lost_variance;
  StoreCentre(node, centre, step);
}

void NodeLevel::StoreCentre(uint32_t node, std::span<const float> centre,
                            std::span<const float> step) {
  uint8_t* const block = centres_.data() + size_t{node / kBlockNodes} * kBlockNodes * kCentreBytes;
  for (uint32_t c = 0; c < kWidth; ++c) {
    const float steps = step[c] > 0 ? centre[c] / step[c] : 0;
    const long level = std::lround(std::clamp(steps, -127.0f, 127.0f));
    block[c / 4 * 64 + node % kBlockNodes * 4 + c % 4] = static_cast<uint8_t>(level + 128);
  }
}

void NodeLevel::Centre(uint32_t node, std::span<const float> step, std::span<float> out) const {
  const uint8_t* const block =
      centres_.data() + size_t{node / kBlockNodes} * kBlockNodes * kCentreBytes;
  for (uint32_t c = 0; c < kWidth; ++c) {
    out[c] = step[c] * (block[c / 4 * 64 + node % kBlockNodes * 4 + c % 4] - 128);
  }
}

CodedQueries NodeLevel::Prepare(std::span<const float> coordinates, size_t stride, uint32_t rank,
                                std::span<const float> mean_score, std::span<const float> step) {
  CodedQueries out;
  out.weight.resize(mean_score.size() * kWidth);
  const auto middle = [](size_t) { return -128.0f; };
  for (size_t i = 0; i < mean_score.size(); ++i) {
    const CodedScore score =
        ToByteWeights(coordinates.subspan(i * stride, rank), step, middle, mean_score[i],
                      std::span(out.weight).subspan(i * kWidth, kWidth));
    out.scale.push_back(score.scale);
    out.offset.push_back(score.offset);
  }
  return out;
}

void NodeLevel::Score(const CodedQueries& queries, std::span<const float> breadth,
                      const uint32_t* which, uint32_t blocks, float* out, size_t ld_out,
                      float* centre) const {
  if (blocks == 0) return;
  kernels::NodeTile tile{};
  tile.centroids = centres_.data();
  tile.variance = variance_.data();
  tile.which = which;
  tile.blocks = blocks;
  tile.weights = queries.weight.data();
  tile.scale = queries.scale.data();
  tile.offset = queries.offset.data();
  tile.breadth = breadth.data();
  tile.queries = static_cast<uint32_t>(queries.scale.size());
  tile.out = out;
  tile.ld_out = ld_out;
  tile.centre = centre;
  Kernels().score_nodes(tile);
}

}  // namespace quarry

#include "cpu_index/node_level.h"

#include <algorithm>
#include <cmath>

#include "cpu_index/byte_weights.h"
#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr uint32_t kWidth = KeyCodes::kCoordinates;
static_assert(NodeLevel::kBlockNodes * NodeLevel::kCentreBytes == kernels::kCentroidBlockBytes);

}  // namespace

NodeLevel::NodeLevel(uint32_t rows, uint32_t rows_per_node)
    : rows_(rows),
      rows_per_node_(rows_per_node),
      nodes_((rows + rows_per_node - 1) / rows_per_node),
      log_full_(std::log(static_cast<float>(rows_per_node))) {}

void NodeLevel::Write(IndexWriter* out) const {
  out->PutAll(std::span<const float>(step_));
  out->PutAll(std::span<const float>(variance_));
  out->PutAll(std::span<const uint8_t>(centres_));
}

absl::StatusOr<NodeLevel> NodeLevel::Read(IndexReader* in, uint32_t rows, uint32_t rows_per_node) {
  NodeLevel level(rows, rows_per_node);
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("step of centres", kWidth, 0, &level.step_));
  for (float step : level.step_) level.inverse_step_.push_back(step > 0 ? 1 / step : 0);
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("variance of nodes", level.nodes_, 0, &level.variance_));
  QUARRY_RETURN_IF_ERROR(in->GetVector(
      uint64_t{level.blocks()} * kBlockNodes * kCentreBytes, &level.centres_));
  return level;
}

NodeLevel::NodeLevel(std::span<const float> rows, uint32_t rows_per_node, float lost_variance)
    : NodeLevel(static_cast<uint32_t>(rows.size() / kWidth), rows_per_node) {
  const uint32_t n = rows_;
  centres_.assign(size_t{blocks()} * kBlockNodes * kCentreBytes, 128);
  std::vector<float> centres(size_t{nodes_} * kWidth);
  std::vector<float> largest(kWidth);
  for (uint32_t node = 0; node < nodes_; ++node) {
    const uint32_t lo = node * rows_per_node, hi = std::min(n, lo + rows_per_node);
    float* const centre = centres.data() + size_t{node} * kWidth;
    float squares[kWidth] = {};
    for (uint32_t t = lo; t < hi; ++t) {
      const float* const row = rows.data() + size_t{t} * kWidth;
      for (uint32_t c = 0; c < kWidth; ++c) {
        centre[c] += row[c];
        squares[c] += row[c] * row[c];
      }
    }
    const float share = 1.0f / static_cast<float>(hi - lo);
    float variance = 0;
    for (uint32_t c = 0; c < kWidth; ++c) {
      centre[c] *= share;
      variance += std::max(0.0f, squares[c] * share - centre[c] * centre[c]);
      largest[c] = std::max(largest[c], std::fabs(centre[c]));
    }
    variance_.push_back(variance + lost_variance);
  }
  for (uint32_t c = 0; c < kWidth; ++c) {
    step_.push_back(largest[c] / 127);
    inverse_step_.push_back(largest[c] > 0 ? 127 / largest[c] : 0);
  }
  for (uint32_t node = 0; node < nodes_; ++node) {
    StoreCentre(node, std::span(centres).subspan(size_t{node} * kWidth, kWidth));
  }
}

void NodeLevel::StoreCentre(uint32_t node, std::span<const float> centre) {
  uint8_t* const block = centres_.data() + size_t{node / kBlockNodes} * kBlockNodes * kCentreBytes;
  for (uint32_t c = 0; c < kWidth; ++c) {
    const long level = std::lround(centre[c] * inverse_step_[c]);
    block[c / 4 * 64 + node % kBlockNodes * 4 + c % 4] = static_cast<uint8_t>(level + 128);
  }
}

void NodeLevel::Centre(uint32_t node, std::span<float> out) const {
  const uint8_t* const block =
      centres_.data() + size_t{node / kBlockNodes} * kBlockNodes * kCentreBytes;
  for (uint32_t c = 0; c < kWidth; ++c) {
    out[c] = step_[c] * (block[c / 4 * 64 + node % kBlockNodes * 4 + c % 4] - 128);
  }
}

NodeLevel::Query NodeLevel::Prepare(std::span<const float> coordinates, float mean_score) const {
  Query out{};
  const auto middle = [](size_t) { return -128.0f; };
  const CodedScore score = ToByteWeights(coordinates, step_, middle, mean_score, out.weight);
  out.scale = score.scale;
  out.offset = score.offset;
  return out;
}

void NodeLevel::Score(std::span<const Query> queries, const uint32_t* which, uint32_t blocks,
                      std::span<float> out) const {
  const size_t row = size_t{blocks} * kBlockNodes;
  QUARRY_CHECK(out.size() == queries.size() * row);
  if (blocks == 0) return;
  std::vector<int8_t> weights;
  for (const Query& query : queries) {
    weights.insert(weights.end(), query.weight, query.weight + kWidth);
  }
  std::vector<int32_t> sums(out.size());
  kernels::CentroidTile tile{};
  tile.centroids = centres_.data();
  tile.which = which;
  tile.blocks = blocks;
  tile.weights = weights.data();
  tile.queries = static_cast<uint32_t>(queries.size());
  tile.out = sums.data();
  tile.ld_out = row;
  Kernels().sum_centroids(tile);
  for (size_t i = 0; i < queries.size(); ++i) {
    for (size_t t = i * row; t < (i + 1) * row; ++t) {
      out[t] = queries[i].scale * static_cast<float>(sums[t]) + queries[i].offset;
    }
  }
}

uint64_t NodeLevel::memory_bytes() const {
  return centres_.size() + 4 * (variance_.size() + step_.size());
}

}  // namespace quarry

// One level of groups of keys that lie together: their centres as bytes, and their spread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu_index/coded_queries.h"
#include "cpu_index/kernels.h"
#include "cpu_index/key_codes.h"

namespace quarry {

// Node i holds `rows_per_node` consecutive rows of a reordered run; the last one may have fewer.
// Rows lie `stride` numbers apart, of which the first KeyCodes::kCoordinates count. Immutable after
// the last Store; thread-safe then.
class NodeLevel {
 public:
  static constexpr uint32_t kBlockNodes = KeyCodes::kBlockKeys;
  static constexpr uint32_t kCentreBytes = KeyCodes::kCoordinates;
  static constexpr uint32_t kNodeBytes = kCentreBytes + sizeof(float);

  // [KeyCodes::kCoordinates] what a centre's bytes are multiples of, wide enough for the centres of
  // rows [n][stride] like these.
  static std::vector<float> StepFor(std::span<const float> rows, size_t stride,
                                    uint32_t rows_per_node);

  // Of nodes that are yet to be stored.
  NodeLevel(uint32_t rows, uint32_t rows_per_node);
  // rows: [count(node)][stride]. step: of StepFor; a centre beyond it is cut off. lost_variance: of
  // the scores, outside the coordinates.
  void Store(uint32_t node, const float* rows, size_t stride, std::span<const float> step,
             float lost_variance);

  void Write(IndexWriter* out) const;
  // Of `rows` rows. DataLoss: cut off, or numbers of no level.
  static absl::StatusOr<NodeLevel> Read(IndexReader* in, uint32_t rows, uint32_t rows_per_node);

  uint32_t nodes() const { return nodes_; }
  uint32_t blocks() const { return (nodes_ + kBlockNodes - 1) / kBlockNodes; }
  // Tokens of a node: rows_per_node but for the last.
  uint32_t count(uint32_t node) const {
    return std::min(rows_per_node_, rows_ - node * rows_per_node_);
  }
  // What a query's score of a node exceeds that of its centre by: see kernels::NodeTile.
  float Lift(uint32_t node, float breadth) const {
    return 0.5f * std::min(variance_[node] * breadth, kernels::kMostNodeVariance);
  }
  // [KeyCodes::kCoordinates] as it is stored, and so as it is scored.
  void Centre(uint32_t node, std::span<const float> step, std::span<float> out) const;

  // coordinates: [queries][stride], of which the first `rank` count; mean_score: [queries], of the
  // mean key.
  static CodedQueries Prepare(std::span<const float> coordinates, size_t stride, uint32_t rank,
                              std::span<const float> mean_score, std::span<const float> step);

  // Scores of blocks of 16 nodes: those of `which`, or of all blocks if it is null, as
  // kernels::NodeTile says; out: [queries] rows of blocks * 16, ld_out apart. Lanes behind the last
  // node hold -infinity.
  // centre: like out, of the centres alone; may be null.
  void Score(const CodedQueries& queries, std::span<const float> breadth, const uint32_t* which,
             uint32_t blocks, float* out, size_t ld_out, float* centre = nullptr) const;

  uint64_t memory_bytes() const { return centres_.size() + 4 * variance_.size(); }

 private:
  void StoreCentre(uint32_t node, std::span<const float> centre, std::span<const float> step);

  uint32_t rows_ = 0, rows_per_node_ = 0, nodes_ = 0;
  std::vector<uint8_t> centres_;  // blocks of kBlockNodes * kCentreBytes
  // [blocks * kBlockNodes] of the tokens' scores around their centre's, for a typical query.
  std::vector<float> variance_;
};

}  // namespace quarry

// One level of groups of keys that lie together: their centres as bytes, and their spread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu_index/key_codes.h"

namespace quarry {

// Node i holds `rows_per_node` consecutive rows of a reordered run; the last one may have fewer.
// Immutable after construction; thread-safe.
class NodeLevel {
 public:
  // rows: [n][KeyCodes::kCoordinates], reordered. lost_variance: of the scores, outside the
  // coordinates.
  NodeLevel(std::span<const float> rows, uint32_t rows_per_node, float lost_variance);

  void Write(IndexWriter* out) const;
  // Of `rows` rows. DataLoss: cut off, or numbers of no level.
  static absl::StatusOr<NodeLevel> Read(IndexReader* in, uint32_t rows, uint32_t rows_per_node);

  uint32_t nodes() const { return nodes_; }
  // Tokens of a node: rows_per_node but for the last.
  uint32_t count(uint32_t node) const {
    return std::min(rows_per_node_, rows_ - node * rows_per_node_);
  }
  float log_count(uint32_t node) const {
    return node + 1 < nodes_ ? log_full_ : std::log(static_cast<float>(count(node)));
  }
  // Turns the centre's score of a node into the log of the mean of e^score over its tokens, whose
  // scores are taken as normal around it. `breadth`: the variance of a query's scores inside nodes,
  // by that of a typical one.
  float Lifted(uint32_t node, float score, float breadth) const {
    return score + 0.5f * std::min(variance_[node] * breadth, kMostVariance);
  }
  float Lowered(uint32_t node, float lifted, float breadth) const {
    return 2 * lifted - Lifted(node, lifted, breadth);
  }
  // [KeyCodes::kCoordinates] as it is stored, and so as it is scored.
  void Centre(uint32_t node, std::span<float> out) const;

  // A query's weights of the centres' bytes.
  struct Query {
    int8_t weight[KeyCodes::kCoordinates];
    float scale = 0, offset = 0;
  };
  // coordinates: [rank] of the query; mean_score: of the mean key.
  Query Prepare(std::span<const float> coordinates, float mean_score) const;

  // Scores of the centres of blocks of 16 nodes: those of `which`, or of all blocks if it is null.
  // out: [queries][blocks * 16]; lanes behind the last node hold anything finite.
  void Score(std::span<const Query> queries, const uint32_t* which, uint32_t blocks,
             std::span<float> out) const;

  uint32_t blocks() const { return (nodes_ + kBlockNodes - 1) / kBlockNodes; }
  uint64_t memory_bytes() const;

  // Beyond it the tail of a normal distribution says nothing about 16 or 256 tokens.
  static constexpr float kMostVariance = 6;
  static constexpr uint32_t kBlockNodes = KeyCodes::kBlockKeys;
  static constexpr uint32_t kCentreBytes = KeyCodes::kCoordinates;

 private:
  NodeLevel(uint32_t rows, uint32_t rows_per_node);
  void StoreCentre(uint32_t node, std::span<const float> centre);

  uint32_t rows_ = 0, rows_per_node_ = 0, nodes_ = 0;
  float log_full_ = 0;                      // of rows_per_node
  std::vector<float> step_, inverse_step_;  // [kCoordinates]
  std::vector<uint8_t> centres_;            // blocks of kBlockNodes * kCentreBytes
  // [nodes] of the tokens' scores around their centre's, for a typical query.
  std::vector<float> variance_;
};

}  // namespace quarry

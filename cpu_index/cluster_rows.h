// What clustered indexes are made of: keys and values of a run in the order of its tree.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu_index/key_index.h"
#include "cpu_index/balanced_tree.h"
#include "cpu_index/node_level.h"
#include "cpu_index/query_basis.h"
#include "cpu_index/run_rows.h"

namespace quarry {

// [tokens] within the run: every leaf's tokens, and every super's, lie close together in the
// coordinates of the basis.
std::vector<uint32_t> TreeOrder(const KvView& run, const QueryBasis& basis);

// Keys in the coordinates of a basis, some at a time. What it is made of outlives it; not
// thread-safe.
class OrderedKeys {
 public:
  OrderedKeys(const KvView& run, std::span<const uint32_t> order, const QueryBasis& basis);
  // out: [hi - lo][head_dim] of the places [lo, hi) of the order.
  void Read(uint32_t lo, uint32_t hi, float* out);

 private:
  const std::span<const uint32_t> order_;
  const RunRows rows_;
  const size_t row_bytes_;
  KeyProjection projection_;
  std::vector<std::byte> keys_;
};

// Values of one super and their means. What it is made of outlives it; not thread-safe.
class OrderedValues {
 public:
  OrderedValues(const KvView& run, std::span<const uint32_t> order);
  void Read(uint32_t super);

  // Since the last Read; tokens and leaves are counted within the super.
  uint32_t tokens() const { return tokens_; }
  uint32_t leaves() const { return (tokens_ + kLeafRows - 1) / kLeafRows; }
  uint32_t leaf_tokens(uint32_t leaf) const {
    return std::min(kLeafRows, tokens_ - leaf * kLeafRows);
  }
  // [leaf_tokens][head_dim]
  const float* Leaf(uint32_t leaf) const { return Row(values_, leaf * kLeafRows); }
  const float* LeafMean(uint32_t leaf) const { return Row(leaf_means_, leaf); }  // [head_dim]
  const std::vector<float>& mean() const { return mean_; }                       // [head_dim]

 private:
  const float* Row(const std::vector<float>& rows, uint32_t row) const {
    return rows.data() + size_t{row} * mean_.size();
  }

  const std::span<const uint32_t> order_;
  const RunRows rows_;
  const size_t row_bytes_;
  uint32_t tokens_ = 0;
  std::vector<float> values_, leaf_means_, mean_;
};

// Stores a leaf's centre, of step and lost_variance as NodeLevel::Store says, and takes it, as it
// is scored, from the leaf's rows [tokens][width].
void StoreLeaf(uint32_t leaf, uint32_t width, std::span<const float> step, float lost_variance,
               float* rows, NodeLevel* leaves);

std::vector<uint16_t> RoundedToBf16(std::span<const float> numbers);

// [width] mean squares of rows.
std::vector<float> SecondMoments(std::span<const float> rows, uint32_t width);

// Makes rows equally long, relative to the variance of each coordinate, but for those that one
// coordinate would carry past what quantisers hold.
class Equaliser {
 public:
  explicit Equaliser(std::span<const float> variance);
  // rows: [scale.size()][width]; scale: bf16, by what factor each was longer.
  void Equalise(std::span<float> rows, std::span<uint16_t> scale) const;

 private:
  std::vector<float> inverse_deviation_;  // [width]
  float varying_ = 0;                     // coordinates
};

}  // namespace quarry

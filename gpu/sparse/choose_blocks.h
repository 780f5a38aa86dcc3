// Key blocks that a row tile attends, by means of keys.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpu/sparse/build_index.h"

namespace quarry {

// Mean keys of whole blocks of 64 tokens from token 0: [tokens / 64][head_dim].
class BlockMeans {
 public:
  BlockMeans() = default;
  BlockMeans(const LayerKv& layer, uint32_t head, uint32_t tokens);
  const float* data() const { return means_.data(); }
  // out: [head_dim]
  static void Mean(const LayerKv& layer, uint32_t head, TokenRange keys, float* out);

 private:
  std::vector<float> means_;
};

// One head's, row tile by row tile. A row scores the blocks that begin at or before it. A block's
// mean takes in keys that are behind the row only where the block is always in, and none behind the
// row tile: what there is of later tokens, and so how a prefill is cut, does not show.
class BlockChooser {
 public:
  // `inputs`, `means` and `pattern`, of blocks, outlive it.
  BlockChooser(const IndexInputs& inputs, uint32_t head, const BlockMeans& means,
               const Pattern& pattern);

  // Rising; valid until the next call. O(queries * blocks * head_dim): 2 queries for block-sparse,
  // all rows' for block-scored.
  std::span<const uint32_t> Choose(TokenRange rows);

  // What running `sparse` of `dense` tiles is taken to cost, with the choosing.
  uint64_t Eighths(uint32_t sparse, uint32_t dense) const;

 private:
  void Score(const float* q, uint32_t queries, uint32_t blocks);
  void Pooled(TokenRange rows, uint32_t most);
  void Scored(TokenRange rows, double threshold);
  const float* Query(uint32_t token) const;

  const IndexInputs& in_;
  const uint32_t head_;
  const BlockMeans& means_;
  const Pattern& pattern_;
  std::vector<float> q_, scores_;  // scores_: [queries][blocks]
  TokenRange last_keys_;           // of the block that the row tile ends in; may be empty
  std::vector<float> last_mean_;
  std::vector<double> weight_;  // [blocks]; infinite: always in
  std::vector<uint32_t> chosen_;
};

}  // namespace quarry

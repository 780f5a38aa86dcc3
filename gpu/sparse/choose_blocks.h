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

// One head's weights of key blocks, row tile by row tile. A row scores the blocks that begin at or
// before it. A block's mean takes in keys that are behind the row only where the block is always
// in, and none behind the row tile: what there is of later tokens, and so how a prefill is cut,
// does not show.
class BlockWeights {
 public:
  // `inputs`, `means` and `pattern`, of blocks, outlive it.
  BlockWeights(const IndexInputs& inputs, uint32_t head, const BlockMeans& means,
               const Pattern& pattern);

  // Of the blocks that begin before the row tile's end. Block-sparse: the mass that its mean
  // queries have there, one for each 64 rows. Block-scored: infinite where a row asks for the
  // block, else 0. O(queries * blocks * head_dim): 2 queries for block-sparse, all rows' for
  // block-scored.
  std::vector<double> Of(TokenRange rows);

 private:
  void Score(const float* q, uint32_t queries, uint32_t blocks);
  void Pooled(TokenRange rows);
  void Scored(TokenRange rows, double threshold);
  const float* Query(uint32_t token) const;

  const IndexInputs& in_;
  const uint32_t head_;
  const BlockMeans& means_;
  const Pattern& pattern_;
  std::vector<float> q_, scores_;  // scores_: [queries][blocks]
  TokenRange last_keys_;           // of the block that the row tile ends in; may be empty
  std::vector<float> last_mean_;
  std::vector<double> weight_;  // [blocks]
};

// Queries that share a mean in block-sparse patterns.
inline constexpr uint32_t kPooledRows = 64;

// The blocks that a row tile attends by their weights, rising: those that are always in, the first
// one and those of the row tile's own keys, and of block-sparse patterns as many more as there are
// to be.
std::vector<uint32_t> ChooseBlocks(const Pattern& pattern, TokenRange rows,
                                   std::vector<double> weights);

// What running `sparse` of `dense` tiles is taken to cost, with the choosing.
uint64_t BlockEighths(const Pattern& pattern, uint32_t sparse, uint32_t dense);
// Whether a row tile of so many blocks runs sparse.
bool BlocksAreCheaper(const Pattern& pattern, uint32_t sparse, uint32_t dense,
                      DenseFallback fallback);

}  // namespace quarry

#include "gpu/sparse/choose_blocks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <variant>

#include "cpu_index/simd.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr double kAlwaysIn = std::numeric_limits<double>::infinity();

}  // namespace

BlockMeans::BlockMeans(const LayerKv& layer, uint32_t head, uint32_t tokens) {
  means_.resize(size_t{tokens / kKeyTile} * layer.head_dim);
  for (uint32_t b = 0; b < tokens / kKeyTile; ++b) {
    Mean(layer, head, {b * kKeyTile, (b + 1) * kKeyTile}, &means_[size_t{b} * layer.head_dim]);
  }
}

void BlockMeans::Mean(const LayerKv& layer, uint32_t head, TokenRange keys, float* out) {
  const uint32_t d = layer.head_dim;
  const std::byte* const k = layer.Keys(head);
  std::vector<double> sum(d, 0.0);
  for (uint32_t j = keys.lo; j < keys.hi; ++j) {
    for (uint32_t i = 0; i < d; ++i) sum[i] += LoadAsFloat(k, size_t{j} * d + i, layer.dtype);
  }
  for (uint32_t i = 0; i < d; ++i) out[i] = static_cast<float>(sum[i] / keys.size());
}

BlockWeights::BlockWeights(const IndexInputs& inputs, uint32_t head, const BlockMeans& means,
                           const Pattern& pattern)
    : in_(inputs), head_(head), means_(means), pattern_(pattern) {}

const float* BlockWeights::Query(uint32_t token) const {
  return in_.q + (size_t{token - in_.first_token} * in_.layer.heads + head_) * in_.layer.head_dim;
}

std::vector<double> BlockWeights::Of(TokenRange rows) {
  weight_.assign(KeyTilesOf(rows.hi), 0);
  last_keys_ = {rows.hi / kKeyTile * kKeyTile, rows.hi};
  last_mean_.resize(in_.layer.head_dim);
  if (!last_keys_.empty()) BlockMeans::Mean(in_.layer, head_, last_keys_, last_mean_.data());
  if (const auto* p = std::get_if<BlockScoredPattern>(&pattern_)) {
    Scored(rows, p->threshold);
  } else {
    Pooled(rows);
  }
  return std::move(weight_);
}

void BlockWeights::Score(const float* q, uint32_t queries, uint32_t blocks) {
  scores_.resize(size_t{queries} * blocks);
  kernels::ScoreTile tile{};
  tile.q = q;
  tile.queries = queries;
  tile.head_dim = in_.layer.head_dim;
  tile.k = means_.data();
  tile.tokens = std::min(blocks, last_keys_.lo / kKeyTile);
  tile.dtype = kernels::kFp32;
  tile.scale = 1.0f / std::sqrt(static_cast<float>(in_.layer.head_dim));
  tile.out = scores_.data();
  tile.ld_out = blocks;
  if (tile.tokens > 0) Kernels().score(tile);
  if (tile.tokens == blocks) return;
  tile.out += tile.tokens;
  tile.k = last_mean_.data();
  tile.tokens = 1;
  Kernels().score(tile);
}

// Adds, for each 64 rows, the softmax over the blocks by the mean query.
void BlockWeights::Pooled(TokenRange rows) {
  const uint32_t d = in_.layer.head_dim;
  for (uint32_t lo = rows.lo; lo < rows.hi; lo += kPooledRows) {
    const TokenRange pooled{lo, std::min(lo + kPooledRows, rows.hi)};
    std::vector<double> sum(d, 0.0);
    for (uint32_t token = pooled.lo; token < pooled.hi; ++token) {
      for (uint32_t i = 0; i < d; ++i) sum[i] += Query(token)[i];
    }
    q_.resize(d);
    for (uint32_t i = 0; i < d; ++i) q_[i] = static_cast<float>(sum[i] / pooled.size());
    const uint32_t blocks = KeyTilesOf(pooled.hi);
    Score(q_.data(), 1, blocks);
    const float most_score = Kernels().max(scores_.data(), blocks);
    const float total = Kernels().exp_sum(scores_.data(), blocks, most_score);
    for (uint32_t b = 0; b < blocks; ++b) weight_[b] += scores_[b] / total;
  }
}

void BlockWeights::Scored(TokenRange rows, double threshold) {
  const uint32_t d = in_.layer.head_dim, blocks = KeyTilesOf(rows.hi);
  q_.resize(size_t{rows.size()} * d);
  for (uint32_t token = rows.lo; token < rows.hi; ++token) {
    std::copy_n(Query(token), d, &q_[size_t{token - rows.lo} * d]);
  }
  Score(q_.data(), rows.size(), blocks);
  const auto below = static_cast<float>(std::log(threshold));
  for (uint32_t token = rows.lo; token < rows.hi; ++token) {
    const float* const scores = &scores_[size_t{token - rows.lo} * blocks];
    const uint32_t seen = KeyTilesOf(token + 1);
    const float least = Kernels().max(scores, seen) + below;
    for (uint32_t b = 0; b < seen; ++b) {
      if (scores[b] >= least) weight_[b] = kAlwaysIn;
    }
  }
}

std::vector<uint32_t> ChooseBlocks(const Pattern& pattern, TokenRange rows,
                                   std::vector<double> weights) {
  weights[0] = kAlwaysIn;
  for (uint32_t b = rows.lo / kKeyTile; b < weights.size(); ++b) weights[b] = kAlwaysIn;
  const auto forced = static_cast<uint32_t>(std::count(weights.begin(), weights.end(), kAlwaysIn));
  const auto* const pooled = std::get_if<BlockSparsePattern>(&pattern);
  const size_t count =
      std::min<size_t>(std::max(pooled != nullptr ? pooled->blocks : 0, forced), weights.size());
  std::vector<uint32_t> chosen(weights.size());
  std::iota(chosen.begin(), chosen.end(), 0u);
  const auto before = [&](uint32_t a, uint32_t b) {
    return weights[a] != weights[b] ? weights[a] > weights[b] : a < b;
  };
  const auto end = chosen.begin() + static_cast<std::ptrdiff_t>(count);
  if (end != chosen.end()) std::nth_element(chosen.begin(), end, chosen.end(), before);
  chosen.resize(count);
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

uint64_t BlockEighths(const Pattern& pattern, uint32_t sparse, uint32_t dense) {
  // 128 queries against a block's mean key, without values: half of a 64th of a tile.
  const bool scored = std::holds_alternative<BlockScoredPattern>(pattern);
  return kSparseTileEighths * sparse + (scored ? dense / 16 : 0);
}

bool BlocksAreCheaper(const Pattern& pattern, uint32_t sparse, uint32_t dense,
                      DenseFallback fallback) {
  return sparse < dense && (fallback == DenseFallback::kNever ||
                            BlockEighths(pattern, sparse, dense) < 8 * uint64_t{dense});
}

}  // namespace quarry

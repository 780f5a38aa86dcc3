// Tokens of one layer and KV head in blocks of a store, without an engine.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "daemon/held_block.h"
#include "daemon/kv_segments.h"
#include "daemon/run_registry.h"
#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {

// Random keys and values, and queries of one group.
class HeldTokens {
 public:
  static constexpr KvShape kShape = {
      .layers = 1, .heads = 2, .kv_heads = 1, .head_dim = 16, .dtype = DType::kFp32};

  explicit HeldTokens(uint32_t tokens) : random_(SteadySeed()) {
    BlockStoreOptions options;
    options.arena.capacity_bytes = 16 << 20;
    options.arena.extent_bytes = 1 << 20;
    options.arena.huge_pages = ArenaOptions::HugePages::kNever;
    options.arena.prefault = false;
    store_ = *BlockStore::Create(options);
    const uint64_t bytes = kShape.bytes_per_token() * kBlockTokens;
    const uint32_t count = (tokens + kBlockTokens - 1) / kBlockTokens;
    EXPECT_OK(store_->Reserve("t", bytes, count));
    for (uint32_t b = 0; b < count; ++b) {
      blocks_.push_back(
          std::make_shared<HeldBlock>(*store_, *store_->Begin("t", bytes), BlockOrigin{}));
      for (uint64_t at = 0; at < bytes; at += 4) {
        const float x = normal_(random_);
        std::memcpy(blocks_.back()->writable() + at, &x, 4);
      }
    }
  }

  // [positions][heads][head_dim]
  std::vector<float> Queries(uint32_t positions) {
    std::vector<float> q(size_t{positions} * kShape.heads * kShape.head_dim);
    for (float& x : q) x = normal_(random_);
    return q;
  }
  std::shared_ptr<const quarry::Run> RunOf(TokenRange tokens) const {
    const auto at = [&](uint32_t block) { return blocks_.begin() + block; };
    return quarry::Run::Make(
        tokens,
        std::vector<std::shared_ptr<HeldBlock>>(at(tokens.lo / kBlockTokens),
                                                at((tokens.hi - 1) / kBlockTokens + 1)),
        std::make_shared<RunIndexes>(kShape));
  }
  // Whose blocks begin with that of the first token.
  std::unique_ptr<KvSegments> Segments(TokenRange tokens) const {
    const uint32_t first = tokens.lo / kBlockTokens;
    return std::make_unique<KvSegments>(kShape, 0, 0, tokens, &blocks_[first], first);
  }
  std::span<const std::shared_ptr<HeldBlock>> blocks() const { return blocks_; }

  // The sums of e^score * value, with that of e^score behind them; q: [head_dim].
  std::vector<double> Sums(std::span<const float> q,
                           std::initializer_list<TokenRange> ranges) const {
    std::vector<double> sums(kShape.head_dim + 1);
    for (const TokenRange& range : ranges) {
      for (uint32_t t = range.lo; t < range.hi; ++t) {
        double score = 0;
        for (uint32_t d = 0; d < kShape.head_dim; ++d) {
          score += double{q[d]} * Vector(KvPart::kKey, t)[d];
        }
        const double weight = std::exp(score / std::sqrt(static_cast<double>(kShape.head_dim)));
        for (uint32_t d = 0; d < kShape.head_dim; ++d) {
          sums[d] += weight * Vector(KvPart::kValue, t)[d];
        }
        sums.back() += weight;
      }
    }
    return sums;
  }

 private:
  const float* Vector(KvPart part, uint32_t token) const {
    const std::byte* block = blocks_[token / kBlockTokens]->data();
    return reinterpret_cast<const float*>(block + kShape.strip_offset(0, part, 0) +
                                          token % kBlockTokens * kShape.vector_bytes());
  }

  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
  std::unique_ptr<BlockStore> store_;
  std::vector<std::shared_ptr<HeldBlock>> blocks_;
};

}  // namespace quarry

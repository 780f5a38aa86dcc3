// BlockTable: where a context's tokens lie, as one immutable snapshot.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "daemon/held_block.h"
#include "daemon/rotation.h"
#include "proto/types.h"

namespace quarry {

class Run;

// The part of a run that a context searches: all of it, or up to where a fork left it.
struct RunUse {
  std::shared_ptr<const Run> run;
  TokenRange tokens;  // as the context counts them
  // From the run's own position to the context's, for which queries are turned back; null: it is at
  // its own.
  std::shared_ptr<const Rotation> turn = nullptr;
};

// Tokens that were computed at another position or behind other text: whole blocks, whose keys are
// as they were stored, so that who reads them turns queries, or what it reads; or a fork's copy of
// a part of one, at distance 0.
struct PlacedStretch {
  TokenRange tokens;
  std::shared_ptr<const Rotation> turn;  // from there to here; its distance may be 0
};

// Held by shared_ptr: an attend reads the snapshot it started with while the context swaps in
// the next one (a block won by an earlier writer, a run built in the background).
struct BlockTable {
  std::vector<std::shared_ptr<HeldBlock>> blocks;  // of max_tokens, from token 0
  std::vector<RunUse> runs;  // disjoint, in token order; each in a placed stretch, or in none
  std::vector<PlacedStretch> placed;  // disjoint, in token order
  // Behind the last block that is paged; 0: none is. Blocks before it may be in memory.
  uint32_t paged_end = 0;

  void FindPaged() {
    paged_end = 0;
    for (size_t b = blocks.size(); b > 0 && paged_end == 0; --b) {
      if (blocks[b - 1]->paged() != nullptr) paged_end = static_cast<uint32_t>(b) * kBlockTokens;
    }
  }
  // Those that hold the tokens, of which there are some.
  std::span<const std::shared_ptr<HeldBlock>> BlocksOf(TokenRange tokens) const {
    const uint32_t first = tokens.lo / kBlockTokens, last = (tokens.hi - 1) / kBlockTokens;
    return std::span(blocks).subspan(first, last - first + 1);
  }
  // The stretch that holds the token; null: it is the context's own or of its prefix.
  const PlacedStretch* PlacedAt(uint32_t token) const {
    const auto next = std::upper_bound(
        placed.begin(), placed.end(), token,
        [](uint32_t t, const PlacedStretch& stretch) { return t < stretch.tokens.hi; });
    return next != placed.end() && next->tokens.lo <= token ? &*next : nullptr;
  }
  // How the token's key is to be turned; null: not at all.
  const Rotation* TurnAt(uint32_t token) const {
    const PlacedStretch* const stretch = PlacedAt(token);
    return stretch == nullptr || stretch->turn->distance() == 0 ? nullptr : stretch->turn.get();
  }
  // Where a stretch begins or ends next, behind the token: up to there keys are turned alike.
  uint32_t NextEdge(uint32_t token) const {
    for (const PlacedStretch& stretch : placed) {
      if (token < stretch.tokens.lo) return stretch.tokens.lo;
      if (token < stretch.tokens.hi) return stretch.tokens.hi;
    }
    return ~0u;
  }
  // Of the range.
  uint32_t PlacedTokens(TokenRange range) const {
    uint32_t tokens = 0;
    for (const PlacedStretch& stretch : placed) tokens += Intersect(stretch.tokens, range).size();
    return tokens;
  }
};

}  // namespace quarry

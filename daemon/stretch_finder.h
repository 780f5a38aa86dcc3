// StretchFinder: what of a prompt beyond its cached prefix is cached elsewhere.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "daemon/held_block.h"
#include "daemon/prefix_index.h"
#include "daemon/stretch_index.h"
#include "proto/kv_types.h"
#include "storage/block_store.h"

namespace quarry {

// Blocks that followed one another where they were computed, leased.
struct StretchMatch {
  uint32_t first_block = 0;  // where they stand in for the prompt's own
  int32_t shift = 0;         // its position there less that of their own, in tokens
  std::vector<std::shared_ptr<HeldBlock>> blocks;
};

// One search, for one Open; not thread-safe. The request outlives it.
class StretchFinder {
 public:
  StretchFinder(BlockStore& store, const StretchIndex& index, std::string_view tenant,
                const OpenRequest& request);

  // In token order, behind the prefix, whole blocks; leaves the last token to compute. At each
  // block that nothing covers yet: what was computed behind the same placed blocks before, else the
  // longest of the stretches that begin with its content. Cost: one SHA-256 of about 1 KiB per
  // block, place and accepted recipe tried.
  std::vector<StretchMatch> Find(const PrefixMatch& prefix);

 private:
  std::span<const uint32_t> TokensOf(uint32_t block) const;
  // From `place` on, at `block`; with the recipes of `origins`.
  StretchMatch Follow(uint32_t block, const StretchPlace& place,
                      std::span<const BlockOrigin> origins) const;
  StretchMatch Longest(uint32_t block) const;

  BlockStore& store_;
  const StretchIndex& index_;
  const std::string tenant_;
  const OpenRequest& request_;
  const uint32_t whole_blocks_;
  std::vector<BlockOrigin> origins_;  // by accepted recipe, in order of preference
  std::vector<BlockOrigin> behind_;   // the same, computed behind placed blocks
};

}  // namespace quarry

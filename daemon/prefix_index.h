// PrefixIndex: the longest prefix of a prompt whose KV is cached.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "daemon/held_block.h"
#include "proto/kv_types.h"
#include "storage/block_store.h"

namespace quarry {

// The store's key of the block of kBlockTokens `tokens` that follows `parent`. The full key also
// holds the shape, so that KV of another shape or dtype under the same identity is a miss.
BlockKey ContextBlockKey(const BlockId& parent, const NamespaceDigest& name_space,
                         const KvShape& shape, std::span<const uint32_t> tokens,
                         std::span<const InputDigest> inputs);

// Identity of what a context of `spec` appends under `recipe`.
BlockOrigin OriginOf(std::string_view tenant, const ModelSpec& spec, const NumericRecipe& recipe);

// The rule for multimodal inputs: all of them belong to block 0, and through the parent's id to
// every later block.
std::span<const InputDigest> InputsOfBlock(std::span<const InputDigest> inputs, uint32_t block);

// Whole blocks of a prompt that may be reused: the last token is always computed, since its logits
// are what the worker wants.
inline uint32_t WholeBlocksOf(std::span<const uint32_t> tokens) {
  return tokens.empty() ? 0 : static_cast<uint32_t>((tokens.size() - 1) / kBlockTokens);
}

struct PrefixMatch {
  std::vector<std::shared_ptr<HeldBlock>> blocks;  // whole blocks from token 0, leased
  bool dense = true;                               // all of them
  // Those behind them that max_load_ms left on the disk, or in RAM behind such.
  uint32_t unloaded_blocks = 0;
  uint64_t unloaded_bytes = 0;  // on the disk
};

// Where a context's blocks of a prefix are used. What the disk lacks is in RAM always.
enum class PrefixUse {
  kInRam,      // what RAM has no room for is used on the disk
  kRunsPaged,  // runs are used on the disk; what lies before and behind them, which attends read
               // whole, is in RAM as far as there is room
  kPaged,      // all of it is used on the disk
};

// A block that is cached.
struct PrefixBlock {
  BlockKey key;
  BlockPlace place;
};

// Walks the chain of block ids; the store is the index. Thread-safe.
class PrefixIndex {
 public:
  explicit PrefixIndex(BlockStore& store) : store_(store) {}

  // At each block the accepted recipes are tried in order. Leaves at least one token to compute.
  // in_runs: the tokens that runs hold of a prefix of so many, for kRunsPaged.
  // Cost: one SHA-256 of about 1 KiB per block and recipe tried.
  PrefixMatch FindAndLease(std::string_view tenant, const OpenRequest& request, PrefixUse use,
                           absl::FunctionRef<TokenRange(uint32_t tokens)> in_runs) const;
  // The same blocks by where they are; nothing is leased or read, and max_load_ms does not count.
  std::vector<PrefixBlock> Locate(std::string_view tenant, const OpenRequest& request) const;

 private:
  // Offers the keys of each block in turn to `found`, until it takes none: the key of one that it
  // takes is the parent of the next block's.
  void Walk(std::string_view tenant, const OpenRequest& request,
            absl::FunctionRef<bool(const BlockKey&, const BlockOrigin&)> found) const;

  BlockStore& store_;
};

}  // namespace quarry

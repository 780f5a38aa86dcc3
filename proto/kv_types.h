// Plain types of the store interface. The gRPC services, the shared-memory calls, the client
// library and the engine speak these; proto/convert.h is the only place where they meet wire
// messages.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "proto/model_spec.h"
#include "proto/types.h"

namespace quarry {

struct OpenRequest {
  ModelSpec spec;
  std::vector<uint32_t> tokens;       // the prompt known so far: prefix search, and known ids
  std::vector<InputDigest> inputs;    // multimodal inputs, in order; all hashed into the first
                                      // block's id, thereby into every block's
  uint32_t max_tokens = 0;            // room reserved; pins the LongRoPE regime
  NumericRecipe recipe;               // of the K/V this context will append
  std::vector<NumericRecipe> accepts; // of cached prefixes, in order of preference
  // Beyond the prefix, whole blocks of the prompt that are cached at another position or behind
  // other text may stand in for its own: approximate, see OpenResult::shifted.
  bool reuse_shifted = false;
  // Of the prefix, what is on the disk is loaded while that is expected to take no longer
  // altogether; the rest is left to be computed. None: all of it is loaded. 0: nothing.
  std::optional<double> max_load_ms;
};

// What Open would reuse, and where it is.
struct LongestPrefix {
  uint32_t tokens = 0;
  std::vector<BlockId> blocks;
  uint32_t ram_tokens = 0;      // of those, in RAM
  uint64_t load_bytes = 0;      // of the others
  double expected_load_ms = 0;  // until they are in RAM
};

// Tokens of a context whose KV was computed elsewhere, whole blocks.
struct ShiftedRange {
  TokenRange tokens;    // in the context
  int32_t shift = 0;    // its position less the one they were computed at, in tokens; a multiple of
                        // kBlockTokens. 0: at the same position, behind other text
  friend bool operator==(const ShiftedRange&, const ShiftedRange&) = default;
};

struct OpenResult {
  ContextId context;
  uint32_t reused_tokens = 0;         // whole blocks, leased; the worker appends from here
  std::vector<BlockId> reused_blocks;
  // Behind the reused ones, what max_load_ms left on the disk, and how long its loading is expected
  // to take.
  uint32_t unloaded_tokens = 0;
  double expected_load_ms = 0;
  // True when the reused prefix was all computed densely.
  bool reused_dense = true;
  // With reuse_shifted: what else of the prompt is there, disjoint and in token order, beyond
  // reused_tokens. The worker computes the tokens between and skips these.
  std::vector<ShiftedRange> shifted;
};

// K and V of some tokens of one layer, for a range of KV heads.
struct AppendRequest {
  ContextId context;
  uint32_t layer = 0;
  uint32_t first_kv_head = 0;
  uint32_t kv_heads = 0;
  TokenRange range;       // must start at the layer's next token for these heads
  const void* k = nullptr;  // [token][kv_head][head_dim] of the context's dtype
  const void* v = nullptr;
  // The ids of `range` (checked against those known), or of [known, range.hi), or none: blocks
  // with unknown ids are not published.
  std::span<const uint32_t> new_token_ids;
  // Optional query samples for index building: [samples][heads of the KV heads][head_dim] fp32,
  // finite, with positions below max_tokens.
  const float* query_samples = nullptr;
  std::span<const uint32_t> query_positions;
};

struct ForkRequest {
  ContextId context;
  uint32_t tokens = 0;      // the fork shares [0, tokens); at most what is complete in all layers
  uint32_t max_tokens = 0;
  NumericRecipe recipe;
};

struct ContextInfo {
  ContextId context;
  std::string model;
  KvShape shape;
  uint32_t tokens = 0;           // complete in all layers
  uint32_t known_tokens = 0;     // token ids known
  uint32_t shared_tokens = 0;    // of published blocks
  uint32_t max_tokens = 0;
  bool sealed = false;
  uint64_t private_bytes = 0;
  uint64_t shared_bytes = 0;
  uint32_t shifted_tokens = 0;   // reused from another position or behind other text
};

// Where a leased block lies. The mapping is read-only; the bytes stay until the lease ends.
struct BlockLease {
  LeaseId lease;
  uint32_t extent = 0;        // index of the extent's descriptor in the channel
  uint64_t offset = 0;        // within the extent
  uint64_t bytes = 0;
  ByteDigest digest;
};

struct PinRequest {
  std::string name;                 // of the pin; one owner per (tenant, name)
  std::vector<BlockId> blocks;      // or the blocks of a context
  std::optional<ContextId> context;
  uint64_t ttl_ms = 0;              // 0: until unpinned
};

// Which blocks are to survive a restart; exactly one is set.
struct FlushRequest {
  bool whole_tenant = false;         // everything that is in RAM
  std::optional<ContextId> context;  // its full blocks
  std::vector<BlockId> blocks;
};

// How far that is. All durable: the other counts are 0.
struct FlushResult {
  uint64_t durable_blocks = 0, durable_bytes = 0;
  uint64_t leading_blocks = 0;  // of those that were named, durable from the first on
  uint64_t pending_blocks = 0;  // on their way to the disk, or to its queue: ask again
  uint64_t refused_blocks = 0;  // the disk does not take them now, or never
  uint64_t missing_blocks = 0;  // in no tier; of blocks that were named
  std::string refusal;          // why it does not
  uint32_t tokens = 0;          // of the context, from its first, that are durable
};

struct PurgeRequest {
  // Exactly one is set: everything of the caller's tenant, one namespace, or some blocks.
  bool whole_tenant = false;
  std::optional<NamespaceDigest> name_space;
  std::vector<BlockId> blocks;
};

}  // namespace quarry

#include "daemon/prefix_index.h"

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "absl/time/time.h"
#include "proto/identity.h"

namespace quarry {
namespace {

template <typename T>
void AppendRaw(std::string* out, std::span<const T> values) {
  static_assert(std::is_trivially_copyable_v<T>);
  out->append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
}

}  // namespace

std::span<const InputDigest> InputsOfBlock(std::span<const InputDigest> inputs, uint32_t block) {
  return block == 0 ? inputs : std::span<const InputDigest>();
}

BlockKey ContextBlockKey(const BlockId& parent, const NamespaceDigest& name_space,
                         const KvShape& shape, std::span<const uint32_t> tokens,
                         std::span<const InputDigest> inputs) {
  BlockKey key;
  key.id = BlockIdOf(parent, name_space, tokens, inputs);
  key.parent = parent;
  key.name_space = name_space;
  const uint32_t numbers[] = {shape.layers,
                              shape.heads,
                              shape.kv_heads,
                              shape.head_dim,
                              static_cast<uint32_t>(shape.dtype),
                              static_cast<uint32_t>(tokens.size()),
                              static_cast<uint32_t>(inputs.size())};
  key.full_key = "context";
  AppendRaw<uint32_t>(&key.full_key, numbers);
  AppendRaw<uint8_t>(&key.full_key, parent.bytes);
  AppendRaw<uint8_t>(&key.full_key, name_space.bytes);
  AppendRaw<uint32_t>(&key.full_key, tokens);
  for (const InputDigest& input : inputs) AppendRaw<uint8_t>(&key.full_key, input.bytes);
  return key;
}

BlockOrigin OriginOf(std::string_view tenant, const ModelSpec& spec, const NumericRecipe& recipe) {
  NamespaceFields fields;
  fields.tenant = std::string(tenant);
  fields.weights = spec.weights;
  fields.tokenizer = spec.tokenizer;
  fields.adapters = spec.adapters;
  fields.rope = RopeSignatureOf(spec.rope);
  fields.recipe = recipe.digest;
  return {NamespaceDigestOf(fields), recipe.dense(), true};
}

void PrefixIndex::Walk(std::string_view tenant, const OpenRequest& request,
                       absl::FunctionRef<bool(const BlockKey&, const BlockOrigin&)> found) const {
  std::vector<BlockOrigin> origins;
  for (const NumericRecipe& recipe : request.accepts) {
    origins.push_back(OriginOf(tenant, request.spec, recipe));
  }
  if (origins.empty()) origins.push_back(OriginOf(tenant, request.spec, request.recipe));

  const uint32_t whole_blocks = WholeBlocksOf(request.tokens);
  BlockId parent;
  for (uint32_t i = 0; i < whole_blocks; ++i) {
    const auto tokens = std::span(request.tokens).subspan(size_t{i} * kBlockTokens, kBlockTokens);
    const auto taken = std::ranges::find_if(origins, [&](const BlockOrigin& origin) {
      const BlockKey key = ContextBlockKey(parent, origin.name_space, request.spec.shape, tokens,
                                           InputsOfBlock(request.inputs, i));
      if (!found(key, origin)) return false;
      parent = key.id;
      return true;
    });
    if (taken == origins.end()) return;
  }
}

PrefixMatch PrefixIndex::FindAndLease(std::string_view tenant, const OpenRequest& request,
                                      PrefixUse use,
                                      absl::FunctionRef<TokenRange(uint32_t)> in_runs) const {
  PrefixMatch match;
  const absl::Duration limit = request.max_load_ms.has_value()
                                   ? absl::Milliseconds(*request.max_load_ms)
                                   : absl::InfiniteDuration();
  uint64_t load_bytes = 0;
  bool left = false;  // a block was, and so are those behind it
  const bool paged = use != PrefixUse::kInRam;
  std::vector<BlockKey> keys;
  Walk(tenant, request, [&](const BlockKey& key, const BlockOrigin& origin) {
    if (request.max_load_ms.has_value() && !paged) {
      const std::optional<BlockPlace> place = store_.Locate(tenant, key);
      if (!place.has_value()) return false;
      const uint64_t bytes = place->in_ram ? 0 : place->bytes;
      left |= bytes > 0 && store_.ExpectedLoad(load_bytes + bytes) > limit;
      if (left) {
        ++match.unloaded_blocks;
        match.unloaded_bytes += bytes;
        return true;
      }
      load_bytes += bytes;
    }
    const auto acquire = [&](bool on_disk) {
      return on_disk ? store_.AcquirePaged(tenant, key) : store_.Acquire(tenant, key);
    };
    absl::StatusOr<BlockView> view = acquire(paged);
    if (!view.ok()) view = acquire(!paged);
    if (!view.ok()) return false;
    match.blocks.push_back(std::make_shared<HeldBlock>(store_, *view, origin));
    match.dense &= origin.dense;
    keys.push_back(key);
    return true;
  });
  if (use != PrefixUse::kRunsPaged) return match;
  const TokenRange paged_tokens = in_runs(static_cast<uint32_t>(keys.size()) * kBlockTokens);
  for (uint32_t b = 0; b < keys.size(); ++b) {
    const bool in_run =
        b * kBlockTokens >= paged_tokens.lo && (b + 1) * kBlockTokens <= paged_tokens.hi;
    std::shared_ptr<HeldBlock>& block = match.blocks[b];
    if (in_run || block->paged() == nullptr) continue;
    const absl::StatusOr<BlockView> view = store_.Acquire(tenant, keys[b]);
    if (view.ok()) block = std::make_shared<HeldBlock>(store_, *view, block->origin());
  }
  return match;
}

std::vector<PrefixBlock> PrefixIndex::Locate(std::string_view tenant,
                                             const OpenRequest& request) const {
  std::vector<PrefixBlock> blocks;
  Walk(tenant, request, [&](const BlockKey& key, const BlockOrigin&) {
    const std::optional<BlockPlace> place = store_.Locate(tenant, key);
    if (!place.has_value()) return false;
    blocks.push_back({key, *place});
    return true;
  });
  return blocks;
}

}  // namespace quarry

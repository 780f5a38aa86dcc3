#include "daemon/prefix_index.h"

#include <string>
#include <type_traits>
#include <utility>

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

PrefixMatch PrefixIndex::FindAndLease(std::string_view tenant, const OpenRequest& request) const {
  std::vector<BlockOrigin> origins;
  for (const NumericRecipe& recipe : request.accepts) {
    origins.push_back(OriginOf(tenant, request.spec, recipe));
  }
  if (origins.empty()) origins.push_back(OriginOf(tenant, request.spec, request.recipe));

  PrefixMatch match;
  const uint32_t whole_blocks = WholeBlocksOf(request.tokens);
  BlockId parent;
  for (uint32_t i = 0; i < whole_blocks; ++i) {
    const auto tokens = std::span(request.tokens).subspan(size_t{i} * kBlockTokens, kBlockTokens);
    std::shared_ptr<HeldBlock> found;
    for (const BlockOrigin& origin : origins) {
      absl::StatusOr<BlockView> view =
          store_.Acquire(tenant, ContextBlockKey(parent, origin.name_space, request.spec.shape,
                                                 tokens, InputsOfBlock(request.inputs, i)));
      if (!view.ok()) continue;
      found = std::make_shared<HeldBlock>(store_, *view, origin);
      break;
    }
    if (found == nullptr) break;
    parent = found->id();
    match.dense &= found->origin().dense;
    match.blocks.push_back(std::move(found));
  }
  return match;
}

}  // namespace quarry

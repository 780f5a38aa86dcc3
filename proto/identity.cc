#include "proto/identity.h"

#include <algorithm>
#include <string_view>

#include "proto/canonical_hash.h"
#include "proto/check.h"

namespace quarry {
namespace {

// What namespaces of indexes begin with; no other does but for a chance of 2^-64.
constexpr std::string_view kIndexNamespace = "QRYINDEX";

}  // namespace

RopeSignature RopeSignatureOf(const RopeSpec& rope) {
  CanonicalHash h("quarry.rope.v1");
  h.U64(rope.inv_freq.size());
  for (float f : rope.inv_freq) h.F32(f);
  h.F32(rope.attention_scale);
  h.U32(rope.rotary_dim);
  h.U32(rope.interleaved ? 1 : 0);
  h.U32(static_cast<uint32_t>(rope.dtype));
  h.U32(static_cast<uint32_t>(rope.regime));
  return h.Finish<RopeSignature>();
}

NamespaceDigest NamespaceDigestOf(const NamespaceFields& fields) {
  CanonicalHash h("quarry.namespace.v1");
  h.Bytes(fields.tenant.data(), fields.tenant.size());
  h.Add(fields.weights);
  h.Add(fields.tokenizer);
  h.U64(fields.adapters.size());
  for (const AdapterDigest& a : fields.adapters) h.Add(a);
  h.Add(fields.rope);
  h.Add(fields.recipe);
  return h.Finish<NamespaceDigest>();
}

BlockId BlockIdOf(const BlockId& parent, const NamespaceDigest& name_space,
                  std::span<const uint32_t> tokens, std::span<const InputDigest> inputs) {
  QUARRY_CHECK(tokens.size() == kBlockTokens);
  CanonicalHash h("quarry.block.v1");
  h.Add(parent);
  h.Add(name_space);
  h.U64(tokens.size());
  for (uint32_t t : tokens) h.U32(t);
  h.U64(inputs.size());
  for (const InputDigest& d : inputs) h.Add(d);
  return h.Finish<BlockId>();
}

BlockId EngineBlockIdOf(std::string_view tenant, std::string_view engine_namespace,
                        std::string_view key) {
  CanonicalHash h("quarry.engine_block.v1");
  h.Bytes(tenant.data(), tenant.size());
  h.Bytes(engine_namespace.data(), engine_namespace.size());
  h.Bytes(key.data(), key.size());
  return h.Finish<BlockId>();
}

StretchId StretchIdOf(const NamespaceDigest& name_space, std::span<const uint32_t> tokens,
                      std::span<const InputDigest> inputs) {
  QUARRY_CHECK(tokens.size() == kBlockTokens);
  CanonicalHash h("quarry.stretch.v1");
  h.Add(name_space);
  h.U64(tokens.size());
  for (uint32_t t : tokens) h.U32(t);
  h.U64(inputs.size());
  for (const InputDigest& d : inputs) h.Add(d);
  return h.Finish<StretchId>();
}

BlockId PlacedBlockIdOf(const BlockId& parent, const BlockId& stored, int32_t shift) {
  CanonicalHash h("quarry.placed.v1");
  h.Add(parent);
  h.Add(stored);
  h.U32(static_cast<uint32_t>(shift));
  return h.Finish<BlockId>();
}

NamespaceDigest IndexNamespaceOf(const NamespaceDigest& name_space) {
  CanonicalHash h("quarry.index_namespace.v1");
  h.Add(name_space);
  auto digest = h.Finish<NamespaceDigest>();
  std::copy(kIndexNamespace.begin(), kIndexNamespace.end(), digest.bytes.begin());
  return digest;
}

bool IsIndexNamespace(const NamespaceDigest& name_space) {
  return std::equal(kIndexNamespace.begin(), kIndexNamespace.end(), name_space.bytes.begin());
}

BlockId RunIndexIdOf(std::string_view tenant, std::string_view full_key) {
  CanonicalHash h("quarry.run_index.v1");
  h.Bytes(tenant.data(), tenant.size());
  h.Bytes(full_key.data(), full_key.size());
  return h.Finish<BlockId>();
}

NumericRecipe RecipeOf(const Budget& budget, uint32_t window_first, uint32_t window_last) {
  if (budget.kind == Budget::Kind::kUnlimited) return {};
  CanonicalHash h("quarry.recipe.budget.v1");
  h.U32(static_cast<uint32_t>(budget.kind));
  h.U32(budget.k);
  h.F32(budget.kind == Budget::Kind::kTopP    ? budget.mass
        : budget.kind == Budget::Kind::kError ? budget.error
        : budget.kind == Budget::Kind::kDipr  ? budget.beta
                                              : 0.0f);
  h.U32(window_first);
  h.U32(window_last);
  if (budget.kind == Budget::Kind::kSoftmaxLift) h.U32(budget.seed);
  return {h.Finish<RecipeDigest>()};
}

NumericRecipe ShiftedRecipeOf(const NumericRecipe& recipe) {
  CanonicalHash h("quarry.recipe.shifted.v1");
  h.Add(recipe.digest);
  return {h.Finish<RecipeDigest>()};
}

}  // namespace quarry

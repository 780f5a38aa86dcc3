// Identity: what makes two pieces of KV the same. Every digest is SHA-256 over canonical,
// length-prefixed fields, so that another language can reproduce it (proto/IDENTITY.md, golden
// vectors in tests/proto/golden_identity.json).
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "proto/model_spec.h"
#include "proto/retrieval_types.h"
#include "proto/types.h"

namespace quarry {

RopeSignature RopeSignatureOf(const RopeSpec& rope);
NamespaceDigest NamespaceDigestOf(const NamespaceFields& fields);

// Id of the block of exactly kBlockTokens tokens that follows `parent` (all zero for the first).
// `inputs`: digests of the multimodal inputs whose placeholder tokens lie in this block.
BlockId BlockIdOf(const BlockId& parent, const NamespaceDigest& name_space,
                  std::span<const uint32_t> tokens, std::span<const InputDigest> inputs);

// Id of an engine's own block under its own key (1 to 256 bytes), in a domain of its own.
BlockId EngineBlockIdOf(std::string_view tenant, std::string_view engine_namespace,
                        std::string_view key);

// Id of the content of a block of exactly kBlockTokens tokens, whatever precedes it: what its KV
// may be found by at another position. `inputs`: all of the context's, whichever block holds them.
StretchId StretchIdOf(const NamespaceDigest& name_space, std::span<const uint32_t> tokens,
                      std::span<const InputDigest> inputs);
// Parent of what follows block `stored`, reused `shift` tokens behind its own position, in a
// sequence where it follows `parent`.
BlockId PlacedBlockIdOf(const BlockId& parent, const BlockId& stored, int32_t shift);

// Namespace of the indexes that are made of blocks of `name_space`, and id of one of them under its
// full key.
NamespaceDigest IndexNamespaceOf(const NamespaceDigest& name_space);
bool IsIndexNamespace(const NamespaceDigest& name_space);
BlockId RunIndexIdOf(std::string_view tenant, std::string_view full_key);

// Recipe of K/V that were computed under a retrieval budget. Unlimited gives the dense recipe.
NumericRecipe RecipeOf(const Budget& budget, uint32_t window_first, uint32_t window_last);
// Recipe of K/V that were computed under `recipe`, but behind tokens reused at another position.
NumericRecipe ShiftedRecipeOf(const NumericRecipe& recipe);

}  // namespace quarry

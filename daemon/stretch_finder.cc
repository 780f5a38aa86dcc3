#include "daemon/stretch_finder.h"

#include <utility>

#include "proto/identity.h"

namespace quarry {

StretchFinder::StretchFinder(BlockStore& store, const StretchIndex& index, std::string_view tenant,
                             const OpenRequest& request)
    : store_(store),
      index_(index),
      tenant_(tenant),
      request_(request),
      whole_blocks_(WholeBlocksOf(request.tokens)) {
  std::span<const NumericRecipe> recipes(request.accepts);
  if (recipes.empty()) recipes = std::span(&request.recipe, 1);
  for (const NumericRecipe& recipe : recipes) {
    origins_.push_back(OriginOf(tenant, request.spec, recipe));
    behind_.push_back(OriginOf(tenant, request.spec, ShiftedRecipeOf(recipe)));
  }
}

std::span<const uint32_t> StretchFinder::TokensOf(uint32_t block) const {
  return std::span(request_.tokens).subspan(size_t{block} * kBlockTokens, kBlockTokens);
}

StretchMatch StretchFinder::Follow(uint32_t block, const StretchPlace& place,
                                   std::span<const BlockOrigin> origins) const {
  StretchMatch match;
  match.first_block = block;
  match.shift = (static_cast<int32_t>(block) - static_cast<int32_t>(place.number)) *
                static_cast<int32_t>(kBlockTokens);
  BlockId parent = place.parent;
  for (uint32_t i = 0; block + i < whole_blocks_; ++i) {
    std::shared_ptr<HeldBlock> found;
    for (const BlockOrigin& origin : origins) {
      absl::StatusOr<BlockView> view = store_.Acquire(
          tenant_,
          ContextBlockKey(parent, origin.name_space, request_.spec.shape, TokensOf(block + i),
                          InputsOfBlock(request_.inputs, place.number + i)));
      if (!view.ok()) continue;
      found = std::make_shared<HeldBlock>(store_, *view, origin);
      break;
    }
    if (found == nullptr) break;
    parent = found->id();
    match.blocks.push_back(std::move(found));
  }
  return match;
}

StretchMatch StretchFinder::Longest(uint32_t block) const {
  StretchMatch longest;
  for (const BlockOrigin& origin : origins_) {
    const StretchId content = StretchIdOf(origin.name_space, TokensOf(block), request_.inputs);
    for (const StretchPlace& place : index_.Find(tenant_, content)) {
      StretchMatch match = Follow(block, place, origins_);
      if (match.blocks.size() > longest.blocks.size()) longest = std::move(match);
    }
  }
  return longest;
}

std::vector<StretchMatch> StretchFinder::Find(const PrefixMatch& prefix) {
  std::vector<StretchMatch> matches;
  auto block = static_cast<uint32_t>(prefix.blocks.size());
  // Of what precedes `block` here, as long as all of it is there.
  BlockId parent = prefix.blocks.empty() ? BlockId{} : prefix.blocks.back()->id();
  bool complete = true;
  while (block < whole_blocks_) {
    StretchMatch match;
    if (complete && !matches.empty()) match = Follow(block, {{}, parent, block}, behind_);
    const bool own = !match.blocks.empty();
    if (!own) match = Longest(block);
    if (match.blocks.empty()) {
      complete = false;
      ++block;
      continue;
    }
    for (const auto& found : match.blocks) {
      parent = own ? found->id() : PlacedBlockIdOf(parent, found->id(), match.shift);
    }
    block += static_cast<uint32_t>(match.blocks.size());
    matches.push_back(std::move(match));
  }
  return matches;
}

}  // namespace quarry

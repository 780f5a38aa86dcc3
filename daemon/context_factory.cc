#include "daemon/context_factory.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "daemon/steady_clock.h"
#include "proto/identity.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Each accepted recipe may cost a hash per block: a bound on what one Open can ask for.
constexpr size_t kMaxAcceptedRecipes = 64;
// They stay with the context and with its first block, outside the arena.
constexpr size_t kMaxInputs = 1024;

uint32_t BlocksFor(uint32_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

// How long a call waits for work on closed contexts that holds their memory: it should not miss a
// client's deadline for it, nor keep a bulk thread from others.
constexpr absl::Duration kLetGo = absl::Seconds(2);

// Blocks that a context will write itself.
struct PrivateBlocks {
  const std::string& tenant;
  uint64_t block_bytes = 0;
  BlockOrigin own, behind;  // of blocks before number first_behind, and from there on
  uint32_t first_behind = ~0u;
};

// Reserves and begins the private blocks of a context, one for each null of `blocks`: all of them
// now, so that decode never meets a full arena. On failure nothing stays reserved.
absl::Status BeginBlocks(const ContextServices& services, const PrivateBlocks& wanted,
                         std::vector<std::shared_ptr<HeldBlock>>* blocks) {
  auto count = static_cast<uint32_t>(std::count(blocks->begin(), blocks->end(), nullptr));
  if (count == 0) return absl::OkStatus();
  const std::string& tenant = wanted.tenant;
  const uint64_t block_bytes = wanted.block_bytes;
  BlockStore& store = *services.store;
  absl::Status reserved = store.Reserve(tenant, block_bytes, count);
  if (absl::IsResourceExhausted(reserved)) {
    // Closed contexts may wait in the background to be published, or be audited or indexed: that is
    // not a full arena.
    services.background->Flush();
    const uint64_t start_ns = SteadyNowNs();
    services.auditor->LetGo(kLetGo);
    services.indexer->LetGo(kLetGo - absl::Nanoseconds(SteadyNowNs() - start_ns));
    reserved = store.Reserve(tenant, block_bytes, count);
  }
  QUARRY_RETURN_IF_ERROR(reserved);
  for (uint32_t i = 0; i < blocks->size(); ++i) {
    if ((*blocks)[i] != nullptr) continue;
    absl::StatusOr<BlockView> view = store.Begin(tenant, block_bytes);
    if (!view.ok()) {
      store.Unreserve(tenant, block_bytes, count);
      return view.status();
    }
    --count;
    (*blocks)[i] = std::make_shared<HeldBlock>(
        store, *view, i < wanted.first_behind ? wanted.own : wanted.behind);
  }
  return absl::OkStatus();
}

// Copies the first `tokens` tokens of a block, of every layer and KV head. The copy's keys are
// turned, unless `turn` is null. Errors of reading a block that is on the disk.
absl::Status CopyTokens(const KvShape& shape, const HeldBlock& from, uint32_t tokens,
                        const Rotation* turn, HeldBlock* to) {
  const size_t bytes = tokens * shape.vector_bytes();
  std::vector<WantedBytes> strips;
  std::vector<std::byte*> keys;
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const KvPart part : {KvPart::kKey, KvPart::kValue}) {
      for (uint32_t h = 0; h < shape.kv_heads; ++h) {
        const uint64_t strip = shape.strip_offset(layer, part, h);
        strips.push_back({strip, {to->writable() + strip, bytes}});
        if (part == KvPart::kKey) keys.push_back(to->writable() + strip);
      }
    }
  }
  QUARRY_RETURN_IF_ERROR(from.CopyOnce(strips));
  if (turn == nullptr) return absl::OkStatus();
  for (std::byte* const key : keys) turn->TurnStoredKeys(key, tokens, shape.head_dim, shape.dtype);
  return absl::OkStatus();
}

// Whose block is it when a fork appends to a copy of its parent's partial block? The fork's, if
// its recipe covers what the parent did; approximate KV must not pass for dense.
BlockOrigin OriginOfCopy(const BlockOrigin& copied, const BlockOrigin& own) {
  BlockOrigin origin = own;
  origin.publishable = copied.publishable && (copied.dense || copied.name_space == own.name_space);
  return origin;
}

// The matches as a table has them. Stretches of one shift share its rotation.
std::vector<PlacedStretch> Placed(const RopeSpec& rope, std::span<const StretchMatch> matches) {
  std::vector<PlacedStretch> placed;
  for (const StretchMatch& match : matches) {
    const auto alike = std::find_if(placed.begin(), placed.end(), [&](const PlacedStretch& p) {
      return p.turn->distance() == match.shift;
    });
    const uint32_t lo = match.first_block * kBlockTokens;
    placed.push_back({{lo, lo + static_cast<uint32_t>(match.blocks.size()) * kBlockTokens},
                      alike != placed.end() ? alike->turn
                                            : std::make_shared<const Rotation>(rope, match.shift)});
  }
  return placed;
}

// The placed stretches that a fork at `tokens` keeps. Of a block that it cuts it has a copy, whose
// keys are turned already.
std::vector<PlacedStretch> PlacedBelow(const RopeSpec& rope,
                                       const std::vector<PlacedStretch>& placed, uint32_t tokens) {
  const uint32_t cut = tokens / kBlockTokens * kBlockTokens;
  std::vector<PlacedStretch> kept;
  for (const PlacedStretch& stretch : placed) {
    const TokenRange whole = Intersect(stretch.tokens, {0, cut});
    const TokenRange copied = Intersect(stretch.tokens, {cut, tokens});
    if (!whole.empty()) kept.push_back({whole, stretch.turn});
    if (!copied.empty()) kept.push_back({copied, std::make_shared<const Rotation>(rope, 0)});
  }
  return kept;
}

// The runs that a fork at `tokens` keeps; the one it cuts is searched up to there, or up to the
// block of which the fork has a copy with turned keys.
std::vector<RunUse> RunsBelow(const std::vector<RunUse>& runs, uint32_t tokens) {
  const uint32_t cut = tokens / kBlockTokens * kBlockTokens;
  std::vector<RunUse> kept;
  for (const RunUse& use : runs) {
    const uint32_t end = use.turn == nullptr ? tokens : cut;
    const TokenRange below = Intersect(use.tokens, {0, end});
    if (!below.empty()) kept.push_back({use.run, below, use.turn});
  }
  return kept;
}

// The indexed runs that lie in placed stretches, each whole.
std::vector<RunUse> RunsOfPlaced(RunRegistry* registry, const KvShape& shape,
                                 const BlockTable& table) {
  const RunGridOptions& grid = registry->grid();
  std::vector<RunUse> runs;
  for (const PlacedStretch& stretch : table.placed) {
    const int32_t shift = stretch.turn->distance();
    const TokenRange stored{stretch.tokens.lo - shift, stretch.tokens.hi - shift};
    for (uint32_t i = grid.RunsIn(stored.lo); grid.RunTokens(i).hi <= stored.hi; ++i) {
      if (grid.RunTokens(i).lo < stored.lo) continue;
      const TokenRange here{grid.RunTokens(i).lo + shift, grid.RunTokens(i).hi + shift};
      std::shared_ptr<const Run> run = registry->FindIndexed(i, shape, table.BlocksOf(here));
      if (run != nullptr) {
        runs.push_back({std::move(run), here, shift == 0 ? nullptr : stretch.turn});
      }
    }
  }
  return runs;
}

}  // namespace

absl::Status ContextFactory::CheckMaxTokens(const RopeSpec& rope, uint32_t max_tokens) const {
  if (max_tokens == 0) return absl::InvalidArgumentError("max_tokens is 0");
  if (max_tokens > max_context_tokens_) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens ", max_tokens, " is above the limit of ", max_context_tokens_));
  }
  if (rope.regime_max_tokens != 0 && max_tokens > rope.regime_max_tokens) {
    return absl::FailedPreconditionError(absl::StrCat(
        "max_tokens ", max_tokens, " is above the ", rope.regime_max_tokens, " tokens of the ",
        rope.regime == RopeRegime::kShort ? "short rope regime" : "rope regime",
        ": open the context in the regime of its maximum length"));
  }
  return absl::OkStatus();
}

absl::Status ContextFactory::CheckOpen(const OpenRequest& request) const {
  QUARRY_RETURN_IF_ERROR(ValidateModelSpec(request.spec));
  if (request.accepts.size() > kMaxAcceptedRecipes) {
    return absl::InvalidArgumentError(absl::StrCat(request.accepts.size(),
                                                   " accepted recipes; at most ",
                                                   kMaxAcceptedRecipes, " are allowed"));
  }
  if (request.inputs.size() > kMaxInputs) {
    return absl::InvalidArgumentError(absl::StrCat(request.inputs.size(), " inputs; at most ",
                                                   kMaxInputs, " are allowed"));
  }
  if (request.reuse_shifted && request.spec.rope.rotary_dim == 0) {
    return absl::InvalidArgumentError(
        "reuse at other positions turns queries by the model's rope, which has no frequencies");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<PrefixBlock>> ContextFactory::LocatePrefix(
    const Session& session, const OpenRequest& request) const {
  QUARRY_RETURN_IF_ERROR(CheckOpen(request));
  return prefixes_.Locate(session.tenant(), request);
}

absl::StatusOr<OpenResult> ContextFactory::Open(Session& session, const OpenRequest& request) {
  QUARRY_RETURN_IF_ERROR(CheckOpen(request));
  QUARRY_RETURN_IF_ERROR(CheckMaxTokens(request.spec.rope, request.max_tokens));
  if (request.tokens.size() > request.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        request.tokens.size(), " tokens for a context of max_tokens ", request.max_tokens));
  }
  QUARRY_RETURN_IF_ERROR(contexts_.CheckRoom());

  const BlockStore& store = *services_.store;
  const bool pages = store.page_bytes() > 0;
  const uint64_t bytes = uint64_t{BlocksFor(request.max_tokens)} * request.spec.shape.block_bytes();
  absl::StatusOr<OpenResult> result = absl::ResourceExhaustedError("");
  // What cannot fit into RAM, or does not beside what others use.
  if (!pages || bytes <= store.arena().Stats().capacity_bytes) {
    result = OpenWhere(session, request, PrefixUse::kInRam);
  }
  for (PrefixUse use : {PrefixUse::kRunsPaged, PrefixUse::kPaged}) {
    if (!pages || !absl::IsResourceExhausted(result.status())) break;
    result = OpenWhere(session, request, use);
  }
  return result;
}

absl::StatusOr<OpenResult> ContextFactory::OpenWhere(Session& session, const OpenRequest& request,
                                                     PrefixUse use) {
  const RunGridOptions& grid = services_.runs->grid();
  PrefixMatch prefix =
      prefixes_.FindAndLease(session.tenant(), request, use, [&](uint32_t tokens) -> TokenRange {
        const uint32_t runs = grid.RunsIn(tokens);
        if (runs == 0) return {};
        return {grid.RunTokens(0).lo, grid.RunTokens(runs - 1).hi};
      });
  std::vector<StretchMatch> stretches;
  if (request.reuse_shifted) {
    stretches = StretchFinder(*services_.store, *services_.stretches, session.tenant(), request)
                    .Find(prefix);
  }
  OpenResult result;
  result.reused_tokens = static_cast<uint32_t>(prefix.blocks.size()) * kBlockTokens;
  result.reused_dense = prefix.dense;
  result.unloaded_tokens = prefix.unloaded_blocks * kBlockTokens;
  result.expected_load_ms =
      absl::ToDoubleMilliseconds(services_.store->ExpectedLoad(prefix.unloaded_bytes));
  for (const auto& block : prefix.blocks) result.reused_blocks.push_back(block->id());

  ContextStart start;
  start.tokens = result.reused_tokens;
  start.token_ids = request.tokens;
  QUARRY_RETURN_IF_ERROR(
      FillTable(session, request, std::move(prefix), std::move(stretches), &start.table));
  uint64_t shifted_tokens = 0;
  for (const PlacedStretch& stretch : start.table.placed) {
    result.shifted.push_back({stretch.tokens, stretch.turn->distance()});
    shifted_tokens += stretch.tokens.size();
  }
  QUARRY_RETURN_IF_ERROR(Insert(session,
                                {{},
                                 session.id(),
                                 session.tenant(),
                                 request.spec,
                                 request.inputs,
                                 request.recipe,
                                 request.max_tokens},
                                std::move(start), &result.context));
  services_.counters->opened.fetch_add(1, std::memory_order_relaxed);
  services_.counters->reused_tokens.fetch_add(result.reused_tokens, std::memory_order_relaxed);
  services_.counters->shifted_tokens.fetch_add(shifted_tokens, std::memory_order_relaxed);
  return result;
}

// What was found at its place, and new blocks for the rest.
absl::Status ContextFactory::FillTable(const Session& session, const OpenRequest& request,
                                       PrefixMatch prefix, std::vector<StretchMatch> stretches,
                                       BlockTable* table) const {
  table->placed = Placed(request.spec.rope, stretches);
  table->blocks = std::move(prefix.blocks);
  table->blocks.resize(BlocksFor(request.max_tokens));
  for (StretchMatch& stretch : stretches) {
    std::move(stretch.blocks.begin(), stretch.blocks.end(),
              table->blocks.begin() + stretch.first_block);
  }
  table->runs = RunsOfPlaced(services_.runs, request.spec.shape, *table);
  const std::string& tenant = session.tenant();
  PrivateBlocks wanted{tenant, request.spec.shape.block_bytes(),
                       OriginOf(tenant, request.spec, request.recipe),
                       OriginOf(tenant, request.spec, ShiftedRecipeOf(request.recipe))};
  if (!stretches.empty()) wanted.first_behind = stretches.front().first_block;
  QUARRY_RETURN_IF_ERROR(BeginBlocks(services_, wanted, &table->blocks));
  table->FindPaged();
  return absl::OkStatus();
}

absl::StatusOr<ContextId> ContextFactory::Fork(Session& session, const ForkRequest& request) {
  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Context> parent,
                          contexts_.Find(session.tenant(), request.context));
  const ContextParams& from = parent->params();
  QUARRY_RETURN_IF_ERROR(CheckMaxTokens(from.spec.rope, request.max_tokens));
  const uint32_t complete = parent->CompleteTokens();
  if (request.tokens > complete) {
    return absl::FailedPreconditionError(absl::StrCat("fork of context ", from.id.value,
                                                      " at token ", request.tokens, ": only ",
                                                      complete, " are complete in all layers"));
  }
  if (request.tokens > request.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("fork of context ", from.id.value, " at token ",
                                                   request.tokens, " with max_tokens ",
                                                   request.max_tokens));
  }
  QUARRY_RETURN_IF_ERROR(contexts_.CheckRoom());

  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<const BlockTable> table, parent->Table());
  const KvShape& shape = parent->shape();
  const uint32_t whole = request.tokens / kBlockTokens;
  const uint32_t partial = request.tokens % kBlockTokens;
  ContextStart start;
  start.tokens = request.tokens;
  start.token_ids = parent->TokenIds(request.tokens);
  start.table.runs = RunsBelow(table->runs, request.tokens);
  start.samples = parent->samples();
  for (const uint32_t block : parent->copied_blocks()) {
    if (block < whole) start.copied_blocks.push_back(block);
  }
  if (partial > 0) start.copied_blocks.push_back(whole);
  start.table.placed = PlacedBelow(from.spec.rope, table->placed, request.tokens);
  start.table.blocks.assign(table->blocks.begin(), table->blocks.begin() + whole);
  // Behind a placed stretch, or in the copy of a part of one, nothing is as exact as the recipe
  // says.
  const bool behind = table->PlacedTokens({0, request.tokens}) > 0;
  const BlockOrigin own = OriginOf(session.tenant(), from.spec,
                                   behind ? ShiftedRecipeOf(request.recipe) : request.recipe);
  PrivateBlocks wanted{session.tenant(), shape.block_bytes(), own, own};
  if (partial > 0) {
    const HeldBlock& copied = *table->blocks[whole];
    wanted.own = OriginOfCopy(copied.origin(), own);
    if (table->PlacedAt(request.tokens) != nullptr) wanted.own.publishable = false;
    wanted.first_behind = whole + 1;
  }
  start.table.blocks.resize(BlocksFor(request.max_tokens));
  QUARRY_RETURN_IF_ERROR(BeginBlocks(services_, wanted, &start.table.blocks));
  start.table.FindPaged();
  if (partial > 0) {
    QUARRY_RETURN_IF_ERROR(CopyTokens(shape, *table->blocks[whole], partial,
                                      table->TurnAt(request.tokens),
                                      start.table.blocks[whole].get()));
  }
  ContextId id;
  QUARRY_RETURN_IF_ERROR(Insert(session,
                                {{},
                                 session.id(),
                                 session.tenant(),
                                 from.spec,
                                 from.inputs,
                                 request.recipe,
                                 request.max_tokens},
                                std::move(start), &id));
  return id;
}

absl::Status ContextFactory::Insert(Session& session, ContextParams params, ContextStart start,
                                    ContextId* id) {
  params.id = contexts_.NextId();
  *id = params.id;
  const bool maintain = start.tokens > 0;
  auto context = std::make_shared<Context>(services_, std::move(params), std::move(start));
  QUARRY_RETURN_IF_ERROR(contexts_.Insert(context, session));
  if (maintain) services_.background->Enqueue(std::move(context));  // runs of what it starts with
  return absl::OkStatus();
}

}  // namespace quarry

// Runs of a context: opened layer by layer, attached when their blocks are published, and indexed.
#include <algorithm>
#include <utility>

#include "daemon/context.h"

namespace quarry {
namespace {

// Where a run of these tokens stands among the others, or would stand.
std::vector<RunUse>::iterator PlaceOf(TokenRange tokens, std::vector<RunUse>* runs) {
  return std::find_if(runs->begin(), runs->end(),
                      [&](const RunUse& use) { return use.tokens.lo >= tokens.lo; });
}

// Whether a run that came with a fork ends in one of the `copied` blocks, where other tokens
// follow: the run keeps the name that it has where the fork comes from.
bool EndsInCopiedBlock(const Run& run, std::span<const uint32_t> copied,
                       std::span<const std::shared_ptr<HeldBlock>> blocks) {
  return run.tokens().hi % kBlockTokens != 0 &&
         std::ranges::binary_search(copied, run.tokens().hi / kBlockTokens) &&
         run.blocks().back() != blocks.back() &&
         std::ranges::equal(run.blocks().first(blocks.size() - 1), blocks.first(blocks.size() - 1));
}

}  // namespace

// Which layer comes next tells when a layer's runs have come as far as they will for now, and their
// sampled queries with them: all runs of one layer are then learned from together. Several writers
// of one layer, each with KV heads of its own, have to be equally far.
bool Context::SettleBefore(uint32_t layer) {
  const uint32_t before = std::exchange(appended_layer_, layer);
  if (before == layer || samples_ == nullptr) return false;
  const uint32_t tokens = Frontier(before, 0).load(std::memory_order_relaxed);
  const uint32_t runs = services_.runs->grid().RunsIn(tokens);
  if (runs <= settled_runs_[before]) return false;  // as between most tokens of decode
  for (uint32_t h = 1; h < shape().kv_heads; ++h) {
    if (Frontier(before, h).load(std::memory_order_relaxed) != tokens) return false;
  }
  settled_runs_[before] = runs;
  return true;
}

void Context::AttachRuns() {
  const absl::StatusOr<std::shared_ptr<const BlockTable>> table = Table();
  if (!table.ok()) return;  // closed
  std::vector<RunUse> runs = (*table)->runs;
  const bool attached = AttachPublished(**table, &runs);
  const bool opened = OpenRuns(**table, &runs);
  if (!attached && !opened) return;
  std::shared_ptr<const BlockTable> old;  // ends outside the lock: it may be the last owner
  absl::MutexLock lock(&mutex_);
  if (retired_) return;
  auto next = std::make_shared<BlockTable>(*table_);
  next->runs = std::move(runs);
  old = std::exchange(table_, std::move(next));
}

bool Context::AttachPublished(const BlockTable& table, std::vector<RunUse>* runs) {
  const RunGridOptions& grid = services_.runs->grid();
  const uint32_t first = next_run_;
  for (;; ++next_run_) {
    const TokenRange tokens = grid.RunTokens(next_run_);
    if (tokens.hi > published_blocks_ * kBlockTokens) break;
    // Runs of placed blocks are where these were computed.
    if (table.PlacedTokens(tokens) > 0) continue;
    const auto use = PlaceOf(tokens, runs);
    const bool stands = use != runs->end() && use->tokens.lo == tokens.lo;
    // Its own, open until now, or one that came with a fork.
    std::shared_ptr<const Run> whole = stands && use->tokens == tokens ? use->run : nullptr;
    const auto blocks = table.BlocksOf(tokens);
    const bool own_whole = std::binary_search(own_open_.begin(), own_open_.end(), next_run_);
    if (whole != nullptr && !own_whole &&
        (whole->registered() || EndsInCopiedBlock(*whole, copied_blocks_, blocks))) {
      continue;
    }
    RunUse own{
        services_.runs->GetOrMake(params_.tenant, next_run_, shape(), blocks, std::move(whole)),
        tokens};
    // What a fork searched under a bound gives way to the fork's own run.
    if (stands) {
      *use = std::move(own);
    } else {
      runs->insert(use, std::move(own));
    }
  }
  return next_run_ > first;
}

bool Context::OpenRuns(const BlockTable& table, std::vector<RunUse>* runs) {
  if (samples_ == nullptr) return false;  // nobody would index them
  opened_runs_ = std::max(opened_runs_, next_run_);
  const uint32_t settled = MostSettledRuns();
  if (publishing_failed_ || opened_runs_ >= settled) return false;
  const RunGridOptions& grid = services_.runs->grid();
  const std::vector<uint32_t> ids = TokenIds(grid.RunTokens(settled - 1).hi + kBlockTokens);
  BlockId id = last_id_;
  uint32_t block = published_blocks_;
  bool opened = false;
  for (; opened_runs_ < settled; ++opened_runs_) {
    const TokenRange tokens = grid.RunTokens(opened_runs_);
    const uint32_t end = (tokens.hi - 1) / kBlockTokens + 1;
    if (ids.size() / kBlockTokens < end) break;  // what it will be called is not known yet
    for (; block < end; ++block) {
      const HeldBlock& held = *table.blocks[block];
      if (!held.published() && !held.origin().publishable) return opened;
      id = IdOf(table, block, id, ids);
    }
    if (table.PlacedTokens(tokens) > 0) continue;
    const auto use = PlaceOf(tokens, runs);
    // What a fork searches under a bound serves it until its own run is published.
    if (use != runs->end() && use->tokens.lo == tokens.lo) continue;
    std::shared_ptr<const Run> run =
        services_.runs->Open(opened_runs_, shape(), table.BlocksOf(tokens), id);
    if (run == nullptr) continue;
    runs->insert(use, {std::move(run), tokens});
    own_open_.push_back(opened_runs_);
    opened = true;
  }
  return opened;
}

uint32_t Context::SettledRuns(uint32_t layer) const {
  absl::MutexLock lock(&mutex_);
  return settled_runs_[layer];
}

uint32_t Context::MostSettledRuns() const {
  absl::MutexLock lock(&mutex_);
  return *std::max_element(settled_runs_.begin(), settled_runs_.end());
}

void Context::IndexRuns() {
  if (samples_ == nullptr) return;
  const absl::StatusOr<std::shared_ptr<const BlockTable>> table = Table();
  if (!table.ok()) return;  // closed
  considered_renewal_.store(samples_->renewal(), std::memory_order_relaxed);
  for (uint32_t layer = 0; layer < shape().layers; ++layer) {
    const TokenRange settled{0, services_.runs->grid().RunTokens(SettledRuns(layer)).lo};
    std::vector<RunUse> there;
    for (const RunUse& use : (*table)->runs) {
      if (use.turn != nullptr) continue;  // its queries come from another position
      // Of an open run that it shares up to a bound, a fork does not know how far it has come.
      const bool own = use.tokens == use.run->tokens() && use.tokens.hi <= settled.hi;
      if (own || !use.run->open()) there.push_back(use);
    }
    services_.indexer->Consider(layer, there, shape(), samples_);
  }
}

}  // namespace quarry

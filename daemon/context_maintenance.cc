// What a context does in the background: publishing full blocks, attaching runs, and what audits
// need.
#include <algorithm>
#include <utility>

#include <spdlog/spdlog.h>

#include "daemon/context.h"
#include "daemon/prefix_index.h"
#include "proto/identity.h"
#include "proto/status_macros.h"

namespace quarry {

void Context::Maintain() {
  absl::MutexLock lock(&maintenance_mutex_);
  PublishFullBlocks();
  AttachRuns();
  IndexRuns();
}

void Context::PublishFullBlocks() {
  const uint32_t full = CompleteTokens() / kBlockTokens;
  if (publishing_failed_ || published_blocks_ >= full) return;
  const std::vector<uint32_t> ids = TokenIds(full * kBlockTokens);
  const auto publishable = static_cast<uint32_t>(ids.size()) / kBlockTokens;
  for (; published_blocks_ < publishable; ++published_blocks_) {
    const std::shared_ptr<const BlockTable> table = TableOrRemains();
    if (published_blocks_ >= table->blocks.size()) return;  // closed
    const std::shared_ptr<HeldBlock>& block = table->blocks[published_blocks_];
    if (block->published()) {
      last_id_ = IdHere(*table, published_blocks_, ids);
      continue;
    }
    if (!block->origin().publishable) return;
    const absl::StatusOr<BlockId> id = PublishBlock(*table, published_blocks_, ids);
    if (id.ok()) {
      last_id_ = *id;
      continue;
    }
    // The id names other bytes (another shape, or a fork's other token ids). The context is as
    // good as before, but neither this block nor its successors can be shared.
    publishing_failed_ = true;
    services_.counters->publish_failures.fetch_add(1, std::memory_order_relaxed);
    spdlog::warn("publish failed context={} block={} error=\"{}\"", params_.id.value,
                 published_blocks_, std::string(id.status().message()));
    return;
  }
}

BlockId Context::IdHere(const BlockTable& table, uint32_t index,
                        std::span<const uint32_t> ids) const {
  const HeldBlock& block = *table.blocks[index];
  const PlacedStretch* const stretch = table.PlacedAt(index * kBlockTokens);
  if (stretch == nullptr) return block.id();
  // What was computed behind the same placed blocks before has its own id here.
  const BlockId own = BlockIdOf(last_id_, block.origin().name_space,
                                ids.subspan(size_t{index} * kBlockTokens, kBlockTokens),
                                InputsOfBlock(params_.inputs, index));
  if (own == block.id()) return own;
  return PlacedBlockIdOf(last_id_, block.id(), stretch->turn->distance());
}

absl::StatusOr<BlockId> Context::PublishBlock(const BlockTable& table, uint32_t index,
                                              std::span<const uint32_t> ids) {
  const std::shared_ptr<HeldBlock>& block = table.blocks[index];
  const std::span<const uint32_t> tokens = ids.subspan(size_t{index} * kBlockTokens, kBlockTokens);
  const NamespaceDigest& name_space = block->origin().name_space;
  const BlockKey key =
      ContextBlockKey(last_id_, name_space, shape(), tokens, InputsOfBlock(params_.inputs, index));
  QUARRY_ASSIGN_OR_RETURN(std::shared_ptr<HeldBlock> winner, block->Publish(key));
  // What was computed behind placed blocks is not to be placed again: errors would add up.
  if (placed_.empty() || index * kBlockTokens < placed_.front().tokens.lo) {
    services_.stretches->Add(params_.tenant, StretchIdOf(name_space, tokens, params_.inputs),
                             {key.id, last_id_, index});
  }
  if (winner == nullptr) return key.id;
  std::shared_ptr<const BlockTable> old;  // ends outside the lock: it may be the last owner
  absl::MutexLock lock(&mutex_);
  if (index >= table_->blocks.size()) return key.id;  // closed meanwhile
  auto next = std::make_shared<BlockTable>(*table_);
  next->blocks[index] = std::move(winner);
  old = std::exchange(table_, std::move(next));
  return key.id;
}

bool Context::ArePublished(std::span<const std::shared_ptr<HeldBlock>> blocks) const {
  std::vector<BlockId> ids;
  uint64_t bytes = 0;
  for (const auto& block : blocks) {
    ids.push_back(block->id());
    bytes += block->bytes();
  }
  return services_.store->PublishedBytes(params_.tenant, ids) == bytes;
}

void Context::AttachRuns() {
  const RunGridOptions& grid = services_.runs->grid();
  if (grid.RunTokens(next_run_).hi > published_blocks_ * kBlockTokens) return;
  const absl::StatusOr<std::shared_ptr<const BlockTable>> held = Table();
  if (!held.ok()) return;  // closed
  const std::shared_ptr<const BlockTable>& table = *held;
  std::vector<RunUse> runs = table->runs;
  for (;; ++next_run_) {
    const TokenRange tokens = grid.RunTokens(next_run_);
    if (tokens.hi > published_blocks_ * kBlockTokens) break;
    const auto use = std::find_if(runs.begin(), runs.end(),
                                  [&](const RunUse& u) { return u.tokens.lo >= tokens.lo; });
    if (use != runs.end() && use->tokens == tokens) continue;  // came with a fork
    // A run's keys are all at the positions that it says; placed blocks are scanned without one.
    if (table->PlacedTokens(tokens) > 0) continue;
    const uint32_t first = tokens.lo / kBlockTokens;
    const uint32_t last = (tokens.hi - 1) / kBlockTokens;
    const auto blocks = std::span(table->blocks).subspan(first, last - first + 1);
    RunUse own{services_.runs->GetOrMake(params_.tenant, next_run_, shape(), blocks), tokens};
    // What was purged before a run was made of it serves who still has it, and nobody later.
    if (!ArePublished(blocks)) services_.runs->Forget(*own.run);
    // What a fork searched under a bound gives way to the fork's own run.
    if (use != runs.end() && use->tokens.lo == tokens.lo) {
      *use = std::move(own);
    } else {
      runs.insert(use, std::move(own));
    }
  }
  std::shared_ptr<const BlockTable> old;  // as above
  absl::MutexLock lock(&mutex_);
  if (retired_) return;
  auto next = std::make_shared<BlockTable>();
  next->blocks = table_->blocks;
  next->placed = table_->placed;
  next->runs = std::move(runs);
  old = std::exchange(table_, std::move(next));
}

void Context::IndexRuns() {
  if (samples_ == nullptr) return;
  const absl::StatusOr<std::shared_ptr<const BlockTable>> table = Table();
  if (!table.ok()) return;  // closed
  considered_renewal_.store(samples_->renewal(), std::memory_order_relaxed);
  services_.indexer->Consider((*table)->runs, shape(), samples_);
}

std::shared_ptr<const BlockTable> Context::Memory() const {
  absl::StatusOr<std::shared_ptr<const BlockTable>> table = Table();
  return table.ok() ? *std::move(table) : nullptr;
}

bool Context::NoteFit(uint32_t layer, uint32_t kv_head, IndexFit fit) {
  return samples_ != nullptr && samples_->NoteFit(layer, kv_head, fit);
}

}  // namespace quarry

// What a context does in the background: publishing full blocks, attaching runs, and what audits
// need.
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
      last_id_ = IdOf(*table, published_blocks_, last_id_, ids);
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

BlockId Context::IdOf(const BlockTable& table, uint32_t index, const BlockId& parent,
                      std::span<const uint32_t> ids) const {
  const HeldBlock& block = *table.blocks[index];
  const PlacedStretch* const stretch = table.PlacedAt(index * kBlockTokens);
  if (block.published() && stretch == nullptr) return block.id();
  // What was computed behind the same placed blocks before has its own id here.
  const BlockId own = BlockIdOf(parent, block.origin().name_space,
                                ids.subspan(size_t{index} * kBlockTokens, kBlockTokens),
                                InputsOfBlock(params_.inputs, index));
  if (stretch == nullptr || own == block.id()) return own;
  return PlacedBlockIdOf(parent, block.id(), stretch->turn->distance());
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

std::shared_ptr<const BlockTable> Context::Memory() const {
  absl::StatusOr<std::shared_ptr<const BlockTable>> table = Table();
  return table.ok() ? *std::move(table) : nullptr;
}

bool Context::NoteFit(uint32_t layer, uint32_t kv_head, IndexFit fit) {
  return samples_ != nullptr && samples_->NoteFit(layer, kv_head, fit);
}

}  // namespace quarry

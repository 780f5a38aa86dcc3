#include "storage/eviction_policy.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "proto/check.h"

namespace quarry {
namespace {

// Ranks are all equal, so the last use decides.
class Lru final : public EvictionPolicy {
 public:
  void Admit(BlockRecord*, uint64_t) override {}
  void Use(BlockRecord*) override {}
  void LetGo(BlockRecord*) override {}
  bool Spare(BlockRecord*) override { return false; }
  void Evicted(const BlockRecord&) override {}
};

// S3-FIFO (Yang et al., SOSP 2023): new blocks wait in a small queue, of which only those go on to
// the main one that were used again; an id that comes back while its ghost is remembered starts in
// the main one. Ranks are the times at which blocks entered their queue.
class S3Fifo final : public EvictionPolicy {
 public:
  void Admit(BlockRecord* block, uint64_t published) override {
    max_ghosts_ = published;
    const bool known = ghosts_.erase(IdOf(*block)) > 0;
    if (known) ++ghost_hits_;
    block->queue = known ? EvictionQueue::kMain : EvictionQueue::kSmall;
    block->rank = ++entries_;
  }
  void Use(BlockRecord* block) override {
    block->uses = std::min<uint8_t>(block->uses + 1, kMaxUses);
  }
  void LetGo(BlockRecord*) override {}
  bool Spare(BlockRecord* block) override {
    if (block->uses == 0) return false;
    if (block->queue == EvictionQueue::kSmall) {
      block->queue = EvictionQueue::kMain;
      block->uses = 0;
    } else {
      --block->uses;
    }
    block->rank = ++entries_;
    return true;
  }
  void Evicted(const BlockRecord& block) override {
    if (block.queue == EvictionQueue::kMain) return;
    ghosts_[IdOf(block)] = ++entries_;
    by_age_.emplace_back(IdOf(block), entries_);
    while (by_age_.size() > max_ghosts_) {
      const auto& [id, entered] = by_age_.front();
      const auto ghost = ghosts_.find(id);
      if (ghost != ghosts_.end() && ghost->second == entered) ghosts_.erase(ghost);
      by_age_.pop_front();
    }
  }
  uint64_t GhostHits() const override { return ghost_hits_; }

 private:
  using TenantId = std::pair<TenantName, BlockId>;
  static constexpr uint8_t kMaxUses = 3;

  static TenantId IdOf(const BlockRecord& block) { return {block.tenant, block.key.id}; }

  uint64_t entries_ = 0;
  uint64_t ghost_hits_ = 0;
  uint64_t max_ghosts_ = 0;  // as many as there were blocks when the last one came
  absl::flat_hash_map<TenantId, uint64_t> ghosts_;  // when it was evicted
  // The same, oldest first, and some that came back since.
  std::deque<std::pair<TenantId, uint64_t>> by_age_;
};

// GreedyDual-Size (Cao and Irani, USITS 1997): a block's rank is what a miss costs per byte, plus
// the rank of the last one evicted, which makes old ranks small.
class Cost final : public EvictionPolicy {
 public:
  explicit Cost(const EvictionOptions& options) : options_(options) {}
  void Admit(BlockRecord* block, uint64_t) override { Renew(block); }
  void Use(BlockRecord* block) override { Renew(block); }
  void LetGo(BlockRecord* block) override { Renew(block); }
  bool Spare(BlockRecord*) override { return false; }
  void Evicted(const BlockRecord& block) override { evicted_ = std::max(evicted_, block.rank); }

 private:
  static constexpr double kPicoseconds = 1e12;

  void Renew(BlockRecord* block) const {
    const double doublings = static_cast<double>(block->depth) / options_.recompute_doubling_blocks;
    const double recompute = (1 + doublings) / static_cast<double>(options_.recompute_bytes_per_s);
    const double miss =
        block->load_bytes_per_s > 0 ? std::min(recompute, 1 / block->load_bytes_per_s) : recompute;
    block->rank = evicted_ + static_cast<uint64_t>(miss * kPicoseconds);
  }

  const EvictionOptions options_;
  uint64_t evicted_ = 0;  // the highest rank that went
};

}  // namespace

std::unique_ptr<EvictionPolicy> EvictionPolicy::Create(const EvictionOptions& options) {
  switch (options.kind) {
    case EvictionKind::kLru:
      return std::make_unique<Lru>();
    case EvictionKind::kS3Fifo:
      return std::make_unique<S3Fifo>();
    case EvictionKind::kCost:
      return std::make_unique<Cost>(options);
  }
  QUARRY_CHECK(false);
}

}  // namespace quarry

// Runs: immutable stretches of tokens with an index, shared by every context that contains them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "daemon/held_block.h"
#include "daemon/rotation.h"
#include "daemon/run_indexes.h"
#include "proto/types.h"
#include "storage/block_store.h"

namespace quarry {

// One run's tokens, of all layers and KV heads. Immutable but for its indexes; keeps its blocks
// leased.
//
// While a prefill goes layer by layer, the run is open: it is known to one context and its forks
// alone, its first layers are there and may be indexed and searched, and others are still to come.
// Once its blocks are published the registry knows it.
class Run {
 public:
  // From here on it is the run that has these indexes.
  static std::shared_ptr<const Run> Make(TokenRange tokens,
                                         std::vector<std::shared_ptr<HeldBlock>> blocks,
                                         std::shared_ptr<RunIndexes> indexes) {
    std::shared_ptr<const Run> run(new Run(tokens, std::move(blocks), std::move(indexes)));
    run->indexes()->SetRun(run);
    return run;
  }

  TokenRange tokens() const { return tokens_; }
  // From the block of token tokens().lo.
  std::span<const std::shared_ptr<HeldBlock>> blocks() const { return blocks_; }
  const std::shared_ptr<RunIndexes>& indexes() const { return indexes_; }
  bool open() const { return !blocks_.back()->published(); }  // they are published in order
  // Whether all its blocks are published, and none was purged or found broken since.
  bool stands() const;
  // Whether the registry knows it, or did until it was forgotten.
  bool registered() const { return registered_.load(std::memory_order_relaxed); }

 private:
  Run(TokenRange tokens, std::vector<std::shared_ptr<HeldBlock>> blocks,
      std::shared_ptr<RunIndexes> indexes)
      : tokens_(tokens), blocks_(std::move(blocks)), indexes_(std::move(indexes)) {}

  const TokenRange tokens_;
  const std::vector<std::shared_ptr<HeldBlock>> blocks_;
  const std::shared_ptr<RunIndexes> indexes_;
  friend class RunRegistry;
  mutable std::atomic<bool> registered_{false};
};

// All of the run that is used, as its user counts tokens.
inline TokenRange TokensHere(const Run& run, const Rotation* turn) {
  const auto shift = static_cast<uint32_t>(DistanceOf(turn));
  return {run.tokens().lo + shift, run.tokens().hi + shift};
}

// The grid of runs, the same for every context whatever the timing: run i is
// [first_run_token + i * run_tokens, first_run_token + (i + 1) * run_tokens).
struct RunGridOptions {
  uint32_t first_run_token = 128;
  uint32_t run_tokens = 8192;
  TokenRange RunTokens(uint32_t i) const {
    const uint32_t lo = first_run_token + i * run_tokens;
    return {lo, lo + run_tokens};
  }
  // That begins at the token.
  uint32_t RunAt(uint32_t token) const { return (token - first_run_token) / run_tokens; }
  // That lie in [0, tokens).
  uint32_t RunsIn(uint32_t tokens) const {
    return tokens < first_run_token ? 0 : (tokens - first_run_token) / run_tokens;
  }
};

// Finds a run by what it contains, or makes it. Weak references: a run lives as long as a context
// or an attend uses it. Its indexes stay, for the next context with the same tokens, until their
// room is wanted or some of its blocks are purged; that blocks are evicted does not end them.
// Thread-safe.
class RunRegistry {
 public:
  explicit RunRegistry(const RunGridOptions& grid) : grid_(grid) {}

  const RunGridOptions& grid() const { return grid_; }

  // `blocks`: the published blocks of the tenant that hold run `i`, in order. The last one's id
  // names the tenant and all tokens up to the run's end, so equal ids mean equal runs. `open`: the
  // caller's own of these tokens, or null; it is taken in with its indexes, unless there are others
  // of the same tokens, or an earlier writer's blocks have taken the places of its own. A run whose
  // blocks are gone from the store serves the caller, if they are the caller's, and nobody later.
  std::shared_ptr<const Run> GetOrMake(std::string_view tenant, uint32_t i, const KvShape& shape,
                                       std::span<const std::shared_ptr<HeldBlock>> blocks,
                                       std::shared_ptr<const Run> open = nullptr);
  // The run that its user has elsewhere, in the published `blocks` of its tokens; null: there is
  // none with indexes, made or to be made.
  std::shared_ptr<const Run> FindIndexed(uint32_t i, const KvShape& shape,
                                         std::span<const std::shared_ptr<HeldBlock>> blocks);
  // Run `i` for the context that is writing its blocks, the last of which will have this id. Null:
  // there is one of the same tokens, whose indexes it will have when its blocks are published.
  std::shared_ptr<const Run> Open(uint32_t i, const KvShape& shape,
                                  std::span<const std::shared_ptr<HeldBlock>> blocks,
                                  const BlockId& last_block);

  // Indexes of the runs that it knows; of no run longer than it knows it.
  std::vector<std::shared_ptr<RunIndexes>> Registered() const;
  // Whether these are still a run's: none of its blocks was purged or found broken.
  bool Knows(const RunIndexes& indexes) const;

  // Drops the indexes of the run that no context uses and that was longest not asked for, if all
  // such together take that many bytes; false if they do not.
  bool DropIdle(uint64_t bytes);
  uint64_t idle_bytes() const;
  // Forgets the tenant's runs that have any of `blocks`; or, if none are named, any of the
  // namespace; or all. Whoever uses such a run keeps it, and its indexes end with it; others end
  // here.
  void Purge(std::string_view tenant, const std::optional<NamespaceDigest>& name_space,
             std::span<const BlockId> blocks);
  // The same for runs of a block that was found broken: of its very bytes, whoever has computed its
  // tokens again.
  void Forget(BlockHandle broken);

  uint64_t made() const { return made_.load(std::memory_order_relaxed); }
  // Of those that are not forgotten.
  uint64_t live() const;
  uint64_t indexed() const;  // of those that live, all layers at least once

 private:
  struct Key {
    BlockId last_block;
    uint32_t run = 0;
    KvShape shape;
    friend bool operator==(const Key&, const Key&) = default;
    template <typename H>
    friend H AbslHashValue(H h, const Key& key) {
      return H::combine(std::move(h), key.last_block, key.run, key.shape.layers, key.shape.kv_heads,
                        key.shape.head_dim, static_cast<int>(key.shape.dtype));
    }
  };

  // What a purge may name.
  struct Source {
    BlockId block;
    BlockHandle handle;
    NamespaceDigest name_space;
  };

  struct Entry {
    std::weak_ptr<const Run> run;
    std::shared_ptr<RunIndexes> indexes;
    std::string tenant;
    // Of the latest run, and of the one before, whose blocks its indexes may be made of.
    std::vector<Source> sources, earlier;
    uint64_t asked = 0;  // when, by asks_
    // Nobody uses it, nor holds its indexes while they are queued or made.
    bool idle() const { return run.expired() && indexes.use_count() == 1 && !indexes->empty(); }
  };

  // GetOrMake, before it is known whether the blocks stand.
  std::shared_ptr<const Run> Register(std::string_view tenant, uint32_t i, const KvShape& shape,
                                      std::span<const std::shared_ptr<HeldBlock>> blocks,
                                      std::shared_ptr<const Run> open);
  // What was purged before the registry knew it.
  bool ForgetIfGone(const Run& run);
  std::shared_ptr<const Run> Make(uint32_t i, std::span<const std::shared_ptr<HeldBlock>> blocks,
                                  std::shared_ptr<RunIndexes> indexes) const;
  // The entry's, or a new one; blocks are as in GetOrMake.
  std::shared_ptr<const Run> Use(uint32_t i, std::span<const std::shared_ptr<HeldBlock>> blocks,
                                 std::shared_ptr<const Run> open, Entry* entry)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  template <typename Predicate>
  void ForgetIf(Predicate predicate);
  uint64_t LockedIdleBytes() const ABSL_SHARED_LOCKS_REQUIRED(mutex_);

  void SweepExpired() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const RunGridOptions grid_;
  std::atomic<uint64_t> made_{0};
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<Key, Entry> runs_ ABSL_GUARDED_BY(mutex_);
  uint64_t asks_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t sweep_at_ ABSL_GUARDED_BY(mutex_) = 64;
};

}  // namespace quarry

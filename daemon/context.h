// Context: one sequence's KV, as blocks, and how far each layer and KV head has got.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "daemon/audited_query.h"
#include "daemon/auditor.h"
#include "daemon/background.h"
#include "daemon/block_table.h"
#include "daemon/engine_counters.h"
#include "daemon/query_samples.h"
#include "daemon/run_indexer.h"
#include "daemon/run_registry.h"
#include "daemon/stretch_index.h"
#include "proto/kv_types.h"

namespace quarry {

// What a context uses of its engine; outlives it.
struct ContextServices {
  BlockStore* store = nullptr;
  StretchIndex* stretches = nullptr;
  RunRegistry* runs = nullptr;
  RunIndexer* indexer = nullptr;
  BackgroundWorker* background = nullptr;
  EngineCounters* counters = nullptr;
  Auditor* auditor = nullptr;
};

// Constant from open to close.
struct ContextParams {
  ContextId id;
  SessionId owner;
  std::string tenant;
  ModelSpec spec;
  std::vector<InputDigest> inputs;
  NumericRecipe recipe;  // of what this context appends
  uint32_t max_tokens = 0;
};

// Where a context starts: nothing, a reused prefix, or a fork.
struct ContextStart {
  BlockTable table;                 // blocks for max_tokens
  uint32_t tokens = 0;              // present in all layers; a stretch placed there is besides
  std::vector<uint32_t> token_ids;  // known, from token 0
  // Of which it, or a context that it descends from, has a copy of its own since a fork; rising.
  std::vector<uint32_t> copied_blocks;
  std::shared_ptr<QuerySamples> samples;  // of the context it forks; null: its own
};

// K and V of tokens to store, [token][kv_head][head_dim]; borrowed, may lie in memory that a
// client can write.
struct KvInput {
  uint32_t layer = 0;
  uint32_t first_kv_head = 0;
  uint32_t kv_heads = 0;
  TokenRange range;
  const void* k = nullptr;
  const void* v = nullptr;
  std::span<const uint32_t> ids;
};

// Thread-safe. Held by shared_ptr: attends, appends and background work in flight keep a context
// whose session has ended until they are done with it.
//
// A (layer, KV head) has one writer at a time, which claims it, writes beyond the frontier without
// a lock, and then moves the frontier; readers see only what lies below it.
class Context : public BackgroundWorker::Client,
                public AuditSubject,
                public std::enable_shared_from_this<Context> {
 public:
  Context(const ContextServices& services, ContextParams params, ContextStart start);

  const ContextParams& params() const { return params_; }
  const KvShape& shape() const override { return params_.spec.shape; }

  absl::Status Append(const AppendRequest& request);
  // The new token of a decode step; `k` and `v` are [kv_heads][head_dim].
  absl::Status AppendToken(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads,
                           uint32_t position, const void* k, const void* v);
  // Looks at the queries of an attend, [kv_heads * group][head_dim], and keeps some of them to fit
  // indexes to. Never waits.
  void SampleQueries(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads, const float* q);
  absl::Status DeclareTokens(std::span<const uint32_t> ids);

  // No more appends; publishes what is full. What cannot be published (counted) stays private.
  void Seal();
  ContextInfo Info() const;
  absl::Status Read(uint32_t layer, TokenRange range, std::span<std::byte> k,
                    std::span<std::byte> v) const;

  // Tokens that may be attended in this layer by these KV heads.
  uint32_t AvailableTokens(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads) const;
  // Tokens present in all layers and heads.
  uint32_t CompleteTokens() const;
  // NotFound once closed.
  absl::StatusOr<std::shared_ptr<const BlockTable>> Table() const;
  // Closes: no new appends, attends or reads; memory that background work does not need is given
  // back when the calls in flight end.
  void Retire();
  std::vector<uint32_t> TokenIds(uint32_t limit) const;
  // Null: indexes are off, or it is too short for a run.
  const std::shared_ptr<QuerySamples>& samples() const { return samples_; }
  std::span<const uint32_t> copied_blocks() const { return copied_blocks_; }

  const std::string& tenant() const override { return params_.tenant; }
  const std::string& model() const override { return params_.spec.name; }
  std::shared_ptr<const BlockTable> Memory() const override;
  // Live queries that came after a drift take the places of sampled ones, and teach the indexes of
  // this context and its forks when they are half of what is kept.
  bool NoteFit(uint32_t layer, uint32_t kv_head, IndexFit fit) override;

  // Background: publishes full blocks, attaches runs, has them indexed.
  void Maintain() override;

 private:
  enum class Caller { kAppend, kAttend };

  // As QuerySamples::Add, of each position.
  bool KeepSamples(const AppendRequest& r);
  absl::Status CheckInput(const KvInput& input) const;
  absl::Status CheckSamples(const AppendRequest& r) const;  // after CheckInput of its fields
  // The table it returns is the one to write to.
  absl::StatusOr<std::shared_ptr<const BlockTable>> Claim(const KvInput& input, Caller caller);
  absl::Status CopyIn(const KvInput& input, const BlockTable& table) const;
  // Of a copy that ended so: takes the token ids, or ends the claim and says why. From here on
  // nothing can fail.
  absl::Status TakeIds(const KvInput& input, absl::Status outcome);
  void EndClaim(const KvInput& input) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Ends the claim, and makes what was copied readable.
  void MoveFrontier(const KvInput& input);
  absl::Status CheckIds(const KvInput& input, std::span<const uint32_t>* fresh) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes note of which layer is appended to; true if the one before has more runs to be indexed.
  bool SettleBefore(uint32_t layer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Counts blocks that became full; true if one is full in all layers and heads.
  bool CountFullBlocks(const KvInput& input) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // Where appends go on after `token`: behind the stretch that is placed there, if one is.
  uint32_t BehindPlaced(uint32_t token) const;

  void PublishFullBlocks() ABSL_EXCLUSIVE_LOCKS_REQUIRED(maintenance_mutex_);
  // Returns the id it is published under.
  absl::StatusOr<BlockId> PublishBlock(const BlockTable& table, uint32_t block,
                                       std::span<const uint32_t> ids)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(maintenance_mutex_);
  // The parent's id for what follows this block of the table; before it is published, the id that
  // it will have.
  BlockId IdOf(const BlockTable& table, uint32_t block, const BlockId& parent,
               std::span<const uint32_t> ids) const;
  void AttachRuns() ABSL_EXCLUSIVE_LOCKS_REQUIRED(maintenance_mutex_);
  // Into the table's runs, those whose blocks are published now; true if there are any.
  bool AttachPublished(const BlockTable& table, std::vector<RunUse>* runs)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(maintenance_mutex_);
  // The same for those that only some layers have.
  bool OpenRuns(const BlockTable& table, std::vector<RunUse>* runs)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(maintenance_mutex_);
  uint32_t SettledRuns(uint32_t layer) const;
  uint32_t MostSettledRuns() const;
  void IndexRuns() ABSL_EXCLUSIVE_LOCKS_REQUIRED(maintenance_mutex_);
  std::shared_ptr<const BlockTable> TableOrRemains() const;

  std::atomic<uint32_t>& Frontier(uint32_t layer, uint32_t kv_head) {
    return frontier_[size_t{layer} * shape().kv_heads + kv_head];
  }
  const std::atomic<uint32_t>& Frontier(uint32_t layer, uint32_t kv_head) const {
    return frontier_[size_t{layer} * shape().kv_heads + kv_head];
  }

  // Constant after construction.
  const ContextServices services_;
  const ContextParams params_;
  const std::vector<PlacedStretch> placed_;  // as every table's
  const std::vector<uint32_t> copied_blocks_;  // as ContextStart's
  // [layer][kv_head]: tokens stored. Written by the claim's holder under mutex_.
  std::vector<std::atomic<uint32_t>> frontier_;
  const std::shared_ptr<QuerySamples> samples_;
  std::vector<std::atomic<uint32_t>> attends_;  // [layer][first KV head], to sample evenly
  std::atomic<uint64_t> considered_renewal_{0};  // of samples_, when runs were considered last

  // One publisher at a time; taken before mutex_, never by an append or an attend.
  absl::Mutex maintenance_mutex_ ABSL_ACQUIRED_BEFORE(mutex_);
  uint32_t published_blocks_ ABSL_GUARDED_BY(maintenance_mutex_) = 0;  // from token 0
  BlockId last_id_ ABSL_GUARDED_BY(maintenance_mutex_);                // the next block's parent
  bool publishing_failed_ ABSL_GUARDED_BY(maintenance_mutex_) = false;
  uint32_t next_run_ ABSL_GUARDED_BY(maintenance_mutex_) = 0;  // to be attached
  // Those below were opened, or passed; and which were opened, rising.
  uint32_t opened_runs_ ABSL_GUARDED_BY(maintenance_mutex_) = 0;
  std::vector<uint32_t> own_open_ ABSL_GUARDED_BY(maintenance_mutex_);

  // Held for bookkeeping only, never during a copy or a scan.
  mutable absl::Mutex mutex_;
  std::shared_ptr<const BlockTable> table_ ABSL_GUARDED_BY(mutex_);
  std::vector<uint32_t> token_ids_ ABSL_GUARDED_BY(mutex_);
  std::vector<bool> claimed_ ABSL_GUARDED_BY(mutex_);          // [layer][kv_head]
  std::vector<uint32_t> full_strips_ ABSL_GUARDED_BY(mutex_);  // per block, of layers * kv_heads
  uint32_t appended_layer_ ABSL_GUARDED_BY(mutex_) = 0;        // last
  // [layer] of the grid, that all its KV heads have, when it was last left for another layer.
  std::vector<uint32_t> settled_runs_ ABSL_GUARDED_BY(mutex_);
  bool sealed_ ABSL_GUARDED_BY(mutex_) = false;
  bool retired_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace quarry

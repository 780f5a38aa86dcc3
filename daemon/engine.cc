#include "daemon/engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "daemon/attend_batch.h"
#include "daemon/auditor.h"
#include "daemon/background.h"
#include "daemon/bulk_pool.h"
#include "daemon/context_factory.h"
#include "daemon/context_table.h"
#include "daemon/engine_counters.h"
#include "daemon/executor.h"
#include "daemon/finite.h"
#include "daemon/opaque_blocks.h"
#include "daemon/run_indexer.h"
#include "daemon/run_registry.h"
#include "daemon/session_table.h"
#include "daemon/top_k.h"
#include "proto/attend_shape.h"
#include "proto/identity.h"
#include "proto/status_macros.h"
#include "storage/tiered_block_store.h"

namespace quarry {
namespace {

absl::Status CheckOptions(const EngineOptions& o) {
  const auto wrong = [](std::string_view key, uint64_t value, std::string_view wanted) {
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(key), " = ", value, ": ", std::string(wanted)));
  };
  if (o.run_tokens == 0 || o.run_tokens % kBlockTokens != 0) {
    return wrong("run_tokens", o.run_tokens, "a multiple of 256 is wanted");
  }
  if (o.task_tokens == 0 || o.task_tokens % kBlockTokens != 0) {
    return wrong("task_tokens", o.task_tokens, "a multiple of 256 is wanted");
  }
  constexpr uint32_t kMost = 1u << 30;  // so that sums of token numbers stay in 32 bits
  for (const auto& [key, value] :
       {std::pair("run_tokens", o.run_tokens), std::pair("task_tokens", o.task_tokens),
        std::pair("first_run_token", o.first_run_token),
        std::pair("max_context_tokens", o.max_context_tokens)}) {
    if (value > kMost) return wrong(key, value, "at most 2^30 is allowed");
  }
  if (o.max_context_tokens == 0) return wrong("max_context_tokens", 0, "at least 1 is wanted");
  if (o.index.threads == 0) return wrong("index.threads", 0, "at least 1 is wanted");
  if (o.index.query_samples == 0) {
    return wrong("index.query_samples", 0, "at least 1 is wanted");
  }
  if (o.audit.threads == 0) return wrong("audit.threads", 0, "at least 1 is wanted");
  if (o.max_queued_batches == 0) return wrong("max_queued_batches", 0, "at least 1 is wanted");
  return absl::OkStatus();
}

uint32_t ExecutorThreads(const EngineOptions& options) {
  if (options.executor_threads > 0) return options.executor_threads;
  // The poller has a core of its own.
  return std::max(2u, std::thread::hardware_concurrency()) - 1;
}

LatencySummary Summary(const LatencyPercentiles& p) {
  const auto us = [](uint64_t ns) { return static_cast<double>(ns) * 1e-3; };
  return {p.Count(),
          us(p.PercentileNs(0.5)),
          us(p.PercentileNs(0.9)),
          us(p.PercentileNs(0.99)),
          us(p.PercentileNs(0.999)),
          us(p.MaxNs())};
}

absl::Status CheckOneNamed(absl::string_view call, absl::string_view things,
                           std::initializer_list<bool> named) {
  const auto count = std::count(named.begin(), named.end(), true);
  if (count == 1) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(call, " names ", count, " of: ", things, "; one is wanted"));
}

// That wait; one is done at a time.
constexpr uint32_t kMostPrefetches = 64;

// Adds the time until its end to a histogram.
class Timed {
 public:
  explicit Timed(LatencyPercentiles& histogram) : histogram_(histogram) {}
  ~Timed() { histogram_.Add(std::chrono::steady_clock::now() - start_); }

 private:
  LatencyPercentiles& histogram_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

class EngineImpl final : public Engine {
 public:
  // log: the store's, or null.
  EngineImpl(const EngineOptions& options, std::unique_ptr<BlockStore> store, BlockLog* log)
      : options_(options),
        store_(std::move(store)),
        log_(log),
        stretches_(*store_),
        runs_({options.first_run_token, options.run_tokens}),
        archive_(log == nullptr || !RunIndexer::Enabled(options.index)
                     ? nullptr
                     : std::make_unique<IndexArchive>(log, &runs_, options.index.choice,
                                                      options.disk.indexes)),
        indexer_(options.index, &runs_, archive_.get()),
        sessions_(options.max_sessions, options.max_leases_per_session),
        contexts_(options.max_contexts),
        opaque_(*store_),
        auditor_(options.audit, options.task_tokens),
        factory_(
            {store_.get(), &stretches_, &runs_, &indexer_, &background_, &counters_, &auditor_},
            contexts_, options.max_context_tokens),
        executor_({ExecutorThreads(options), options.max_queued_batches}) {
    if (store_->page_bytes() == 0) return;
    // A thread of these waits for the disk most of the time.
    paged_executor_.emplace(
        ExecutorOptions{2 * ExecutorThreads(options), options.max_queued_batches});
  }

  // Prefetches end with the block that is being read.
  ~EngineImpl() override { draining_.store(true, std::memory_order_release); }

  absl::StatusOr<SessionId> StartSession(std::string_view tenant, std::string_view name) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Start(tenant, name));
    return session->id();
  }
  absl::StatusOr<std::string> SessionTenant(SessionId id) const override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    return session->tenant();
  }
  void EndSession(SessionId id) override {
    const std::shared_ptr<Session> session = sessions_.Remove(id);
    if (session == nullptr) return;
    for (ContextId context : session->End()) contexts_.Close(context);
  }

  absl::StatusOr<OpenResult> Open(SessionId id, const OpenRequest& request) override {
    const Timed timed(counters_.open);
    QUARRY_RETURN_IF_ERROR(CheckNotDraining());
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    return factory_.Open(*session, request);
  }
  absl::Status DeclareTokens(SessionId id, ContextId context,
                             std::span<const uint32_t> ids) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Context> c, FindContext(id, context));
    return c->DeclareTokens(ids);
  }
  absl::Status Append(SessionId id, const AppendRequest& request) override {
    const Timed timed(counters_.append);
    QUARRY_RETURN_IF_ERROR(CheckNotDraining());
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Context> c, FindContext(id, request.context));
    return c->Append(request);
  }
  absl::StatusOr<ContextInfo> Seal(SessionId id, ContextId context) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Context> c, FindContext(id, context));
    c->Seal();
    return c->Info();
  }
  absl::StatusOr<ContextId> Fork(SessionId id, const ForkRequest& request) override {
    QUARRY_RETURN_IF_ERROR(CheckNotDraining());
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    return factory_.Fork(*session, request);
  }
  absl::Status Close(SessionId id, ContextId context) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Context> c, FindContext(id, context));
    contexts_.Close(context);
    if (auto owner = sessions_.Find(c->params().owner); owner.ok()) {
      (*owner)->RemoveContext(context);
    }
    return absl::OkStatus();
  }
  absl::StatusOr<ContextInfo> Info(SessionId id, ContextId context) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Context> c, FindContext(id, context));
    return c->Info();
  }
  absl::StatusOr<std::vector<ContextInfo>> ListContexts(SessionId id) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    std::vector<ContextInfo> list;
    for (const auto& context : contexts_.List(session->tenant())) list.push_back(context->Info());
    return list;
  }

  absl::Status Read(SessionId id, ContextId context, uint32_t layer, TokenRange range,
                    std::span<std::byte> k, std::span<std::byte> v) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Context> c, FindContext(id, context));
    const absl::Status status = c->Read(layer, range, k, v);
    if (absl::IsDataLoss(status)) {
      counters_.read_digest_failures.fetch_add(1, std::memory_order_relaxed);
    }
    return status;
  }
  absl::StatusOr<BlockLease> LeaseContextBlock(SessionId id, ContextId context,
                                               uint32_t block) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Context> c,
                            contexts_.Find(session->tenant(), context));
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<const BlockTable> table, c->Table());
    if (block >= table->blocks.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("context ", context.value, ": block ", block, " of ", table->blocks.size()));
    }
    if (!table->blocks[block]->published()) {
      return absl::FailedPreconditionError(
          absl::StrCat("context ", context.value, ": block ", block, " is not published"));
    }
    if (table->blocks[block]->paged() != nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("context ", context.value, ": block ", block,
                       " is on the disk: its keys and values are to be read, not leased"));
    }
    if (table->TurnAt(block * kBlockTokens) != nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("context ", context.value, ": block ", block,
                       " is reused from another position: its keys are to be read, not leased"));
    }
    return session->AddLease(table->blocks[block]);
  }
  absl::StatusOr<BlockLease> LeaseEngineBlock(SessionId id, std::string_view name_space,
                                              std::string_view key) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    QUARRY_ASSIGN_OR_RETURN(std::shared_ptr<HeldBlock> block,
                            opaque_.Acquire(session->tenant(), name_space, key));
    return session->AddLease(std::move(block));
  }
  absl::Status ReleaseLease(SessionId id, LeaseId lease) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    return session->RemoveLease(lease);
  }
  absl::StatusOr<std::vector<bool>> Exists(SessionId id, std::string_view name_space,
                                           std::span<const std::string> keys) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    std::vector<bool> exists;
    for (const std::string& key : keys) {
      QUARRY_ASSIGN_OR_RETURN(const bool one, opaque_.Contains(session->tenant(), name_space, key));
      exists.push_back(one);
    }
    return exists;
  }
  absl::StatusOr<LongestPrefix> FindLongestPrefix(SessionId id,
                                                  const OpenRequest& request) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    QUARRY_ASSIGN_OR_RETURN(const std::vector<PrefixBlock> blocks,
                            factory_.LocatePrefix(*session, request));
    LongestPrefix prefix;
    for (const PrefixBlock& block : blocks) {
      prefix.tokens += kBlockTokens;
      prefix.blocks.push_back(block.key.id);
      if (block.place.in_ram) {
        prefix.ram_tokens += kBlockTokens;
      } else {
        prefix.load_bytes += block.place.bytes;
      }
    }
    prefix.expected_load_ms = absl::ToDoubleMilliseconds(store_->ExpectedLoad(prefix.load_bytes));
    return prefix;
  }
  absl::StatusOr<uint64_t> Prefetch(SessionId id, const OpenRequest& request) override {
    QUARRY_RETURN_IF_ERROR(CheckNotDraining());
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    QUARRY_ASSIGN_OR_RETURN(const std::vector<PrefixBlock> blocks,
                            factory_.LocatePrefix(*session, request));
    std::vector<BlockKey> keys;
    for (const PrefixBlock& block : blocks) {
      if (!block.place.in_ram) keys.push_back(block.key);
    }
    const uint64_t count = keys.size();
    if (count == 0) return 0;
    const bool taken = prefetches_.TrySubmit(
        [this, tenant = session->tenant(), keys = std::move(keys)] { Load(tenant, keys); });
    if (taken) return count;
    return absl::ResourceExhaustedError(
        absl::StrCat(kMostPrefetches, " requests to prefetch wait already"));
  }
  absl::StatusOr<PutResult> Put(SessionId id, std::string_view name_space, std::string_view key,
                                std::span<const std::byte> bytes,
                                std::optional<ByteDigest> digest) override {
    QUARRY_RETURN_IF_ERROR(CheckNotDraining());
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    return opaque_.Put(session->tenant(), name_space, key, bytes, digest);
  }
  absl::StatusOr<std::string> Get(SessionId id, std::string_view name_space, std::string_view key,
                                  ByteDigest* digest) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    return opaque_.Get(session->tenant(), name_space, key, digest, &counters_.read_digest_failures);
  }
  absl::StatusOr<uint64_t> Pin(SessionId id, const PinRequest& request) override;
  absl::Status Unpin(SessionId id, std::string_view name) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    return store_->Unpin(session->tenant(), name);
  }
  absl::StatusOr<uint64_t> Purge(SessionId id, const PurgeRequest& request) override;
  absl::StatusOr<FlushResult> Flush(SessionId id, const FlushRequest& request) override;
  absl::StatusOr<std::vector<BlockInfo>> ListBlocks(SessionId id, uint32_t limit) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    return store_->List(session->tenant(), limit);
  }

  void Attend(SessionId id, std::span<const AttendRow> rows, std::span<AttendAnswer> answers,
              std::function<void()> done) override;
  TopKAnswer TopK(SessionId id, const AttendRow& row, uint32_t k, bool gather) override;

  absl::StatusOr<std::vector<HeadAudit>> Audits(SessionId id) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    return auditor_.Of(session->tenant());
  }
  std::vector<HeadAudit> AuditsOfAllTenants() const override { return auditor_.OfAll(); }

  bool Work() override { return executor_.RunOne(); }
  void SetArmed(bool armed) override { executor_.SetArmed(armed); }
  absl::StatusOr<ExtentInfo> Extent(SessionId id, uint32_t extent) override {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
    return store_->arena().ExtentDescriptor(session->tenant(), extent);
  }
  void Drain() override {
    draining_.store(true, std::memory_order_release);
    auditor_.Drain();
  }
  EngineStats Stats() const override;

 private:
  // Of the blocks that are to be purged, if the disk may have indexes of them.
  std::vector<NamespaceDigest> NamespacesOf(const std::string& tenant,
                                            const PurgeRequest& request) const;
  void Load(const std::string& tenant, std::span<const BlockKey> keys);
  absl::Status CheckNotDraining() const {
    if (!draining_.load(std::memory_order_acquire)) return absl::OkStatus();
    return absl::UnavailableError("the daemon is draining");
  }
  absl::StatusOr<std::shared_ptr<Context>> FindContext(SessionId session_id,
                                                       ContextId context) const {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(session_id));
    return contexts_.Find(session->tenant(), context);
  }

  // In order of use: what stands below may hold blocks, contexts or jobs of what stands above.
  const EngineOptions options_;
  EngineCounters counters_;
  std::atomic<uint64_t> scratch_bytes_{0};  // of attends in flight
  std::atomic<bool> draining_{false};
  const std::unique_ptr<BlockStore> store_;
  BlockLog* const log_;
  StretchIndex stretches_;
  RunRegistry runs_;
  const std::unique_ptr<IndexArchive> archive_;
  RunIndexer indexer_;
  SessionTable sessions_;
  ContextTable contexts_;
  OpaqueBlocks opaque_;
  BackgroundWorker background_;
  Auditor auditor_;
  ContextFactory factory_;
  BulkPool prefetches_{{.threads = 1, .queue = kMostPrefetches, .name = "quarry-prefetch"}};
  // For attends that read pages of the disk, which no others wait behind.
  std::optional<Executor> paged_executor_;
  Executor executor_;  // first to end: answers what is queued
};

absl::StatusOr<uint64_t> EngineImpl::Pin(SessionId id, const PinRequest& request) {
  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
  std::vector<BlockId> blocks = request.blocks;
  if (request.context.has_value()) {
    if (!blocks.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "pin ", request.name, " names both blocks and context ", request.context->value));
    }
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Context> context,
                            contexts_.Find(session->tenant(), *request.context));
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<const BlockTable> table, context->Table());
    for (const auto& block : table->blocks) {
      if (block->published()) blocks.push_back(block->id());
    }
  }
  if (blocks.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("pin ", request.name, " names no published block"));
  }
  const absl::Time expires = request.ttl_ms == 0 ? absl::InfiniteFuture()
                                                 : absl::Now() + absl::Milliseconds(request.ttl_ms);
  QUARRY_RETURN_IF_ERROR(store_->Pin(session->tenant(), request.name, blocks, expires));
  return store_->PublishedBytes(session->tenant(), blocks);
}

absl::StatusOr<uint64_t> EngineImpl::Purge(SessionId id, const PurgeRequest& request) {
  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
  QUARRY_RETURN_IF_ERROR(CheckOneNamed(
      "a purge", "the whole tenant, a namespace, blocks",
      {request.whole_tenant, request.name_space.has_value(), !request.blocks.empty()}));
  const std::vector<NamespaceDigest> namespaces = NamespacesOf(session->tenant(), request);
  const absl::StatusOr<uint64_t> purged =
      store_->Purge(session->tenant(), request.name_space, request.blocks);
  // Indexes tell of keys and values. Afterwards: what is attached from now on sees that blocks are
  // gone.
  runs_.Purge(session->tenant(), request.name_space, request.blocks);
  stretches_.Sweep();  // they tell of tokens
  // Also those that another start made. A purge of the whole tenant has them already.
  for (const NamespaceDigest& name_space : namespaces) {
    QUARRY_RETURN_IF_ERROR(
        log_->Purge(session->tenant(), IndexNamespaceOf(name_space), {}).status());
  }
  return purged;
}

// Which of a namespace's indexes on the disk are of a named block is not known: all of them go, and
// are built anew when they are wanted.
std::vector<NamespaceDigest> EngineImpl::NamespacesOf(const std::string& tenant,
                                                      const PurgeRequest& request) const {
  if (log_ == nullptr) return {};
  if (request.name_space.has_value()) return {*request.name_space};
  absl::flat_hash_set<NamespaceDigest> namespaces;
  for (const BlockId& id : request.blocks) {
    if (const auto in_ram = store_->AcquireInRam(tenant, id); in_ram.ok()) {
      namespaces.insert(in_ram->key.name_space);
      store_->Release(in_ram->view.handle);
    } else if (const auto logged = log_->Find(tenant, id); logged.has_value()) {
      namespaces.insert(logged->name_space);
    }
  }
  namespaces.erase(NamespaceDigest{});  // engines' blocks have no runs
  return {namespaces.begin(), namespaces.end()};
}

// In order; a miss ends it, for what lies behind it cannot be reused.
void EngineImpl::Load(const std::string& tenant, std::span<const BlockKey> keys) {
  for (const BlockKey& key : keys) {
    if (draining_.load(std::memory_order_acquire)) return;
    const absl::StatusOr<BlockView> view = store_->Acquire(tenant, key);
    if (!view.ok()) return;
    store_->Release(view->handle);
  }
}

absl::StatusOr<FlushResult> EngineImpl::Flush(SessionId id, const FlushRequest& request) {
  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session, sessions_.Find(id));
  QUARRY_RETURN_IF_ERROR(
      CheckOneNamed("a flush", "the whole tenant, a context, blocks",
                    {request.whole_tenant, request.context.has_value(), !request.blocks.empty()}));
  if (request.whole_tenant) return store_->Flush(session->tenant(), std::nullopt);
  if (!request.context.has_value()) {
    return store_->Flush(session->tenant(), std::span<const BlockId>(request.blocks));
  }
  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<Context> context,
                          contexts_.Find(session->tenant(), *request.context));
  context->Maintain();
  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<const BlockTable> table, context->Table());
  std::vector<BlockId> blocks;
  uint32_t leading = 0;  // of the context's blocks, published from the first on
  for (const auto& block : table->blocks) {
    if (!block->published()) continue;
    leading += blocks.size() == leading && table->blocks[leading] == block ? 1 : 0;
    blocks.push_back(block->id());
  }
  QUARRY_ASSIGN_OR_RETURN(FlushResult result,
                          store_->Flush(session->tenant(), std::span<const BlockId>(blocks)));
  result.tokens =
      static_cast<uint32_t>(std::min<uint64_t>(leading, result.leading_blocks)) * kBlockTokens;
  return result;
}

void EngineImpl::Attend(SessionId id, std::span<const AttendRow> rows,
                        std::span<AttendAnswer> answers, std::function<void()> done) {
  absl::StatusOr<std::shared_ptr<Session>> session = sessions_.Find(id);
  absl::Status status = session.status();
  if (rows.size() != answers.size()) {
    status = absl::InvalidArgumentError(
        absl::StrCat(rows.size(), " rows with room for ", answers.size(), " answers"));
  }
  if (!status.ok()) {
    for (AttendAnswer& answer : answers) answer.status = status;
    done();
    return;
  }
  const auto batch = std::make_shared<AttendBatch>(
      AttendBatch::Params{*std::move(session), rows, answers, std::move(done), options_.task_tokens,
                          options_.inline_bytes, options_.max_attend_scratch_bytes, &scratch_bytes_,
                          &counters_, &auditor_},
      contexts_);
  batch->Start(executor_, paged_executor_.has_value() ? &*paged_executor_ : nullptr);
}

TopKAnswer EngineImpl::TopK(SessionId id, const AttendRow& row, uint32_t k, bool gather) {
  const auto failed = [](absl::Status status) {
    TopKAnswer answer;
    answer.status = std::move(status);
    return answer;
  };
  const absl::StatusOr<std::shared_ptr<Context>> context = FindContext(id, row.context);
  if (!context.ok()) return failed(context.status());
  const KvShape& s = (*context)->shape();
  if (absl::Status status = CheckRow(row, s); !status.ok()) return failed(std::move(status));
  if (absl::Status status = CheckHasQueries(row); !status.ok()) return failed(std::move(status));
  if (row.has_token) {
    return failed(absl::InvalidArgumentError("a top-k row carries no token"));
  }
  const uint32_t available =
      (*context)->AvailableTokens(row.layer, row.first_head / s.group(), row.heads / s.group());
  if (row.range.hi > available) {
    return failed(absl::InvalidArgumentError(
        absl::StrCat("context ", row.context.value, ": row of tokens [", row.range.lo, ", ",
                     row.range.hi, ") of layer ", row.layer, ", which has ", available)));
  }
  std::vector<float> q(size_t{row.heads} * s.head_dim);
  if (!row.range.empty() && !WidenFinite(row.q_dtype, row.q, q.size(), q.data())) {
    return failed(absl::InvalidArgumentError(absl::StrCat(
        "context ", row.context.value, ": NaN or infinity in a query of layer ", row.layer)));
  }
  const absl::StatusOr<std::shared_ptr<const BlockTable>> table = (*context)->Table();
  if (!table.ok()) return failed(table.status());
  const TopKQuery query{table->get(), &s,       row.layer,   row.range, row.first_head,
                        row.heads,    q.data(), row.q_dtype, k,         options_.task_tokens};
  return ExactTopK(query, gather);
}

EngineStats EngineImpl::Stats() const {
  const auto get = [](const std::atomic<uint64_t>& n) { return n.load(std::memory_order_relaxed); };
  EngineStats s;
  s.store = store_->Stats();
  s.contexts = contexts_.size();
  s.sessions = sessions_.size();
  s.leases = sessions_.leases();
  s.attend_rows = get(counters_.attend_rows);
  s.attend_failures = get(counters_.attend_failures);
  s.attend_bytes = get(counters_.attend_bytes);
  s.attend_tokens = get(counters_.attend_tokens);
  s.append_tokens = get(counters_.append_tokens);
  s.append_bytes = get(counters_.append_bytes);
  s.reused_tokens = get(counters_.reused_tokens);
  s.shifted_tokens = get(counters_.shifted_tokens);
  s.attend_shifted_rows = get(counters_.attend_shifted_rows);
  s.opened = get(counters_.opened);
  s.publish_failures = get(counters_.publish_failures);
  s.read_digest_failures = get(counters_.read_digest_failures);
  s.refused_batches = get(counters_.refused_batches);
  s.queued_batches = executor_.queued_jobs();
  if (paged_executor_.has_value()) s.queued_batches += paged_executor_->queued_jobs();
  s.runs_made = runs_.made();
  s.runs_live = runs_.live();
  s.index = indexer_.stats();
  s.audit = auditor_.stats();
  s.attend = Summary(counters_.attend);
  s.append = Summary(counters_.append);
  s.open = Summary(counters_.open);
  return s;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options) {
  QUARRY_RETURN_IF_ERROR(CheckOptions(options));
  BlockStoreOptions store_options;
  store_options.arena = options.arena;
  store_options.eviction = options.eviction;
  store_options.max_pinned_bytes_per_tenant = options.max_pinned_bytes_per_tenant;
  store_options.max_pins_per_tenant = options.max_pins_per_tenant;
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<BlockStore> store, BlockStore::Create(store_options));
  BlockLog* of_store = nullptr;
  if (!options.disk.file.path.empty()) {
    QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Disk> disk, OpenFileDisk(options.disk.file));
    QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<BlockLog> log,
                            BlockLog::Open(std::move(disk), options.disk.log));
    of_store = log.get();
    std::unique_ptr<PageCache> pages;
    if (options.disk.page_bytes > 0) {
      QUARRY_ASSIGN_OR_RETURN(pages, PageCache::Create(options.disk.page_bytes));
    }
    store = std::make_unique<TieredBlockStore>(std::move(store), std::move(log), options.disk.tier,
                                               std::move(pages));
  }
  return std::make_unique<EngineImpl>(options, std::move(store), of_store);
}

}  // namespace quarry

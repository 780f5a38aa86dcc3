// The engine: contexts over blocks, and attention over contexts. Transports (shared memory, gRPC)
// translate to these calls and nothing else; it knows no wire format and no socket.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/audit_options.h"
#include "daemon/index_archive_options.h"
#include "daemon/index_options.h"
#include "proto/audit_types.h"
#include "proto/kv_types.h"
#include "proto/retrieval_types.h"
#include "storage/block_store.h"
#include "storage/disk/file_disk.h"
#include "storage/log/block_log.h"
#include "storage/tiered_block_store.h"

namespace quarry {

// The disk tier; none where file.path is empty.
struct DiskTierOptions {
  FileDiskOptions file;
  BlockLogOptions log;
  TieredOptions tier;
  // For pages of blocks that are used on the disk, beside the arena. 0: none are, and a context has
  // to fit into the arena.
  uint64_t page_bytes = 512ull << 20;
  IndexArchiveOptions indexes;
};

struct EngineOptions {
  ArenaOptions arena;
  EvictionOptions eviction;
  DiskTierOptions disk;
  uint32_t max_contexts = 1024;
  uint32_t max_sessions = 256;
  uint64_t max_pinned_bytes_per_tenant = 1ull << 30;
  uint32_t max_pins_per_tenant = 4096;
  uint32_t executor_threads = 0;   // 0: one less than the cores, at least 1
  uint32_t run_tokens = 8192;      // of one index; a multiple of kBlockTokens
  uint32_t first_run_token = 128;  // the grid's origin: the static window's first part
  uint32_t task_tokens = 4096;     // tokens one executor task scans; a multiple of kBlockTokens
  uint64_t inline_bytes = 512ull << 10;  // a batch that reads no more is answered by its caller
  uint64_t max_attend_scratch_bytes = 4ull << 30;  // of all attends in flight, beside the arena
  uint32_t max_queued_batches = 1024;    // attend batches waiting; more are ResourceExhausted
  uint32_t max_leases_per_session = 65536;
  uint32_t max_context_tokens = 1u << 24;  // Open and Fork refuse a larger max_tokens
  IndexOptions index;
  AuditOptions audit;
};

struct PutResult {
  BlockId id;
  ByteDigest digest;
  bool existed = false;
};

// Percentiles since the start, in microseconds, within 13% (upper edge of a histogram bucket).
struct LatencySummary {
  uint64_t count = 0;
  double p50_us = 0, p90_us = 0, p99_us = 0, p999_us = 0, max_us = 0;
};

struct EngineStats {
  BlockStoreStats store;
  uint64_t contexts = 0, sessions = 0;
  uint64_t attend_rows = 0, attend_failures = 0, attend_bytes = 0, attend_tokens = 0;
  uint64_t append_tokens = 0, append_bytes = 0;
  uint64_t reused_tokens = 0, opened = 0;
  uint64_t shifted_tokens = 0;       // reused from another position or behind other text
  uint64_t attend_shifted_rows = 0;  // answered over such tokens
  uint64_t runs_made = 0;  // since the start
  uint64_t runs_live = 0;
  IndexStats index;
  AuditStats audit;
  uint64_t leases = 0;  // of all sessions
  uint64_t publish_failures = 0;
  uint64_t read_digest_failures = 0;  // Read, Get: answered as DataLoss or a miss
  uint64_t queued_batches = 0, refused_batches = 0;
  LatencySummary attend;  // whole batches, from the call to the last answer
  LatencySummary append;
  LatencySummary open;
};

// Thread-safe. Every call names the session; a session sees only its tenant's contexts and
// blocks, and what it leases ends with EndSession. Any session of a tenant may use a context that
// another session of that tenant opened (tensor and pipeline parallel workers); the context ends
// with the session that opened it.
//
// Errors of every call: NotFound for an unknown session, context, lease or key, also when it is
// another tenant's; Unavailable after Drain where said; InvalidArgument and FailedPrecondition
// name the object and the numbers.
class Engine {
 public:
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options);
  // Waits for attends in flight.
  virtual ~Engine() = default;

  // The tenant comes from the transport (peer credentials, TLS identity), never from a request.
  // 1 to 255 bytes. Ids are random, so that one cannot be guessed; a transport still checks that
  // the peer's tenant is SessionTenant(). ResourceExhausted at max_sessions.
  virtual absl::StatusOr<SessionId> StartSession(std::string_view tenant,
                                                 std::string_view name) = 0;
  virtual absl::StatusOr<std::string> SessionTenant(SessionId session) const = 0;
  // Closes the session's contexts and ends its leases; returns without waiting for anybody. Its
  // attends in flight are answered Cancelled within the task they run, and keep what they read:
  // the caller's buffers must live until their `done` has run.
  virtual void EndSession(SessionId session) = 0;

  // Finds and leases the longest cached prefix of request.tokens and reserves blocks for the
  // rest of max_tokens. What of the prefix RAM has no room for is used on the disk, if there is
  // room for pages of it (DiskTierOptions::page_bytes).
  // - Whole blocks only, and at least one token is left to compute (its logits are wanted):
  //   reused_tokens <= tokens.size() - 1.
  // - At each block the accepted recipes are tried in order (none given: recipe alone).
  // - All digests in request.inputs are hashed into the first block's id, thereby into every
  //   descendant's: contexts with other inputs share nothing.
  // - Cached KV of the same identity but another shape or dtype is a miss.
  // With request.reuse_shifted, blocks behind the prefix that are cached at another position or
  // behind other text are leased too, if they have the same tokens, inputs and namespace of an
  // accepted recipe. They are no part of reused_tokens: result.shifted names them. Appends go on
  // behind each when they reach it; attends turn queries by its shift, Read and gathered keys are
  // turned. What is appended behind the first is of ShiftedRecipeOf(recipe). InvalidArgument: the
  // rope has no frequencies.
  // ResourceExhausted: no room for max_tokens, or max_contexts. FailedPrecondition: max_tokens
  // beyond rope.regime_max_tokens. request.tokens are the context's known ids.
  virtual absl::StatusOr<OpenResult> Open(SessionId, const OpenRequest&) = 0;
  // Ids of tokens to come, so that several writers (tensor or pipeline parallel) can append.
  virtual absl::Status DeclareTokens(SessionId, ContextId, std::span<const uint32_t> ids) = 0;
  // Copies K and V of [lo, hi) of one layer and a range of KV heads. InvalidArgument: lo is not
  // the next token of these heads, wrong heads or layer, NaN or infinity (names layer, token and
  // KV head), other ids than known. FailedPrecondition: beyond max_tokens, sealed, or another
  // call is appending to the same layer and heads. A failed append advances nothing.
  // new_token_ids: the ids of `range`, or of [known_tokens, range.hi), or none.
  virtual absl::Status Append(SessionId, const AppendRequest&) = 0;
  // No more appends; returns when every full block whose token ids are known is published, or
  // cannot be (its id names KV of another shape; it stays private and is counted).
  virtual absl::StatusOr<ContextInfo> Seal(SessionId, ContextId) = 0;
  // A context that shares [0, tokens) and appends its own tokens from there. Whole blocks are
  // shared, a partial last block is copied. If the copied tokens were computed under another
  // recipe that is not dense, that block and its successors stay private.
  virtual absl::StatusOr<ContextId> Fork(SessionId, const ForkRequest&) = 0;
  virtual absl::Status Close(SessionId, ContextId) = 0;
  virtual absl::StatusOr<ContextInfo> Info(SessionId, ContextId) = 0;
  // Of the session's tenant, by id.
  virtual absl::StatusOr<std::vector<ContextInfo>> ListContexts(SessionId) = 0;

  // Copies K and V [token][kv_head][head_dim] of one layer into out (both halves the same size).
  // The first read of a reused block checks its digest; DataLoss retires the block: open again.
  virtual absl::Status Read(SessionId, ContextId, uint32_t layer, TokenRange range,
                            std::span<std::byte> k, std::span<std::byte> v) = 0;
  // Leases end with ReleaseLease or the session. FailedPrecondition: the block is not published, is
  // reused from another position (its bytes are of there), or is used on the disk.
  virtual absl::StatusOr<BlockLease> LeaseContextBlock(SessionId, ContextId, uint32_t block) = 0;
  virtual absl::StatusOr<BlockLease> LeaseEngineBlock(SessionId, std::string_view engine_namespace,
                                                      std::string_view key) = 0;
  virtual absl::Status ReleaseLease(SessionId, LeaseId) = 0;
  virtual absl::StatusOr<std::vector<bool>> Exists(SessionId, std::string_view engine_namespace,
                                                   std::span<const std::string> keys) = 0;
  // What Open would reuse now; nothing is leased, and nothing read from the disk.
  virtual absl::StatusOr<LongestPrefix> FindLongestPrefix(SessionId, const OpenRequest&) = 0;
  // Brings what FindLongestPrefix finds on the disk into RAM, in the background and in the order of
  // the tokens, behind what was asked for before; how far it is, FindLongestPrefix tells. Returns
  // how many blocks that is. ResourceExhausted: too many requests wait.
  virtual absl::StatusOr<uint64_t> Prefetch(SessionId, const OpenRequest&) = 0;
  // DataLoss: `digest` is given and is not that of the bytes as copied. The first put of a key
  // wins; a later one returns the stored block's digest with `existed`.
  virtual absl::StatusOr<PutResult> Put(SessionId, std::string_view engine_namespace,
                                        std::string_view key, std::span<const std::byte> bytes,
                                        std::optional<ByteDigest> digest) = 0;
  // A miss (NotFound) also when the digest check failed.
  virtual absl::StatusOr<std::string> Get(SessionId, std::string_view engine_namespace,
                                          std::string_view key, ByteDigest* digest) = 0;
  virtual absl::StatusOr<uint64_t> Pin(SessionId, const PinRequest&) = 0;  // bytes pinned
  virtual absl::Status Unpin(SessionId, std::string_view name) = 0;
  // Blocks retired. Unavailable, ResourceExhausted: nobody finds them now, but the disk may bring
  // them back after a restart: purge again.
  virtual absl::StatusOr<uint64_t> Purge(SessionId, const PurgeRequest&) = 0;
  // Hands blocks to the disk and says how far they are; ask again until none is pending. Full
  // blocks of the context are published first. FailedPrecondition: there is no disk.
  virtual absl::StatusOr<FlushResult> Flush(SessionId, const FlushRequest&) = 0;
  virtual absl::StatusOr<std::vector<BlockInfo>> ListBlocks(SessionId, uint32_t limit) = 0;

  // Answers every row, each with its own status; `done` runs once, on the thread that writes the
  // last answer. Small batches (inline_bytes) are answered before it returns; larger ones are
  // left to the executor, which the caller may help with Work.
  // answers.size() == rows.size(); o and lse of the row's size. Both spans, the buffers they name
  // and q, k, v must live until `done`; q, k and v are read once, o and lse are only written.
  // Rows are taken in order: a row may attend the token of an earlier row of the batch. Rows that
  // share blocks, layer and KV head are scanned in one pass.
  // Row statuses: InvalidArgument (heads not whole groups, range beyond the stored tokens of the
  // layer and heads, NaN or infinity in q, k or v), FailedPrecondition (token_position is not the
  // next one), NotFound (context), ResourceExhausted (queue full), Cancelled (session ended). Rows
  // over blocks that are used on the disk also NotFound (a block was purged), DataLoss (it is not
  // what was written) and Unavailable (the disk).
  // A row that fails stores no token, unless its status is Cancelled or it reads the disk.
  virtual void Attend(SessionId, std::span<const AttendRow> rows, std::span<AttendAnswer> answers,
                      std::function<void()> done) = 0;
  // Does one task of the attends in flight, whoever's (task_tokens of one KV head), if there is
  // one: false if not.
  virtual bool Work() = 0;
  // The k best tokens of row.range by exact score, per query head; runs on the calling thread.
  // The row's budget is not used and it may carry no token.
  virtual TopKAnswer TopK(SessionId, const AttendRow& row, uint32_t k, bool gather) = 0;

  // What audits of live answers found since the start, by model, layer and KV head: of the
  // session's tenant, and, for the operator's metrics, of all tenants, models of one name together.
  virtual absl::StatusOr<std::vector<HeadAudit>> Audits(SessionId) = 0;
  virtual std::vector<HeadAudit> AuditsOfAllTenants() const = 0;

  // Executors spin while at least one client is armed, then park.
  virtual void SetArmed(bool armed) = 0;

  // The descriptor of an extent of the session's tenant (owned by the arena).
  virtual absl::StatusOr<ExtentInfo> Extent(SessionId, uint32_t extent) = 0;

  // After Drain, Open, Append and Put are Unavailable; attends in flight finish, audits end.
  virtual void Drain() = 0;
  virtual EngineStats Stats() const = 0;
};

}  // namespace quarry

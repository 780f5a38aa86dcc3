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
#include "proto/kv_types.h"
#include "proto/retrieval_types.h"
#include "storage/block_store.h"

namespace quarry {

struct EngineOptions {
  ArenaOptions arena;
  uint32_t max_contexts = 1024;
  uint32_t max_sessions = 256;
  uint64_t max_pinned_bytes_per_tenant = 1ull << 30;
  uint32_t executor_threads = 0;     // 0: one less than the cores, at least 1
  uint32_t run_tokens = 8192;        // of one index; a multiple of kBlockTokens
  uint32_t first_run_token = 128;    // the grid's origin: the static window's first part
  uint32_t task_tokens = 4096;       // tokens one executor task scans
};

struct LongestPrefix {
  uint32_t tokens = 0;
  std::vector<BlockId> blocks;
};

struct PutResult {
  BlockId id;
  ByteDigest digest;
  bool existed = false;
};

struct EngineStats {
  BlockStoreStats store;
  uint64_t contexts = 0, sessions = 0;
  uint64_t attend_rows = 0, attend_failures = 0, attend_bytes = 0, attend_tokens = 0;
  uint64_t append_tokens = 0, append_bytes = 0;
  uint64_t reused_tokens = 0, opened = 0;
  uint64_t runs_indexed = 0;
};

// Thread-safe. Every call names the session; a session sees only its tenant's contexts and
// blocks, and what it leases ends with EndSession.
class Engine {
 public:
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options);
  virtual ~Engine() = default;

  // The tenant comes from the transport (peer credentials, TLS identity), never from a request.
  virtual absl::StatusOr<SessionId> StartSession(std::string_view tenant, std::string_view name) = 0;
  // Closes the session's contexts and ends its leases. Attends in flight finish first, within
  // the task they run; never waits for a client.
  virtual void EndSession(SessionId session) = 0;

  virtual absl::StatusOr<OpenResult> Open(SessionId, const OpenRequest&) = 0;
  // Ids of tokens to come, so that several writers (tensor or pipeline parallel) can append.
  virtual absl::Status DeclareTokens(SessionId, ContextId, std::span<const uint32_t> ids) = 0;
  virtual absl::Status Append(SessionId, const AppendRequest&) = 0;
  // No more appends; returns when every full block is published.
  virtual absl::StatusOr<ContextInfo> Seal(SessionId, ContextId) = 0;
  virtual absl::StatusOr<ContextId> Fork(SessionId, const ForkRequest&) = 0;
  virtual absl::Status Close(SessionId, ContextId) = 0;
  virtual absl::StatusOr<ContextInfo> Info(SessionId, ContextId) = 0;
  virtual absl::StatusOr<std::vector<ContextInfo>> ListContexts(SessionId) = 0;

  // Copies K and V [token][kv_head][head_dim] of one layer into out (both halves the same size).
  virtual absl::Status Read(SessionId, ContextId, uint32_t layer, TokenRange range,
                            std::span<std::byte> k, std::span<std::byte> v) = 0;
  virtual absl::StatusOr<BlockLease> LeaseContextBlock(SessionId, ContextId, uint32_t block) = 0;
  virtual absl::StatusOr<BlockLease> LeaseEngineBlock(SessionId, std::string_view engine_namespace,
                                                      std::string_view key) = 0;
  virtual absl::Status ReleaseLease(SessionId, LeaseId) = 0;
  virtual absl::StatusOr<std::vector<bool>> Exists(SessionId, std::string_view engine_namespace,
                                                   std::span<const std::string> keys) = 0;
  virtual absl::StatusOr<LongestPrefix> FindLongestPrefix(SessionId, const OpenRequest&) = 0;
  virtual absl::StatusOr<PutResult> Put(SessionId, std::string_view engine_namespace,
                                        std::string_view key, std::span<const std::byte> bytes,
                                        std::optional<ByteDigest> digest) = 0;
  // A miss (NotFound) also when the digest check failed.
  virtual absl::StatusOr<std::string> Get(SessionId, std::string_view engine_namespace,
                                          std::string_view key, ByteDigest* digest) = 0;
  virtual absl::StatusOr<uint64_t> Pin(SessionId, const PinRequest&) = 0;  // bytes pinned
  virtual absl::Status Unpin(SessionId, std::string_view name) = 0;
  virtual absl::StatusOr<uint64_t> Purge(SessionId, const PurgeRequest&) = 0;  // blocks retired
  virtual absl::StatusOr<std::vector<BlockInfo>> ListBlocks(SessionId, uint32_t limit) = 0;

  // Answers every row, each with its own status; `done` runs once, on an executor or the calling
  // thread, after the last answer is written. Small batches are answered before it returns.
  virtual void Attend(SessionId, std::span<const AttendRow> rows, std::span<AttendAnswer> answers,
                      std::function<void()> done) = 0;
  virtual TopKAnswer TopK(SessionId, const AttendRow& row, uint32_t k, bool gather) = 0;

  // Executors spin while at least one client is armed, then park.
  virtual void SetArmed(bool armed) = 0;

  // The descriptor of an extent of the session's tenant (owned by the arena).
  virtual absl::StatusOr<ExtentInfo> Extent(SessionId, uint32_t extent) = 0;

  // After Drain, Open, Append and Put are Unavailable; attends in flight finish.
  virtual void Drain() = 0;
  virtual EngineStats Stats() const = 0;
};

}  // namespace quarry

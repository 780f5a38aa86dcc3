// The client library: one session with a daemon on this machine, over shared memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/rung_attends.h"
#include "proto/audit_types.h"
#include "proto/default_socket.h"
#include "proto/kv_types.h"
#include "proto/retrieval_types.h"

namespace quarry {

struct ClientOptions {
  std::string socket_path = DefaultSocket();
  std::string name = "client";
  uint32_t slots = 0;          // 0: the daemon's default
  uint64_t slot_bytes = 0;     // bounds one message: an append is split, a put is refused above it
  absl::Duration deadline = absl::Seconds(10);  // of one request; then Unavailable
  enum class Verify { kNever, kAlways } verify = Verify::kAlways;  // digest of copying gets
};

struct BlockSummary {
  BlockId id, parent;
  NamespaceDigest name_space;  // all zero: an engine's block
  uint64_t bytes = 0;
  std::string state;
  uint32_t leases = 0, children = 0;
  bool in_ram = false, on_disk = false;
  std::vector<std::string> pins;
};

struct DaemonStatus {
  std::string version;
  uint64_t pid = 0;
  double uptime_seconds = 0;
  bool draining = false;
  std::string tenant;      // the caller's
  std::string simd_level;  // of the kernels in use
};

// Completion of an asynchronous request. Dropping it abandons the answer, not the
// request: its slot is reused only after the daemon has answered.
class PendingAttend {
 public:
  virtual ~PendingAttend() = default;
  virtual bool Done() const = 0;       // does not block
  virtual absl::Status Wait() = 0;     // fills the answers given to AttendAsync; Unavailable = void
};

// A leased, read-only block in this process's memory. Ends the lease when destroyed.
class LeasedBlock {
 public:
  virtual ~LeasedBlock() = default;
  virtual std::span<const std::byte> bytes() const = 0;
  virtual const ByteDigest& digest() const = 0;
  // DataLoss if the bytes do not have the digest.
  virtual absl::Status Verify() const = 0;
  // Copies bytes [offset, offset + out.size()); verifies in the same pass when it is the whole
  // block and `verify` asks for it.
  virtual absl::Status CopyTo(uint64_t offset, std::span<std::byte> out) const = 0;
};

// A lease that has been asked for. Dropping it waits for the answer and gives the lease back.
class PendingLease {
 public:
  virtual ~PendingLease() = default;
  virtual bool Done() const = 0;  // does not block
  // Once. NotFound: a miss.
  virtual absl::StatusOr<std::unique_ptr<LeasedBlock>> Wait() = 0;
};

// Thread-safe. Every error names the object and the numbers; Unavailable means that the daemon
// has gone or missed the deadline, and stays until a new Connect.
class Client {
 public:
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const ClientOptions& options);
  virtual ~Client() = default;

  virtual const std::string& tenant() const = 0;
  virtual SessionId session() const = 0;

  virtual absl::StatusOr<OpenResult> Open(const OpenRequest&) = 0;
  // The whole blocks that Open would reuse now, and where they are; nothing is leased or loaded.
  virtual absl::StatusOr<quarry::LongestPrefix> LongestPrefix(const OpenRequest&) = 0;
  // Brings those that are on the disk into RAM, in the background; LongestPrefix tells how far that
  // is. Returns how many there are. ResourceExhausted: too many requests wait.
  virtual absl::StatusOr<uint64_t> Prefetch(const OpenRequest&) = 0;
  virtual absl::Status DeclareTokens(ContextId, std::span<const uint32_t> ids) = 0;
  virtual absl::Status Append(const AppendRequest&) = 0;
  virtual absl::StatusOr<ContextInfo> Seal(ContextId) = 0;
  virtual absl::StatusOr<ContextId> Fork(const ForkRequest&) = 0;
  virtual absl::Status Close(ContextId) = 0;
  virtual absl::StatusOr<std::vector<ContextInfo>> ListContexts() = 0;
  // Remembered from Open and Fork, else asked of the daemon once.
  virtual absl::StatusOr<KvShape> Shape(ContextId) = 0;

  virtual absl::Status Read(ContextId, uint32_t layer, TokenRange range, std::span<std::byte> k,
                            std::span<std::byte> v) = 0;
  virtual absl::StatusOr<std::unique_ptr<LeasedBlock>> LeaseContextBlock(ContextId,
                                                                         uint32_t block) = 0;

  virtual absl::Status Put(std::string_view engine_namespace, std::string_view key,
                           std::span<const std::byte> bytes) = 0;
  virtual absl::StatusOr<std::unique_ptr<LeasedBlock>> Lease(std::string_view engine_namespace,
                                                             std::string_view key) = 0;
  // Asked for while the block before it is being copied, a lease costs no round trip.
  virtual absl::StatusOr<std::unique_ptr<PendingLease>> LeaseAsync(
      std::string_view engine_namespace, std::string_view key) = 0;
  virtual absl::StatusOr<std::string> Get(std::string_view engine_namespace,
                                          std::string_view key) = 0;
  virtual absl::StatusOr<std::vector<bool>> Exists(std::string_view engine_namespace,
                                                   std::span<const std::string> keys) = 0;
  virtual absl::StatusOr<uint64_t> Pin(const PinRequest&) = 0;
  virtual absl::Status Unpin(std::string_view name) = 0;
  virtual absl::StatusOr<uint64_t> Purge(const PurgeRequest&) = 0;

  // Returns when all that is named survives a restart of the daemon. DeadlineExceeded: not so much
  // after `longest`; Unavailable: the disk refuses some; NotFound: some are in no tier; each says
  // how many. FailedPrecondition: the daemon has no disk.
  virtual absl::StatusOr<FlushResult> Flush(const FlushRequest&, absl::Duration longest) = 0;

  // Published blocks of the tenant, of all tiers.
  virtual absl::StatusOr<std::vector<BlockSummary>> ListBlocks(uint32_t limit) = 0;
  virtual absl::StatusOr<DaemonStatus> Status() = 0;
  // Counters and gauges by their metric names, as on /metrics.
  virtual absl::StatusOr<std::map<std::string, double>> Statistics() = 0;
  // What audits of live answers found since the start, for the tenant's models, by model, layer and
  // KV head.
  virtual absl::StatusOr<std::vector<HeadAudit>> Audits() = 0;
  // PermissionDenied unless the caller is the daemon's own user or an administrator.
  virtual absl::Status Drain() = 0;

  // Arms the daemon's poller for one token: it spins until Disarm. Counted: several threads'
  // tokens may be in flight.
  virtual void Arm() = 0;
  virtual void Disarm() = 0;
  // Buffers of rows and answers are the caller's and are copied through the slot.
  virtual absl::Status Attend(std::span<const AttendRow> rows, std::span<AttendAnswer> answers) = 0;
  virtual absl::StatusOr<std::unique_ptr<PendingAttend>> AttendAsync(
      std::span<const AttendRow> rows, std::span<AttendAnswer> answers) = 0;
  // The channel's memory, which a device maps to ring attends itself.
  virtual std::span<std::byte> channel_memory() = 0;
  // Attends for a device to ring: `messages` messages of rows that ask for tokens, store one each,
  // and have fp32 queries and no buffers. The client outlives them.
  virtual absl::StatusOr<std::unique_ptr<RungAttends>> RingElsewhere(
      std::span<const AttendRow> rows, uint32_t messages) = 0;
  virtual absl::StatusOr<TopKAnswer> TopK(const AttendRow& row, uint32_t k, bool gather) = 0;
  // One empty request: the protocol's round trip.
  virtual absl::Status Nop() = 0;
};

}  // namespace quarry

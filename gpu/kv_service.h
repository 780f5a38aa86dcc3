// What the worker asks of whoever keeps its KV: the daemon in production, a fake in tests.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "client/client.h"
#include "proto/kv_types.h"
#include "proto/retrieval_types.h"

namespace quarry {

// Used by one thread, except that Append may run beside the others.
class KvService {
 public:
  virtual ~KvService() = default;
  virtual absl::StatusOr<OpenResult> Open(const OpenRequest&) = 0;
  virtual absl::Status Append(const AppendRequest&) = 0;
  virtual absl::StatusOr<ContextId> Fork(const ForkRequest&) = 0;
  virtual absl::Status DeclareTokens(ContextId, std::span<const uint32_t> ids) = 0;
  virtual absl::Status Close(ContextId) = 0;
  // K and V [token][kv_head][head_dim] of one layer.
  virtual absl::Status Read(ContextId, uint32_t layer, TokenRange, std::span<std::byte> k,
                            std::span<std::byte> v) = 0;
  // Starts an attend; Wait() of what it returns fills the answers.
  virtual absl::StatusOr<std::unique_ptr<PendingAttend>> Attend(
      std::span<const AttendRow> rows, std::span<AttendAnswer> answers) = 0;
  // As Client's, for a device that rings; a service without shared memory is Unimplemented.
  virtual std::span<std::byte> channel_memory() { return {}; }
  virtual absl::StatusOr<std::unique_ptr<RungAttends>> RingElsewhere(
      std::span<const AttendRow> rows, uint32_t messages);
  virtual void Arm(bool armed) = 0;
  // Bytes of K and V that the service holds for the context, shared ones included.
  virtual absl::StatusOr<uint64_t> HeldBytes(ContextId) = 0;
};

// Over a connected client.
std::unique_ptr<KvService> MakeKvService(std::unique_ptr<Client> client);

}  // namespace quarry

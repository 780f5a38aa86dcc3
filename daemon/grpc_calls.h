// What the three gRPC services share: who calls, limits, and where calls run. Included by
// daemon/grpc_*.cc only.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/service_type.h>

#include "absl/status/statusor.h"
#include "daemon/bulk_pool.h"
#include "daemon/call_handlers.h"
#include "daemon/grpc_options.h"
#include "daemon/grpc_peers.h"
#include "daemon/tenant_limits.h"

namespace quarry {

// Calls use gRPC's callback interface: no thread belongs to a call while it waits for its client
// or for the engine, so a client that stops reading or writing holds up nobody. Work runs on a
// bounded pool; a full queue is ResourceExhausted.
struct GrpcShared {
  const GrpcOptions& options;
  const ServiceParts& parts;
  const PeerTenants& tenants;
  GrpcPeers& peers;
  BulkPool& pool;
  TenantLimit& calls;
  TenantLimit& sessions;
  TransportCounters& counters;
  std::atomic<uint32_t>& working;  // calls between their request and their answer
};

grpc::Status ToGrpc(const absl::Status& status);

// The peer's identity, from its connection.
absl::StatusOr<PeerIdentity> IdentityOf(const GrpcShared& shared,
                                        const grpc::CallbackServerContext& context);

enum class SessionPolicy { kRequired, kOptional };
// The peer and its session (metadata "quarry-session"), which must be of the peer's tenant.
// Unavailable while draining, unless the session is optional (those are the operator's calls).
absl::StatusOr<Caller> CallerOf(const GrpcShared& shared,
                                const grpc::CallbackServerContext& context, SessionPolicy policy);

// What every call begins with: its caller and its place among the tenant's open calls.
struct Admission {
  Caller caller;
  TenantLimit::Ticket ticket;
};
absl::StatusOr<Admission> Admit(const GrpcShared& shared,
                                const grpc::CallbackServerContext& context,
                                SessionPolicy policy = SessionPolicy::kRequired);

// Runs `work` on the pool; false, and counted, when its queue is full. `working` covers it.
[[nodiscard]] bool RunOnPool(const GrpcShared& shared, std::function<void()> work);
absl::Status PoolFull();
void CountEnd(const GrpcShared& shared, const absl::Status& status);

// A unary call whose work is one function on the pool.
class UnaryCall : public grpc::ServerUnaryReactor {
 public:
  explicit UnaryCall(const GrpcShared& shared) : shared_(shared) {}
  // A call counts as open until its reply is sent, so that replies nobody reads stay bounded.
  // Small ones do not: gRPC may note that they are sent only after the client has gone on.
  void End(const absl::Status& status, size_t reply_bytes = 0) {
    constexpr size_t kSmallReplyBytes = 64 << 10;
    if (reply_bytes <= kSmallReplyBytes) admission.ticket = {};
    CountEnd(shared_, status);
    Finish(ToGrpc(status));
  }
  void OnDone() override { delete this; }
  Admission admission;

 protected:
  const GrpcShared& shared_;
};

// request and reply live until the call is done.
template <typename Request, typename Reply>
grpc::ServerUnaryReactor* RunUnary(const GrpcShared& shared, grpc::CallbackServerContext* context,
                                   const Request* request, Reply* reply,
                                   SessionPolicy policy = SessionPolicy::kRequired) {
  auto* call = new UnaryCall(shared);
  absl::StatusOr<Admission> admission = Admit(shared, *context, policy);
  if (!admission.ok()) {
    call->End(admission.status());
    return call;
  }
  call->admission = *std::move(admission);
  const bool taken = RunOnPool(shared, [&shared, call, request, reply] {
    const absl::Status status = Call(shared.parts, call->admission.caller, *request, reply);
    call->End(status, reply->ByteSizeLong());
  });
  if (!taken) call->End(PoolFull());
  return call;
}

// The services, made by their files; shared outlives them.
std::unique_ptr<grpc::Service> NewKvStoreService(const GrpcShared& shared);
std::unique_ptr<grpc::Service> NewRetrievalService(const GrpcShared& shared);
std::unique_ptr<grpc::Service> NewAdminService(const GrpcShared& shared);

}  // namespace quarry

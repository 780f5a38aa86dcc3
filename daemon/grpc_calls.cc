#include "daemon/grpc_calls.h"

#include <grpc/grpc_security_constants.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return {static_cast<grpc::StatusCode>(status.code()), std::string(status.message())};
}

absl::StatusOr<PeerIdentity> IdentityOf(const GrpcShared& shared,
                                        const grpc::CallbackServerContext& context) {
  const std::string peer = context.peer();
  if (peer.rfind("fd:", 0) == 0) {
    if (std::optional<PeerIdentity> found = shared.peers.Find(peer)) return *std::move(found);
    return absl::UnauthenticatedError("the connection has ended");
  }
  if (!shared.options.tls()) return PeerIdentity{shared.options.tcp_tenant, /*admin=*/false};
  const auto names = context.auth_context()->FindPropertyValues(GRPC_X509_CN_PROPERTY_NAME);
  if (!context.auth_context()->IsPeerAuthenticated() || names.size() != 1) {
    return absl::UnauthenticatedError("the client's certificate has no single common name");
  }
  return shared.tenants.OfCertificate({names[0].data(), names[0].size()});
}

absl::StatusOr<Caller> CallerOf(const GrpcShared& shared,
                                const grpc::CallbackServerContext& context, SessionPolicy policy) {
  Caller caller;
  caller.max_reply_bytes = shared.options.max_message_bytes;
  QUARRY_ASSIGN_OR_RETURN(caller.peer, IdentityOf(shared, context));
  if (policy == SessionPolicy::kRequired && shared.parts.draining()) {
    return absl::UnavailableError("the daemon is draining; it takes no new calls");
  }
  const auto metadata = context.client_metadata().find("quarry-session");
  if (metadata == context.client_metadata().end()) {
    if (policy == SessionPolicy::kOptional) return caller;
    return absl::UnauthenticatedError(
        "the call has no metadata \"quarry-session\"; open KvStore.Session first");
  }
  const absl::string_view text(metadata->second.data(), metadata->second.size());
  if (!absl::SimpleAtoi(text, &caller.session.value)) {
    return absl::UnauthenticatedError("metadata \"quarry-session\" is no number");
  }
  const absl::StatusOr<std::string> tenant = shared.parts.engine.SessionTenant(caller.session);
  // One answer for no session and another tenant's: ids are not to be probed.
  if (!tenant.ok() || *tenant != caller.peer.tenant) {
    return absl::UnauthenticatedError(
        absl::StrCat("tenant ", caller.peer.tenant, " has no session ", caller.session.value));
  }
  return caller;
}

absl::StatusOr<Admission> Admit(const GrpcShared& shared,
                                const grpc::CallbackServerContext& context, SessionPolicy policy) {
  shared.counters.grpc_calls.fetch_add(1, std::memory_order_relaxed);
  Admission admission;
  QUARRY_ASSIGN_OR_RETURN(admission.caller, CallerOf(shared, context, policy));
  // Who is at the limit must be able to ask why; the pool bounds these calls.
  if (policy == SessionPolicy::kOptional) return admission;
  admission.ticket = shared.calls.Take(admission.caller.peer.tenant);
  if (!admission.ticket.valid()) {
    shared.counters.grpc_calls_refused.fetch_add(1, std::memory_order_relaxed);
    return absl::ResourceExhaustedError(absl::StrCat("tenant ", admission.caller.peer.tenant,
                                                     " has ", shared.calls.most(),
                                                     " calls open, grpc.max_calls_per_tenant"));
  }
  return admission;
}

bool RunOnPool(const GrpcShared& shared, std::function<void()> work) {
  shared.working.fetch_add(1);
  const bool taken = shared.pool.TrySubmit([&shared, work = std::move(work)] {
    work();
    shared.working.fetch_sub(1);
  });
  if (!taken) {
    shared.working.fetch_sub(1);
    shared.counters.grpc_calls_refused.fetch_add(1, std::memory_order_relaxed);
  }
  return taken;
}

absl::Status PoolFull() {
  return absl::ResourceExhaustedError("the daemon's queue for gRPC calls is full");
}

void CountEnd(const GrpcShared& shared, const absl::Status& status) {
  if (!status.ok()) shared.counters.grpc_call_errors.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace quarry

// The gRPC server: its addresses, its connections and who they are. No gRPC header.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/call_dispatch.h"
#include "daemon/grpc_options.h"
#include "daemon/peer_tenant.h"

namespace quarry {

// Serves quarry.v1 on options.socket and options.listen until destroyed. `parts` and `tenants`
// must outlive it.
class GrpcListener {
 public:
  // FailedPrecondition when the socket or the port is another's; NotFound for missing TLS files.
  static absl::StatusOr<std::unique_ptr<GrpcListener>> Start(const GrpcOptions& options,
                                                             const ServiceParts& parts,
                                                             const PeerTenants& tenants);
  virtual ~GrpcListener() = default;

  // The TCP port in use; 0 without options.listen.
  virtual int port() const = 0;
  // New calls are refused (parts.draining() must be true by now). True when no call is being
  // worked on any more, false at the deadline.
  virtual bool AwaitDrained(absl::Time deadline) = 0;
};

}  // namespace quarry

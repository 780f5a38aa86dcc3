// The shared-memory server: listener, poller, bulk pool and reaper as one object.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/call_dispatch.h"
#include "daemon/handshake.h"
#include "daemon/peer_tenant.h"
#include "daemon/shm_options.h"

namespace quarry {

// Serves proto/SHM.md on options.socket until destroyed. `parts` and `tenants` must outlive it.
class ShmServer {
 public:
  // FailedPrecondition when another daemon serves the socket.
  static absl::StatusOr<std::unique_ptr<ShmServer>> Start(const ShmOptions& options,
                                                          const ServiceParts& parts,
                                                          const PeerTenants& tenants,
                                                          VersionRange versions = {});
  virtual ~ShmServer() = default;

  // New requests and clients are refused (parts.draining() must be true by now); what is in
  // flight finishes.
  virtual void BeginDrain() = 0;
  // True when nothing is in flight any more, false at the deadline.
  virtual bool AwaitDrained(absl::Time deadline) = 0;
};

}  // namespace quarry

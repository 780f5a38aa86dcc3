// The unary methods of the services as bytes in, bytes out: what a shared-memory call carries.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "daemon/engine.h"
#include "daemon/metrics.h"
#include "daemon/peer_tenant.h"

namespace quarry {

// What the services share, all owned by whoever composes the daemon.
struct ServiceParts {
  Engine& engine;
  Metrics& metrics;
  std::string version;
  std::string simd_level;  // of the kernels in use
  std::function<double()> uptime_seconds;
  std::function<bool()> draining;
  std::function<void()> request_drain;  // returns at once
};

// Who calls: known from the transport.
struct Caller {
  SessionId session;
  PeerIdentity peer;
  uint64_t max_reply_bytes = 0;  // what the transport carries; larger replies are refused early
  // Whether answers to attends can say what of them was reused at another position.
  bool flags_shifted = true;
};

// Runs one method (shm::Method's number) on its serialized request message and returns the
// serialized reply. Unimplemented: no such method; InvalidArgument: the bytes are no such message.
// Thread-safe; as costly as the method.
absl::StatusOr<std::string> DispatchCall(const ServiceParts& parts, const Caller& caller,
                                         uint32_t method, std::string_view request);

}  // namespace quarry

// Options of the gRPC services; no gRPC header.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

namespace quarry {

struct GrpcOptions {
  std::string socket;  // Unix socket; empty: off
  mode_t socket_mode = 0660;
  std::string listen;      // TCP address:port; empty: off
  std::string tcp_tenant;  // of every peer of a loopback `listen` without TLS
  // Mutual TLS of `listen`, all three or none: PEM files. The client's tenant is the common name
  // of its certificate.
  std::string tls_certificate, tls_key, tls_client_ca;
  uint64_t max_message_bytes = 64ull << 20;
  uint64_t max_put_bytes = 256ull << 20;  // one opaque block
  uint32_t threads = 4;                   // that run calls; no call holds one while it waits
  uint32_t queue = 256;                   // calls waiting for a thread
  uint32_t max_calls_per_tenant = 64;     // open at once, streams included, sessions not
  uint32_t max_sessions_per_tenant = 64;
  uint32_t max_connections = 256;  // of the Unix socket
  bool tls() const { return !tls_certificate.empty(); }
};

}  // namespace quarry

// The connected shared-memory clients: accepting, greeting, passing descriptors, parting.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "daemon/channel.h"
#include "daemon/engine.h"
#include "daemon/metrics.h"
#include "daemon/peer_tenant.h"
#include "daemon/session_reaper.h"
#include "daemon/shm_options.h"
#include "daemon/unix_socket.h"

namespace quarry {

// One connection. Poller thread only.
struct ShmClient {
  uint64_t id = 0;
  FileDescriptor socket;
  PeerCredentials credentials;
  uint64_t accepted_ns = 0;
  std::shared_ptr<Channel> channel;  // null until the handshake is done
  // Spinning for an armed client ends armed_idle_ms after its last sign of life.
  uint64_t last_traffic_ns = 0;
  bool was_armed = false;
};

// Owned and used by the poller's thread alone. Nothing here blocks: sockets are non-blocking, and
// a client that does not read its replies is closed.
class ShmClients {
 public:
  struct Parts {
    Engine& engine;
    const PeerTenants& tenants;
    SessionReaper& reaper;
    TransportCounters& counters;
    const UnixListener& listener;
    VersionRange versions;
  };
  static absl::StatusOr<std::unique_ptr<ShmClients>> Create(const ShmOptions& options, Parts parts,
                                                            int wake_fd);
  ~ShmClients();

  // Handles what has arrived, waiting up to timeout_ms (-1: until something arrives; less if a
  // silent connection is to be closed before).
  void HandleEvents(int timeout_ms, uint64_t now_ns);
  // Clients past the handshake; valid until HandleEvents or Close.
  const std::vector<ShmClient*>& greeted() const { return greeted_; }
  // Ends the client's session and closes its socket; its memory stays until its requests end.
  void Close(ShmClient* client, std::string_view why);
  // New clients are refused, known ones are told.
  void SetClosing();

 private:
  ShmClients(const ShmOptions& options, Parts parts);
  void AcceptSome(uint64_t now_ns);
  void HandleSocket(ShmClient* client, uint32_t events);
  void Greet(ShmClient* client, std::span<const std::byte> message);
  absl::StatusOr<std::shared_ptr<Channel>> Admit(const ShmClient& client,
                                                 const shm::HelloRequest& hello);
  // False: the client is to be closed.
  bool PassExtent(ShmClient* client, std::span<const std::byte> message);
  void CloseSilent(uint64_t now_ns);
  int TimeoutMs(int wanted_ms, uint64_t now_ns) const;
  uint64_t HelloTimeoutNs() const { return uint64_t{options_.hello_timeout_ms} * 1'000'000; }
  void WatchListener(bool watch);

  const ShmOptions options_;
  const Parts parts_;
  FileDescriptor epoll_;
  uint64_t next_id_ = 1;
  absl::flat_hash_map<uint64_t, std::unique_ptr<ShmClient>> clients_;
  std::vector<ShmClient*> greeted_;
  uint32_t ungreeted_ = 0;
  bool closing_ = false;
  // Set while the process is out of descriptors: accepting again would spin.
  uint64_t accept_again_ns_ = 0;
};

}  // namespace quarry

// Accepts the gRPC Unix socket's connections, since gRPC itself does not tell who connects.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <thread>

#include "absl/status/statusor.h"
#include "daemon/grpc_options.h"
#include "daemon/grpc_peers.h"
#include "daemon/metrics.h"
#include "daemon/unix_socket.h"

namespace quarry {

// One thread: accepts, asks the kernel who the peer is, places the connection under a fresh
// number and hands it over; learns of its end and retires the number.
class GrpcAccept {
 public:
  struct Parts {
    const PeerTenants& tenants;
    GrpcPeers& peers;
    TransportCounters& counters;
    std::function<void(int fd)> hand_over;  // owns the descriptor from then on
  };
  static absl::StatusOr<std::unique_ptr<GrpcAccept>> Start(const GrpcOptions& options, Parts parts);
  // Stops accepting; connections that were handed over are not touched.
  ~GrpcAccept();

 private:
  GrpcAccept(const GrpcOptions& options, Parts parts, std::unique_ptr<UnixListener> listener);
  void Run();
  void AcceptAll();
  void NoteEnd(int number);
  absl::Status HandOver(FileDescriptor socket);

  const GrpcOptions options_;
  const Parts parts_;
  const std::unique_ptr<UnixListener> listener_;
  FileDescriptor epoll_, stop_fd_;
  // The thread's own: a second descriptor of each connection, by its number, which sees the
  // connection end whichever side ends it.
  std::map<int, FileDescriptor> watches_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace quarry

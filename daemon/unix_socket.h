// Unix sockets with an owner: one daemon per path, never a stale file in the way.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "daemon/file_descriptor.h"

namespace quarry {

struct UnixListenOptions {
  std::string path;
  int type = 0;        // SOCK_SEQPACKET or SOCK_STREAM
  mode_t mode = 0660;  // of the socket file: who may connect
};

// A listening Unix socket, non-blocking. Holds an flock on "<path>.lock" for its life, so that a
// second daemon is refused and the socket file of a dead one can be replaced without a race.
// Removes the socket file when destroyed; the lock file stays, since removing it would let two
// daemons lock different files.
class UnixListener {
 public:
  // FailedPrecondition names the path and the pid of the daemon that holds it.
  static absl::StatusOr<std::unique_ptr<UnixListener>> Listen(const UnixListenOptions& options);
  ~UnixListener();

  int fd() const { return socket_.get(); }
  const std::string& path() const { return path_; }
  // The next waiting connection, non-blocking and close-on-exec; -1 when there is none or the
  // process is out of descriptors (errno tells).
  int Accept() const;

 private:
  UnixListener(std::string path, FileDescriptor lock, FileDescriptor socket);
  const std::string path_;
  FileDescriptor lock_;
  FileDescriptor socket_;
};

// Sends one message, with up to 4 descriptors, without ever blocking: ResourceExhausted when the
// peer does not read, Unavailable when it has gone.
absl::Status SendWithDescriptors(int socket_fd, std::span<const std::byte> message,
                                 std::span<const int> descriptors);

inline constexpr size_t kMaxSocketPathBytes = 107;

}  // namespace quarry

// A quarryd of one's own, for integration tests and benchmarks: in a temporary directory, on its
// own sockets, stopped and cleaned up with the object, and ended with the thread that started it.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace quarry::testing {

struct DaemonOptions {
  std::string binary;                   // empty: DefaultDaemonBinary()
  std::string config;                   // TOML text; written to a file when not empty
  std::vector<std::string> arguments;   // after --config, --socket and --grpc-socket
  std::string directory;                // empty: a new temporary one, removed with the object
  absl::Duration start_deadline = absl::Seconds(30);
};

// $QUARRY_DAEMON, else daemon/quarryd beside the running program's folder.
std::string DefaultDaemonBinary();

// After SIGSTOP, which takes effect in each thread on its own time: whether all have stopped within
// 10 s.
bool AwaitStopped(pid_t pid);

// Not thread-safe. Only the process it started is ever signalled.
class DaemonProcess {
 public:
  // Returns when the daemon's sockets accept connections; Unavailable carries its log otherwise.
  static absl::StatusOr<std::unique_ptr<DaemonProcess>> Start(const DaemonOptions& options);
  ~DaemonProcess();
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;

  pid_t pid() const { return pid_; }
  const std::string& directory() const { return directory_; }
  std::string socket_path() const { return directory_ + "/quarryd.sock"; }
  std::string grpc_path() const { return directory_ + "/quarryd-grpc.sock"; }
  std::string Log() const;  // standard error so far

  void Signal(int signal) const;
  // SIGTERM, then the exit status (-1 if it did not end in time).
  int Stop(absl::Duration deadline = absl::Seconds(20));
  void Kill();
  bool Running();
  // User and system time used so far.
  absl::Duration CpuTime() const;
  // The same of those of its threads that have this name and live now.
  absl::Duration ThreadCpuTime(const std::string& name) const;

 private:
  DaemonProcess() = default;
  int WaitExit(absl::Duration deadline);

  std::string directory_;
  bool own_directory_ = false;
  pid_t pid_ = -1;
  int exit_status_ = -1;
};

}  // namespace quarry::testing

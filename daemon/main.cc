// quarryd: reads the configuration, starts the daemon, waits for a signal, drains.
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "daemon/config.h"
#include "daemon/daemon.h"
#include "daemon/file_descriptor.h"
#include "daemon/log.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Exit statuses: 0 after a drain, 1 when the daemon cannot start, 2 for a wrong configuration or
// command line, 3 when requests were still in flight at the drain's deadline.
constexpr int kCannotStart = 1, kBadConfig = 2, kDrainCutShort = 3;

struct Arguments {
  std::string config_path;
  std::optional<std::string> socket, grpc_socket, arena_bytes, metrics;
  bool check = false, print = false;
};

absl::StatusOr<Config> ConfigOf(const Arguments& arguments) {
  Config config = DefaultConfig();
  if (!arguments.config_path.empty()) {
    QUARRY_ASSIGN_OR_RETURN(config, ReadConfig(arguments.config_path));
  }
  if (arguments.socket) config.shm.socket = *arguments.socket;
  if (arguments.grpc_socket) config.grpc.socket = *arguments.grpc_socket;
  if (arguments.metrics)
    config.metrics.listen = *arguments.metrics == "off" ? "" : *arguments.metrics;
  if (arguments.arena_bytes) {
    const absl::StatusOr<uint64_t> bytes = ParseBytes(*arguments.arena_bytes);
    if (!bytes.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--arena-bytes: ", bytes.status().message()));
    }
    config.engine.arena.capacity_bytes = *bytes;
  }
  QUARRY_RETURN_IF_ERROR(ValidateConfig(config));
  return config;
}

// Every connection, extent and channel is a descriptor; gRPC aborts where it cannot get its own.
absl::Status RaiseDescriptorLimit() {
  constexpr rlim_t kNeeded = 256;
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return ErrnoStatus(errno, "getrlimit of open files");
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  if (limit.rlim_max >= kNeeded) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "the limit of open files (ulimit -n) is ", limit.rlim_max, ", at least ", kNeeded,
      " are needed"));
}

// Blocks the signals we wait for, in this thread and all it starts.
FileDescriptor TakeSignals() {
  signal(SIGPIPE, SIG_IGN);
  signal(SIGHUP, SIG_IGN);
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return FileDescriptor(signalfd(-1, &signals, SFD_CLOEXEC));
}

// Returns why to stop: a signal's name or an administrator's call.
std::string AwaitStop(int signal_fd, int drain_fd) {
  pollfd waits[] = {{signal_fd, POLLIN, 0}, {drain_fd, POLLIN, 0}};
  while (poll(waits, 2, -1) < 0 && errno == EINTR) {
  }
  if ((waits[0].revents & POLLIN) == 0) return "Admin.Drain";
  signalfd_siginfo info{};
  if (read(signal_fd, &info, sizeof(info)) != sizeof(info)) return "signal";
  return info.ssi_signo == SIGTERM ? "SIGTERM" : "SIGINT";
}

// It grows only as K/V come in, so that the daemon starts and is killed later.
void WarnOfArenaBeyondMemory(uint64_t arena_bytes) {
  const auto memory_bytes =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (arena_bytes <= memory_bytes) return;
  Log(LogLevel::kWarning, "engine.arena_bytes is more than the machine's memory",
      {{"arena_bytes", arena_bytes}, {"memory_bytes", memory_bytes}});
}

int Serve(const Config& config) {
  if (absl::Status status = RaiseDescriptorLimit(); !status.ok()) {
    std::fprintf(stderr, "quarryd: %s\n", std::string(status.message()).c_str());
    return kCannotStart;
  }
  const FileDescriptor signals = TakeSignals();
  const FileDescriptor drain(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (absl::Status status = StartLog(config.log); !status.ok()) {
    std::fprintf(stderr, "quarryd: %s\n", status.ToString().c_str());
    return kCannotStart;
  }
  WarnOfArenaBeyondMemory(config.engine.arena.capacity_bytes);
  auto daemon = Daemon::Start(config, [&drain] {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(drain.get(), &one, sizeof(one));
  });
  if (!daemon.ok()) {
    Log(LogLevel::kError, "cannot start", {{"error", daemon.status()}, {"pid", getpid()}});
    StopLog();
    return kCannotStart;
  }
  Log(LogLevel::kInfo, "ready",
      {{"pid", getpid()},
       {"version", QUARRY_VERSION},
       {"arena_bytes", config.engine.arena.capacity_bytes}});

  const std::string reason = AwaitStop(signals.get(), drain.get());
  Log(LogLevel::kInfo, "draining", {{"reason", reason}, {"deadline_ms", config.drain_deadline_ms}});
  if (!(*daemon)->Drain(absl::Now() + absl::Milliseconds(config.drain_deadline_ms))) {
    // Something still runs; taking it down in order could wait for it forever.
    Log(LogLevel::kError, "requests were still in flight at the drain's deadline");
    StopLog();
    _exit(kDrainCutShort);
  }
  daemon->reset();
  Log(LogLevel::kInfo, "stopped", {{"pid", getpid()}});
  StopLog();
  return 0;
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  using namespace quarry;
  Arguments arguments;
  CLI::App app{"quarryd: a memory service for LLM inference"};
  app.add_option("--config", arguments.config_path, "TOML configuration");
  app.add_option("--socket", arguments.socket, "overrides shm.socket");
  app.add_option("--grpc-socket", arguments.grpc_socket, "overrides grpc.socket");
  app.add_option("--arena-bytes", arguments.arena_bytes, "overrides engine.arena_bytes, e.g. 2GiB");
  app.add_option("--metrics", arguments.metrics, "overrides metrics.listen; off turns it off");
  app.add_flag("--check-config", arguments.check, "checks the configuration and exits");
  app.add_flag("--print-config", arguments.print, "prints the whole configuration and exits");
  app.set_version_flag("--version", QUARRY_VERSION);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kBadConfig;
  }
  const absl::StatusOr<Config> config = ConfigOf(arguments);
  if (!config.ok()) {
    std::fprintf(stderr, "quarryd: %s\n", std::string(config.status().message()).c_str());
    return kBadConfig;
  }
  if (arguments.print) {
    std::fputs(PrintConfig(*config).c_str(), stdout);
    return 0;
  }
  if (arguments.check) {
    std::fputs("the configuration is valid\n", stderr);
    return 0;
  }
  return Serve(*config);
}

#include "tests/support/daemon_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/support/eventually.h"

namespace quarry::testing {
namespace {

bool Accepts(const std::string& path, int type) {
  int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  bool ok = connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  close(fd);
  return ok;
}

// In the child, between fork and exec: only what is safe there. Without a file of the name that
// argv[0] gives ends with 127.
[[noreturn]] void Execute(pid_t parent, char* const* argv, const char* log) {
  // Whatever ends the parent ends the daemon too, also what runs no destructor; the parent may have
  // ended before this was asked for.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const int out = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600), in = open("/dev/null", O_RDONLY);
  if (getppid() == parent && out >= 0 && in >= 0 && dup2(in, STDIN_FILENO) >= 0 &&
      dup2(out, STDOUT_FILENO) >= 0 && dup2(out, STDERR_FILENO) >= 0) {  // ours stays clean
    execv(argv[0], argv);
  }
  _exit(127);
}

absl::StatusOr<pid_t> Spawn(const std::vector<std::string>& arguments, const std::string& log) {
  std::vector<char*> argv;
  for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = getpid(), pid = fork();
  if (pid == 0) Execute(parent, argv.data(), log.c_str());
  if (pid < 0) {
    return absl::UnavailableError(absl::StrCat("starting ", arguments[0], ": ", strerror(errno)));
  }
  return pid;
}

}  // namespace

std::string DefaultDaemonBinary() {
  if (const char* path = std::getenv("QUARRY_DAEMON")) return path;
  std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe");
  for (std::filesystem::path p = self.parent_path(); p.has_relative_path(); p = p.parent_path()) {
    if (std::filesystem::exists(p / "daemon" / "quarryd")) return p / "daemon" / "quarryd";
  }
  return "quarryd";
}

absl::StatusOr<std::unique_ptr<DaemonProcess>> DaemonProcess::Start(const DaemonOptions& options) {
  auto daemon = std::unique_ptr<DaemonProcess>(new DaemonProcess);
  daemon->directory_ = options.directory;
  if (daemon->directory_.empty()) {
    std::string name = (std::filesystem::temp_directory_path() / "quarry-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) {
      return absl::UnavailableError(absl::StrCat("mkdtemp ", name, ": ", strerror(errno)));
    }
    // Tests connect as other users too.
    std::filesystem::permissions(name, std::filesystem::perms(0755));
    daemon->directory_ = name;
    daemon->own_directory_ = true;
  }
  std::vector<std::string> arguments = {options.binary.empty() ? DefaultDaemonBinary()
                                                               : options.binary};
  if (!options.config.empty()) {
    std::string path = daemon->directory_ + "/quarryd.toml";
    std::ofstream(path) << options.config;
    arguments.insert(arguments.end(), {"--config", path});
  }
  arguments.insert(arguments.end(), {"--socket", daemon->socket_path(), "--grpc-socket",
                                     daemon->grpc_path()});
  arguments.insert(arguments.end(), options.arguments.begin(), options.arguments.end());
  absl::StatusOr<pid_t> pid = Spawn(arguments, daemon->directory_ + "/quarryd.log");
  if (!pid.ok()) return pid.status();
  daemon->pid_ = *pid;
  absl::Time deadline = absl::Now() + options.start_deadline;
  while (!(Accepts(daemon->socket_path(), SOCK_SEQPACKET) &&
           Accepts(daemon->grpc_path(), SOCK_STREAM))) {
    if (!daemon->Running() || absl::Now() > deadline) {
      return absl::UnavailableError(
          absl::StrCat(arguments[0], " did not start; its log:\n", daemon->Log()));
    }
    absl::SleepFor(absl::Milliseconds(5));
  }
  return daemon;
}

DaemonProcess::~DaemonProcess() {
  Kill();
  std::error_code ignored;
  if (own_directory_) std::filesystem::remove_all(directory_, ignored);
}

std::string DaemonProcess::Log() const {
  std::ifstream in(directory_ + "/quarryd.log");
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

bool AwaitStopped(pid_t pid) {
  return testing::Eventually([&] {
    bool all = true;
    const std::string tasks = absl::StrCat("/proc/", pid, "/task");
    for (const auto& task : std::filesystem::directory_iterator(tasks)) {
      std::ifstream in(task.path() / "stat");
      const std::string stat((std::istreambuf_iterator<char>(in)), {});
      const size_t name_end = stat.rfind(')');
      all &= name_end != std::string::npos && stat.compare(name_end, 4, ") T ") == 0;
    }
    return all;
  });
}

void DaemonProcess::Signal(int signal) const {
  if (pid_ > 0) kill(pid_, signal);
}

int DaemonProcess::Stop(absl::Duration deadline) {
  Signal(SIGTERM);
  return WaitExit(deadline);
}

void DaemonProcess::Kill() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  WaitExit(absl::Seconds(10));
}

bool DaemonProcess::Running() { return pid_ > 0 && (WaitExit(absl::ZeroDuration()), pid_ > 0); }

absl::Duration DaemonProcess::CpuTime() const {
  std::ifstream in(absl::StrCat("/proc/", pid_, "/stat"));
  std::string stat;
  std::getline(in, stat);
  std::istringstream fields(stat.substr(stat.rfind(')') + 2));
  std::string skipped;
  for (int i = 3; i < 14; ++i) fields >> skipped;  // utime is field 14
  int64_t user = 0, system = 0;
  fields >> user >> system;
  return absl::Seconds(user + system) / sysconf(_SC_CLK_TCK);
}

absl::Duration DaemonProcess::ThreadCpuTime(const std::string& name) const {
  absl::Duration total;
  std::error_code ignored;  // threads come and go
  for (const auto& task :
       std::filesystem::directory_iterator(absl::StrCat("/proc/", pid_, "/task"), ignored)) {
    std::ifstream comm(task.path() / "comm"), schedstat(task.path() / "schedstat");
    std::string its_name;
    int64_t nanoseconds = 0;
    if (!std::getline(comm, its_name) || its_name != name || !(schedstat >> nanoseconds)) continue;
    total += absl::Nanoseconds(nanoseconds);
  }
  return total;
}

int DaemonProcess::WaitExit(absl::Duration deadline) {
  absl::Time end = absl::Now() + deadline;
  while (pid_ > 0) {
    int status = 0;
    pid_t reaped = waitpid(pid_, &status, WNOHANG);
    if (reaped == pid_ || (reaped < 0 && errno == ECHILD)) {
      exit_status_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      pid_ = -1;
      return exit_status_;
    }
    if (absl::Now() >= end) return -1;
    absl::SleepFor(absl::Milliseconds(2));
  }
  return exit_status_;
}

}  // namespace quarry::testing

#include "daemon/unix_socket.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr int kBacklog = 128;

std::string ReadPid(int lock_fd) {
  char text[32] = {};
  const ssize_t n = pread(lock_fd, text, sizeof(text) - 1, 0);
  int pid = 0;
  if (n <= 0 || !absl::SimpleAtoi(absl::string_view(text, static_cast<size_t>(n)), &pid)) {
    return "unknown";
  }
  return absl::StrCat(pid);
}

absl::StatusOr<FileDescriptor> LockFor(const std::string& path) {
  const std::string lock_path = path + ".lock";
  FileDescriptor lock(open(lock_path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (!lock.valid()) return ErrnoStatus(errno, lock_path);
  if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return ErrnoStatus(errno, lock_path);
    return absl::FailedPreconditionError(
        absl::StrCat("another quarryd (pid ", ReadPid(lock.get()), ") already serves ", path));
  }
  const std::string pid = absl::StrCat(getpid(), "\n");
  if (ftruncate(lock.get(), 0) != 0 ||
      pwrite(lock.get(), pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    return ErrnoStatus(errno, lock_path);
  }
  return lock;
}

// Under the lock: a socket file that nobody answers is a dead daemon's; anything else stays.
absl::Status RemoveStale(const std::string& path, const sockaddr_un& address, int type) {
  struct stat info {};
  if (lstat(path.c_str(), &info) != 0) {
    return errno == ENOENT ? absl::OkStatus() : ErrnoStatus(errno, path);
  }
  if (!S_ISSOCK(info.st_mode)) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " exists and is not a socket; remove it or choose another path"));
  }
  const FileDescriptor probe(socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!probe.valid()) return ErrnoStatus(errno, "socket");
  const int rc = connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  if (rc == 0 || errno == EAGAIN || errno == EPROTOTYPE) {
    return absl::FailedPreconditionError(
        absl::StrCat("another process listens on ", path, "; stop it or choose another path"));
  }
  if (unlink(path.c_str()) != 0) return ErrnoStatus(errno, path);
  return absl::OkStatus();
}

absl::Status MakeParent(const std::string& path) {
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  if (parent.empty() || mkdir(parent.c_str(), 0755) == 0 || errno == EEXIST) {
    return absl::OkStatus();
  }
  return ErrnoStatus(errno, parent.string());
}

// The defaults may lie where this user cannot write.
absl::Status WithAdvice(const absl::Status& status) {
  if (!absl::IsPermissionDenied(status) && !absl::IsNotFound(status)) return status;
  return absl::Status(
      status.code(),
      absl::StrCat(status.message(), "; --socket and --grpc-socket choose other paths"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<UnixListener>> UnixListener::Listen(
    const UnixListenOptions& options) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (options.path.empty() || options.path.size() > kMaxSocketPathBytes) {
    return absl::InvalidArgumentError(absl::StrCat("socket path \"", options.path, "\" has ",
                                                   options.path.size(), " bytes; 1 to ",
                                                   kMaxSocketPathBytes, " are allowed"));
  }
  std::memcpy(address.sun_path, options.path.data(), options.path.size());
  if (absl::Status status = MakeParent(options.path); !status.ok()) return WithAdvice(status);
  absl::StatusOr<FileDescriptor> lock = LockFor(options.path);
  if (!lock.ok()) return WithAdvice(lock.status());
  QUARRY_RETURN_IF_ERROR(RemoveStale(options.path, address, options.type));

  FileDescriptor fd(socket(AF_UNIX, options.type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return ErrnoStatus(errno, "socket");
  // The file is created with no more than the wanted mode, then given exactly that.
  if (fchmod(fd.get(), options.mode) != 0 ||
      bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 ||
      chmod(options.path.c_str(), options.mode) != 0 || listen(fd.get(), kBacklog) != 0) {
    return ErrnoStatus(errno, options.path);
  }
  return std::unique_ptr<UnixListener>(
      new UnixListener(options.path, *std::move(lock), std::move(fd)));
}

UnixListener::UnixListener(std::string path, FileDescriptor lock, FileDescriptor socket)
    : path_(std::move(path)), lock_(std::move(lock)), socket_(std::move(socket)) {}

// The file goes while the lock is still held, so a successor's file is never removed.
UnixListener::~UnixListener() { unlink(path_.c_str()); }

int UnixListener::Accept() const {
  while (true) {
    const int fd = accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0 || (errno != EINTR && errno != ECONNABORTED)) return fd;
  }
}

absl::Status SendWithDescriptors(int socket_fd, std::span<const std::byte> message,
                                 std::span<const int> descriptors) {
  constexpr size_t kMaxDescriptors = 4;
  if (descriptors.size() > kMaxDescriptors) {
    return absl::InternalError(absl::StrCat(descriptors.size(), " descriptors in one message"));
  }
  iovec part{const_cast<std::byte*>(message.data()), message.size()};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))] = {};
  if (!descriptors.empty()) {
    header.msg_control = control;
    header.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(descriptors.size_bytes());
    std::memcpy(CMSG_DATA(rights), descriptors.data(), descriptors.size_bytes());
  }
  const ssize_t sent = sendmsg(socket_fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent == static_cast<ssize_t>(message.size())) return absl::OkStatus();
  if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
    return absl::ResourceExhaustedError("the client does not read its socket");
  }
  return sent < 0 ? ErrnoStatus(errno, "sendmsg") : absl::InternalError("a message was cut");
}

}  // namespace quarry

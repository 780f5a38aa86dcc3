#include "client/socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace quarry {
namespace {

constexpr size_t kMaxDescriptors = 4;

absl::Status SocketError(const char* what) {
  return absl::UnavailableError(absl::StrCat("quarryd socket: ", what, ": ", std::strerror(errno)));
}

void TakeDescriptors(const msghdr& message, std::vector<OwnedFd>* out) {
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr;
       c = CMSG_NXTHDR(const_cast<msghdr*>(&message), c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      out->emplace_back(fd);
    }
  }
}

// Runs `call` (connect or send), which blocks until `end` at most; a signal's handler does not end
// it. False with errno set; EAGAIN: the deadline has passed.
template <typename Call>
bool BlockUntil(int socket, absl::Time end, Call call) {
  for (;;) {
    // 0 would mean for ever.
    const absl::Duration left = std::max(end - absl::Now(), absl::Milliseconds(1));
    const timeval timeout = absl::ToTimeval(left);
    setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    if (call() >= 0) return true;
    if (errno != EINTR) return false;
    if (absl::Now() >= end) {
      errno = EAGAIN;
      return false;
    }
  }
}

}  // namespace

OwnedFd::~OwnedFd() {
  if (fd_ >= 0) close(fd_);
}

OwnedFd& OwnedFd::operator=(OwnedFd&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

absl::StatusOr<OwnedFd> ConnectSeqPacket(std::string_view path, absl::Duration deadline) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("socket path of ", path.size(),
                                                   " bytes: 1 to ", sizeof(address.sun_path) - 1,
                                                   " are possible"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  OwnedFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (fd.get() < 0) return SocketError("socket");
  const auto* to = reinterpret_cast<const sockaddr*>(&address);
  if (!BlockUntil(fd.get(), absl::Now() + deadline,
                  [&] { return connect(fd.get(), to, sizeof(address)); })) {
    if (errno == EAGAIN) {
      return absl::UnavailableError(absl::StrCat("quarryd at ", std::string(path),
                                                 " took no connection within ",
                                                 absl::FormatDuration(deadline)));
    }
    const bool refused = errno == EACCES;
    return absl::UnavailableError(absl::StrCat(
        "no quarryd answers at ", std::string(path), ": ", std::strerror(errno),
        refused ? "; the daemon's shm.socket_mode and the directory say who may connect" : ""));
  }
  return fd;
}

absl::Status Exchange(int socket, std::span<const std::byte> request, std::span<std::byte> reply,
                      absl::Duration deadline, std::vector<OwnedFd>* descriptors) {
  const absl::Time end = absl::Now() + deadline;
  if (!BlockUntil(socket, end, [&] {  // a packet goes whole or not at all
        return send(socket, request.data(), request.size(), MSG_NOSIGNAL);
      })) {
    return SocketError("send");
  }
  pollfd readable{socket, POLLIN, 0};
  int ready;
  do {  // a signal's handler does not end the wait
    const absl::Duration left = std::max(end - absl::Now(), absl::ZeroDuration());
    const int64_t left_ms = std::min<int64_t>(absl::ToInt64Milliseconds(left), INT_MAX);
    ready = poll(&readable, 1, static_cast<int>(left_ms));
  } while (ready < 0 && errno == EINTR);
  if (ready == 0) {
    return absl::UnavailableError(
        absl::StrCat("quarryd did not answer within ", absl::FormatDuration(deadline)));
  }
  if (ready < 0) return SocketError("poll");
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))];
  iovec buffer{reply.data(), reply.size()};
  msghdr message{};
  message.msg_iov = &buffer;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t received;
  do {
    received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  } while (received < 0 && errno == EINTR);
  if (received < 0) return SocketError("recvmsg");
  TakeDescriptors(message, descriptors);
  if (received == 0) return absl::UnavailableError("quarryd closed the socket");
  if (received != static_cast<ssize_t>(reply.size()) || (message.msg_flags & MSG_TRUNC) != 0) {
    return absl::UnavailableError(
        absl::StrCat("quarryd answered ", received, " bytes, expected ", reply.size()));
  }
  return absl::OkStatus();
}

}  // namespace quarry

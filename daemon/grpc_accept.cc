#include "daemon/grpc_accept.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "daemon/log.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Data of an epoll event: a connection's number, or one of these.
constexpr uint64_t kStop = ~0ull, kListener = ~0ull - 1;
constexpr absl::Duration kAcceptPause = absl::Milliseconds(100);

}  // namespace

GrpcAccept::GrpcAccept(const GrpcOptions& options, Parts parts,
                       std::unique_ptr<UnixListener> listener)
    : options_(options), parts_(std::move(parts)), listener_(std::move(listener)) {}

absl::StatusOr<std::unique_ptr<GrpcAccept>> GrpcAccept::Start(const GrpcOptions& options,
                                                              Parts parts) {
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<UnixListener> listener,
                          UnixListener::Listen({options.socket, SOCK_STREAM, options.socket_mode}));
  std::unique_ptr<GrpcAccept> accept(
      new GrpcAccept(options, std::move(parts), std::move(listener)));
  accept->epoll_.Reset(epoll_create1(EPOLL_CLOEXEC));
  accept->stop_fd_.Reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  epoll_event stop{.events = EPOLLIN, .data = {.u64 = kStop}};
  epoll_event connections{.events = EPOLLIN, .data = {.u64 = kListener}};
  const int epoll = accept->epoll_.get();
  if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, accept->stop_fd_.get(), &stop) != 0 ||
      epoll_ctl(epoll, EPOLL_CTL_ADD, accept->listener_->fd(), &connections) != 0) {
    return ErrnoStatus(errno, "epoll of the gRPC socket");
  }
  accept->thread_ = std::thread([raw = accept.get()] { raw->Run(); });
  pthread_setname_np(accept->thread_.native_handle(), "quarry-accept");
  return accept;
}

GrpcAccept::~GrpcAccept() {
  if (!thread_.joinable()) return;
  stop_.store(true);
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(stop_fd_.get(), &one, sizeof(one));
  thread_.join();
}

void GrpcAccept::Run() {
  std::array<epoll_event, 64> events;
  while (!stop_.load()) {
    const int n = epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), -1);
    for (int i = 0; i < n; ++i) {
      const uint64_t data = events[i].data.u64;
      if (data == kListener) {
        AcceptAll();
      } else if (data != kStop) {
        NoteEnd(static_cast<int>(data));
      }
    }
  }
}

void GrpcAccept::NoteEnd(int number) {
  const auto watch = watches_.find(number);
  if (watch == watches_.end()) return;
  // Closing is not enough: gRPC's descriptor keeps the registration alive.
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, watch->second.get(), nullptr);
  watches_.erase(watch);
  parts_.peers.Retire(number, absl::Now());
  parts_.counters.grpc_connections.fetch_sub(1, std::memory_order_relaxed);
}

void GrpcAccept::AcceptAll() {
  while (true) {
    FileDescriptor socket(listener_->Accept());
    if (!socket.valid()) {
      if (errno != EAGAIN && errno != EWOULDBLOCK) {
        Log(LogLevel::kError, "cannot accept gRPC clients",
            {{"error", ErrnoStatus(errno, "accept4")}});
        absl::SleepFor(kAcceptPause);  // out of descriptors: do not spin
      }
      return;
    }
    if (absl::Status status = HandOver(std::move(socket)); !status.ok()) {
      parts_.counters.grpc_connections_refused.fetch_add(1, std::memory_order_relaxed);
      LogClientEvent(LogLevel::kWarning, "grpc connection refused", {{"why", status}});
    }
  }
}

absl::Status GrpcAccept::HandOver(FileDescriptor socket) {
  if (watches_.size() >= options_.max_connections) {
    return absl::ResourceExhaustedError(
        absl::StrCat("grpc.max_connections = ", options_.max_connections, " are open"));
  }
  QUARRY_ASSIGN_OR_RETURN(const PeerCredentials credentials, CredentialsOf(socket.get()));
  QUARRY_ASSIGN_OR_RETURN(PeerIdentity identity, parts_.tenants.OfUser(credentials.uid));
  FileDescriptor watch(fcntl(socket.get(), F_DUPFD_CLOEXEC, 0));
  if (!watch.valid()) return ErrnoStatus(errno, "F_DUPFD_CLOEXEC");
  QUARRY_ASSIGN_OR_RETURN(const int number,
                          parts_.peers.Place(std::move(socket), std::move(identity), absl::Now()));
  // gRPC shuts the socket down when it is done with it, and so does a peer that goes.
  epoll_event event{.events = EPOLLRDHUP, .data = {.u64 = static_cast<uint64_t>(number)}};
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, watch.get(), &event) != 0) {
    const int error = errno;
    parts_.peers.Retire(number, absl::Now());
    close(number);
    return ErrnoStatus(error, "epoll_ctl");
  }
  watches_[number] = std::move(watch);
  parts_.counters.grpc_connections.fetch_add(1, std::memory_order_relaxed);
  parts_.hand_over(number);
  return absl::OkStatus();
}

}  // namespace quarry

#include "daemon/grpc_peers.h"

#include <fcntl.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace quarry {
namespace {

constexpr int kFirstNumber = 8192;
constexpr int kMostNumbers = 65536;

}  // namespace

GrpcPeers::Range GrpcPeers::DefaultRange() {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  const int most = static_cast<int>(std::min<rlim_t>(limit.rlim_cur, kFirstNumber + kMostNumbers));
  // With a small limit, the upper half.
  return {most > 2 * kFirstNumber ? kFirstNumber : most / 2, most - 1};
}

GrpcPeers::GrpcPeers(Range range) : range_(range), next_(range.first) {}

absl::StatusOr<int> GrpcPeers::Place(FileDescriptor socket, PeerIdentity identity, absl::Time now) {
  const absl::MutexLock lock(&mutex_);
  const int numbers = range_.last - range_.first + 1;
  for (int tried = 0; tried < numbers; ++tried) {
    const int candidate = next_;
    next_ = next_ == range_.last ? range_.first : next_ + 1;
    const auto known = entries_.find(candidate);
    if (known != entries_.end()) {
      const bool rested = known->second.retired && now - *known->second.retired >= kQuarantine;
      if (!rested) continue;
      entries_.erase(known);
    }
    // Gives the lowest free number from the candidate up; anything else is somebody else's range.
    FileDescriptor placed(fcntl(socket.get(), F_DUPFD_CLOEXEC, candidate));
    if (!placed.valid()) return ErrnoStatus(errno, "F_DUPFD_CLOEXEC");
    if (placed.get() != candidate) continue;
    entries_[candidate] = {std::move(identity), std::nullopt};
    return placed.Release();
  }
  return absl::ResourceExhaustedError(
      absl::StrCat("no descriptor number is free for another gRPC connection: all ", numbers,
                   " are in use or were until a minute ago"));
}

void GrpcPeers::Retire(int number, absl::Time now) {
  const absl::MutexLock lock(&mutex_);
  const auto entry = entries_.find(number);
  if (entry != entries_.end()) entry->second.retired = now;
}

std::optional<PeerIdentity> GrpcPeers::Find(std::string_view peer) const {
  int number = 0;
  if (peer.substr(0, 3) != "fd:" ||
      !absl::SimpleAtoi(absl::string_view(peer.data() + 3, peer.size() - 3), &number)) {
    return std::nullopt;
  }
  const absl::MutexLock lock(&mutex_);
  const auto entry = entries_.find(number);
  if (entry == entries_.end() || entry->second.retired) return std::nullopt;
  return entry->second.identity;
}

}  // namespace quarry

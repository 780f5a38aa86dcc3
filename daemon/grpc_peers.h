// Who is behind a gRPC connection of the Unix socket. gRPC knows such a connection only by the
// number of its descriptor ("fd:<n>"); here numbers meet the kernel's credentials.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "daemon/file_descriptor.h"
#include "daemon/peer_tenant.h"

namespace quarry {

// Gives every connection a descriptor number that no other connection has had for a long time.
//
// Why: a call of a connection that has just ended may still be starting on some thread. If its
// number had been given to the next connection, of another tenant, the call would be taken for
// that tenant's. So numbers come from a range of their own, far above where the kernel hands out
// descriptors; they go up, and one that ended is left alone for kQuarantine, which is longer than
// any such call can linger. A connection that finds no number is refused.
//
// Thread-safe.
class GrpcPeers {
 public:
  static constexpr absl::Duration kQuarantine = absl::Seconds(60);
  struct Range {
    int first = 0, last = 0;  // both included
  };
  // From kFirstNumber up to the process's limit of descriptors, at most 65536 numbers.
  static Range DefaultRange();
  explicit GrpcPeers(Range range);

  // Moves the socket to a fresh number and notes whose it is. The caller gives the descriptor to
  // gRPC, which closes it. ResourceExhausted when no number is free.
  absl::StatusOr<int> Place(FileDescriptor socket, PeerIdentity identity, absl::Time now);
  // The connection has ended.
  void Retire(int number, absl::Time now);
  // Of a call's peer, "fd:<n>". Nothing when it is no connection of ours, or has ended.
  std::optional<PeerIdentity> Find(std::string_view peer) const;

 private:
  struct Entry {
    PeerIdentity identity;
    std::optional<absl::Time> retired;
  };
  const Range range_;
  mutable absl::Mutex mutex_;
  int next_ ABSL_GUARDED_BY(mutex_);
  std::map<int, Entry> entries_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry

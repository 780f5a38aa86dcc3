// The handshake socket: messages with descriptors, under a deadline.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/channel.h"

namespace quarry {

// Unavailable: nobody listens at `path`, or nobody has taken the connection by the deadline (a
// stopped daemon whose backlog is full).
absl::StatusOr<OwnedFd> ConnectSeqPacket(std::string_view path, absl::Duration deadline);

// One message and one answer of exactly reply.size() bytes; descriptors that came with it are
// appended to *descriptors. Unavailable: the daemon hung up or did not answer by the deadline.
absl::Status Exchange(int socket, std::span<const std::byte> request, std::span<std::byte> reply,
                      absl::Duration deadline, std::vector<OwnedFd>* descriptors);

}  // namespace quarry

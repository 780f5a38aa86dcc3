// What a client asks for in its first message, and what it gets: pure, no sockets.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "daemon/shm_options.h"
#include "proto/shm_layout.h"

namespace quarry {

// Shape of one channel's memory.
struct ChannelGeometry {
  uint16_t version = 0;
  uint32_t slots = 0;       // a power of two
  uint64_t slot_bytes = 0;  // a multiple of the page
  uint64_t slots_offset = 0;
  uint64_t total_bytes = 0;
};

// The range of protocol versions this daemon speaks; tests pass another one to test skew.
struct VersionRange {
  uint16_t min = shm::kMinVersion;
  uint16_t max = shm::kMaxVersion;
};

// The highest version both speak, and the slots asked for, rounded up to a power of two and to
// whole pages. InvalidArgument: no such message; FailedPrecondition: no common version;
// ResourceExhausted: more than the configured limits, which the message names.
absl::StatusOr<ChannelGeometry> Negotiate(const shm::HelloRequest& hello, const ShmOptions& options,
                                          VersionRange versions);

// The printable part of the client's name, "unnamed" if there is none.
std::string ClientNameOf(const shm::HelloRequest& hello);

shm::HelloReply RefusalOf(const absl::Status& why, VersionRange versions);
shm::HelloReply AcceptanceOf(const ChannelGeometry& geometry, VersionRange versions,
                             uint64_t session, std::string_view tenant);

}  // namespace quarry

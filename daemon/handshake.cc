#include "daemon/handshake.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace quarry {
namespace {

constexpr uint64_t kPage = 4096;

constexpr uint64_t RoundToPages(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

template <size_t N>
void CopyText(char (&out)[N], std::string_view text) {
  const size_t n = std::min(text.size(), N - 1);
  std::memcpy(out, text.data(), n);
  std::memset(out + n, 0, N - n);
}

shm::HelloReply EmptyReply(VersionRange versions) {
  shm::HelloReply reply{};
  reply.magic = shm::kMagic;
  reply.min_version = versions.min;
  reply.max_version = versions.max;
  return reply;
}

}  // namespace

absl::StatusOr<ChannelGeometry> Negotiate(const shm::HelloRequest& hello, const ShmOptions& options,
                                          VersionRange versions) {
  if (hello.magic != shm::kMagic) {
    return absl::InvalidArgumentError(absl::StrCat("magic is ", hello.magic, ", not ", shm::kMagic,
                                                   ": no client of this protocol"));
  }
  if (hello.min_version > hello.max_version) {
    return absl::InvalidArgumentError(
        absl::StrCat("versions ", hello.min_version, " to ", hello.max_version, " are no range"));
  }
  ChannelGeometry geometry;
  geometry.version = std::min(hello.max_version, versions.max);
  if (geometry.version < hello.min_version || geometry.version < versions.min) {
    return absl::FailedPreconditionError(
        absl::StrCat("the client speaks versions ", hello.min_version, " to ", hello.max_version,
                     ", the daemon ", versions.min, " to ", versions.max));
  }
  const uint32_t wanted_slots = hello.slots == 0 ? options.default_slots : hello.slots;
  if (wanted_slots > options.max_slots) {
    return absl::ResourceExhaustedError(
        absl::StrCat(wanted_slots, " slots asked for, shm.max_slots is ", options.max_slots));
  }
  const uint64_t wanted_bytes =
      hello.slot_bytes == 0 ? options.default_slot_bytes : hello.slot_bytes;
  if (wanted_bytes > options.max_slot_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("slots of ", wanted_bytes,
                                                     " bytes asked for, shm.max_slot_bytes is ",
                                                     options.max_slot_bytes));
  }
  geometry.slots = std::bit_ceil(wanted_slots);
  geometry.slot_bytes = RoundToPages(std::max(wanted_bytes, shm::kMinSlotBytes));
  geometry.slots_offset =
      RoundToPages(shm::kHeaderBytes + geometry.slots * sizeof(shm::SubmitEntry));
  geometry.total_bytes = geometry.slots_offset + geometry.slots * geometry.slot_bytes;
  return geometry;
}

std::string ClientNameOf(const shm::HelloRequest& hello) {
  std::string name;
  for (char c : hello.client_name) {
    if (c == '\0') break;
    name.push_back(c > 0x20 && c < 0x7f ? c : '?');
  }
  return name.empty() ? "unnamed" : name;
}

shm::HelloReply RefusalOf(const absl::Status& why, VersionRange versions) {
  shm::HelloReply reply = EmptyReply(versions);
  reply.status = static_cast<uint32_t>(why.code());
  CopyText(reply.message, std::string_view(why.message().data(), why.message().size()));
  return reply;
}

shm::HelloReply AcceptanceOf(const ChannelGeometry& geometry, VersionRange versions,
                             uint64_t session, std::string_view tenant) {
  shm::HelloReply reply = EmptyReply(versions);
  reply.version = geometry.version;
  reply.session = session;
  reply.channel_bytes = geometry.total_bytes;
  reply.slot_bytes = geometry.slot_bytes;
  reply.slots = geometry.slots;
  CopyText(reply.tenant, tenant);
  return reply;
}

}  // namespace quarry

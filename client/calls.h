// Unary calls over a channel: protobuf in a slot, the same messages as over gRPC.
#pragma once

#include <cstring>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "client/channel.h"
#include "proto/shm_layout.h"

namespace quarry {

// Sends `request` and returns the reply. InvalidArgument if the request does not fit a slot.
template <typename Reply, typename Request>
absl::StatusOr<Reply> Call(ClientChannel& channel, shm::Method method, const Request& request) {
  const size_t bytes = request.ByteSizeLong();
  if (bytes > channel.payload_bytes() - sizeof(shm::CallHeader)) {
    return absl::InvalidArgumentError(
        absl::StrCat("request of ", bytes, " bytes, a slot carries ",
                     channel.payload_bytes() - sizeof(shm::CallHeader)));
  }
  absl::StatusOr<ClientChannel::Slot> slot = channel.Take();
  if (!slot.ok()) return slot.status();
  std::byte* at = channel.payload(*slot);
  const shm::CallHeader header{static_cast<uint32_t>(method), 0};
  std::memcpy(at, &header, sizeof(header));
  request.SerializeToArray(at + sizeof(header), static_cast<int>(bytes));
  channel.Submit(*slot, shm::Opcode::kCall, sizeof(header) + bytes);
  uint64_t reply_bytes = 0;
  absl::Status status = channel.Wait(*slot, &reply_bytes);
  Reply reply;
  if (status.ok() && !reply.ParseFromArray(at, static_cast<int>(reply_bytes))) {
    status = absl::DataLossError(
        absl::StrCat("reply of ", reply_bytes, " bytes to method ", header.method,
                     " is not a message"));
  }
  channel.Abandon(*slot);
  if (!status.ok()) return status;
  return reply;
}

}  // namespace quarry

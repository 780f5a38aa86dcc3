// What the tests against a scripted server share: connecting, and bytes as plain structures.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>

#include "client/client.h"
#include "proto/convert.h"
#include "tests/client/fake_server.h"
#include "tests/support/eventually.h"

namespace quarry::testing {

using Answer = FakeServer::Answer;
using Request = FakeServer::Request;

inline constexpr KvShape kShape{2, 4, 2, 16, DType::kFp32};
inline constexpr absl::Duration kLong = kPatience;

inline absl::StatusOr<std::unique_ptr<Client>> Connect(const FakeServer& server,
                                                       absl::Duration deadline = kLong) {
  ClientOptions options;
  options.socket_path = server.path();
  options.deadline = deadline;
  return Client::Connect(options);
}

inline std::string Text(const absl::Status& status) { return std::string(status.message()); }

template <typename T>
std::string Raw(const T& pod) {
  return std::string(reinterpret_cast<const char*>(&pod), sizeof(pod));
}
template <typename T>
T PodAt(const std::string& bytes, size_t offset = 0) {
  T pod;
  EXPECT_GE(bytes.size(), offset + sizeof(T));
  std::memcpy(&pod, bytes.data() + offset, sizeof(T));
  return pod;
}

// Knows one context, number 5.
inline Answer Contexts() {
  wire::ListContextsReply reply;
  ContextInfo info;
  info.context = {5};
  info.shape = kShape;
  *reply.add_contexts() = ToProto(info);
  return {.payload = reply.SerializeAsString()};
}

}  // namespace quarry::testing

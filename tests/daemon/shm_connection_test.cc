// Who is let in, with what memory, and what passes over a client's socket.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "tests/daemon/other_user.h"
#include "tests/daemon/server_fixture.h"

namespace quarry::testing {
namespace {

using shm::Opcode;
using ::testing::HasSubstr;

class ShmConnectionTest : public ServerFixture {};

TEST_F(ShmConnectionTest, AClientOfAnotherVersionIsRefusedWithTheRange) {
  StartServer(SmallOptions(), {3, 5});
  shm::HelloRequest hello = RawShmClient::Hello();
  hello.min_version = 6;
  hello.max_version = 8;
  auto socket = RawShmClient::Dial(socket_path());
  ASSERT_TRUE(socket.ok());
  const auto reply = RawShmClient::SayHello(
      socket->get(), std::as_bytes(std::span<const shm::HelloRequest>(&hello, 1)));
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->status, static_cast<uint32_t>(absl::StatusCode::kFailedPrecondition));
  EXPECT_EQ(reply->version, 0);
  EXPECT_EQ(reply->min_version, 3);
  EXPECT_EQ(reply->max_version, 5);
  EXPECT_THAT(reply->message, HasSubstr("6 to 8"));
  // And a newer client that still speaks an old version is served.
  hello.min_version = 1;
  EXPECT_EQ(Connect(hello)->hello_reply().version, 5);
}

TEST_F(ShmConnectionTest, GarbageAndWrongSizesInsteadOfHelloAreRefused) {
  StartServer();
  for (const size_t bytes : {size_t{1}, size_t{63}, size_t{64}, size_t{65}, size_t{4096}}) {
    auto socket = RawShmClient::Dial(socket_path());
    ASSERT_TRUE(socket.ok());
    const std::vector<std::byte> garbage(bytes, std::byte{0xa5});
    const auto reply = RawShmClient::SayHello(socket->get(), garbage);
    ASSERT_TRUE(reply.has_value()) << bytes;
    EXPECT_EQ(reply->status, static_cast<uint32_t>(absl::StatusCode::kInvalidArgument)) << bytes;
  }
  EXPECT_EQ(counters().shm_handshakes_refused, 5u);
  EXPECT_EQ(Connect()->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
}

TEST_F(ShmConnectionTest, ASilentConnectionIsClosedAndCostsNobodyAnything) {
  StartServer();
  auto silent = RawShmClient::Dial(socket_path());
  ASSERT_TRUE(silent.ok());
  auto client = Connect();
  char byte;
  EXPECT_EQ(recv(silent->get(), &byte, 1, 0), 0);  // the daemon's hang-up
  EXPECT_EQ(client->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
}

TEST_F(ShmConnectionTest, SilentConnectionsOfOneUserDoNotKeepOthersOut) {
  if (!IsRoot()) GTEST_SKIP() << "needs root to connect as another user";
  ShmOptions options = SmallOptions();
  options.hello_timeout_ms = 60000;
  options.socket_mode = 0666;
  StartServer(options);
  chmod(directory_.path().c_str(), 0755);
  std::vector<FileDescriptor> silent;
  AsUser(12345, [&] {
    for (int i = 0; i < 100; ++i) {
      auto socket = RawShmClient::Dial(socket_path());
      if (socket.ok()) silent.push_back(*std::move(socket));
    }
  });
  EXPECT_EQ(Connect()->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
}

TEST_F(ShmConnectionTest, ChannelsAreLimited) {
  ShmOptions options = SmallOptions();
  options.max_channels = 2;
  StartServer(options);
  auto a = Connect(), b = Connect();
  const auto c = RawShmClient::Connect(socket_path());
  EXPECT_EQ(c.status().code(), absl::StatusCode::kResourceExhausted);
  a.reset();
  EXPECT_TRUE(Eventually([&] { return RawShmClient::Connect(socket_path()).ok(); }));
}

TEST_F(ShmConnectionTest, ChannelMemoryIsLimited) {
  ShmOptions options = SmallOptions();
  options.max_total_bytes = 1 << 20;
  StartServer(options);
  auto a = Connect(RawShmClient::Hello(4, 128 << 10));
  const auto b = RawShmClient::Connect(socket_path(), RawShmClient::Hello(4, 128 << 10));
  EXPECT_EQ(b.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(b.status().message()), HasSubstr("shm.max_total_bytes"));
}

TEST_F(ShmConnectionTest, UnknownUsersAreRefusedWhenConfigured) {
  PeerTenantOptions tenants;
  tenants.refuse_unknown_users = true;
  StartServer(SmallOptions(), {}, tenants);
  EXPECT_EQ(RawShmClient::Connect(socket_path()).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(ShmConnectionTest, TheChannelsMemoryCannotBeResized) {
  StartServer();
  auto client = Connect();
  EXPECT_NE(ftruncate(client->memory_fd(), 0), 0);
  EXPECT_NE(ftruncate(client->memory_fd(), 1 << 30), 0);
  EXPECT_NE(fcntl(client->memory_fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
  const int seals = fcntl(client->memory_fd(), F_GET_SEALS);
  EXPECT_EQ(seals & (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL),
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
}

TEST_F(ShmConnectionTest, PunchingHolesIntoTheChannelHarmsNobody) {
  StartServer();
  auto client = Connect();
  auto other = Connect();
  ASSERT_EQ(fallocate(client->memory_fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                      static_cast<off_t>(client->hello_reply().channel_bytes)),
            0);
  client->RingDoorbell();
  EXPECT_EQ(other->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
}

TEST_F(ShmConnectionTest, ExtentsGoToTheirOwnTenantOnly) {
  StartServer();
  auto client = Connect();
  const uint32_t mine = engine_.AddExtent(tenant(), 8192, 'm');
  const uint32_t theirs = engine_.AddExtent("somebody", 8192, 't');
  auto answer = client->AskExtent(mine);
  ASSERT_TRUE(answer.has_value());
  ASSERT_EQ(answer->reply.status, 0u);
  EXPECT_EQ(answer->reply.bytes, 8192u);
  char byte = 0;
  EXPECT_EQ(pread(answer->fd.get(), &byte, 1, 100), 1);
  EXPECT_EQ(byte, 'm');
  for (const uint32_t extent : {theirs, 0u, ~0u}) {
    answer = client->AskExtent(extent);
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->reply.status, static_cast<uint32_t>(absl::StatusCode::kNotFound));
    EXPECT_FALSE(answer->fd.valid());
  }
}

TEST_F(ShmConnectionTest, AMalformedSocketRequestClosesTheClient) {
  StartServer();
  for (const size_t bytes : {size_t{1}, size_t{8}, size_t{9}}) {
    auto client = Connect();
    const std::vector<char> garbage(bytes, 'x');
    ASSERT_EQ(send(client->socket(), garbage.data(), bytes, 0), static_cast<ssize_t>(bytes));
    EXPECT_TRUE(client->AwaitHangUp()) << bytes;
  }
}

TEST_F(ShmConnectionTest, AClientThatDoesNotReadItsSocketIsClosedAndOthersAreServed) {
  StartServer();
  auto greedy = Connect();
  auto other = Connect();
  const shm::SocketRequest request{1, 12345};
  bool closed = false;
  for (int i = 0; i < 100000 && !closed; ++i) {
    if (send(greedy->socket(), &request, sizeof(request), MSG_NOSIGNAL | MSG_DONTWAIT) < 0 &&
        errno != EAGAIN) {
      closed = true;
    }
    if (i % 100 == 0) {
      ASSERT_EQ(other->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
    }
  }
  EXPECT_TRUE(greedy->AwaitHangUp());
}

}  // namespace
}  // namespace quarry::testing

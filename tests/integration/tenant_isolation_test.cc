// A client of another user cannot reach a tenant's memory: tested from a process that tries.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>

#include "proto/shm_layout.h"
#include "tests/support/daemon_process.h"
#include "tests/support/kv_client.h"

namespace quarry {
namespace {

using testing::DaemonProcess;

constexpr uid_t kOtherUser = 65534;

// Runs `attack` in a child process of another user; its result is the number of successes.
int SuccessesAsOtherUser(const std::function<int()>& attack) {
  pid_t pid = fork();
  if (pid == 0) {
    if (setgid(kOtherUser) != 0 || setuid(kOtherUser) != 0) _exit(101);
    _exit(attack());
  }
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFEXITED(status)) << "the attacker died of signal " << WTERMSIG(status);
  return WEXITSTATUS(status);
}

// One raw handshake, as a hostile client would do it; returns the socket.
int RawHandshake(const std::string& path) {
  int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) return -1;
  shm::HelloRequest hello{};
  hello.magic = shm::kMagic;
  hello.min_version = shm::kMinVersion;
  hello.max_version = shm::kMaxVersion;
  if (send(fd, &hello, sizeof(hello), 0) != sizeof(hello)) return -1;
  shm::HelloReply reply;
  if (recv(fd, &reply, sizeof(reply), 0) != sizeof(reply) || reply.status != 0) return -1;
  return fd;
}

// Asks for an extent; true if a descriptor came.
bool ExtentGiven(int socket_fd, uint32_t extent) {
  shm::SocketRequest request{static_cast<uint32_t>(shm::SocketRequestKind::kExtent), extent};
  if (send(socket_fd, &request, sizeof(request), 0) != sizeof(request)) return false;
  shm::SocketReply reply{};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  iovec iov{&reply, sizeof(reply)};
  msghdr message{};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  if (recvmsg(socket_fd, &message, 0) <= 0) return false;
  return reply.status == 0 || CMSG_FIRSTHDR(&message) != nullptr;
}

class TenantIsolationTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (getuid() != 0) GTEST_SKIP() << "needs root to become another user";
    testing::DaemonOptions options;
    options.config = "[shm]\nsocket_mode = \"0666\"\n";
    options.arguments = {"--arena-bytes", "256MiB"};
    absl::StatusOr<std::unique_ptr<DaemonProcess>> daemon = DaemonProcess::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    auto client = testing::ConnectTo(daemon_->socket_path());
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    auto opened = client_->Open(testing::OpenFor(spec_, data_, 1024));
    ASSERT_TRUE(opened.ok()) << opened.status();
    context_ = opened->context;
    ASSERT_TRUE(testing::AppendTokens(client_.get(), context_, data_, 0, 600).ok());
    ASSERT_TRUE(client_->Seal(context_).ok());
    std::string secret = "the tenant's own bytes";
    ASSERT_TRUE(client_->Put("engine", "key", std::as_bytes(std::span(secret))).ok());
  }

  ModelSpec spec_ = testing::SmallSpec();
  testing::KvData data_{spec_.shape, 600, 7};
  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<Client> client_;
  ContextId context_;
};

TEST_F(TenantIsolationTest, OtherUserReachesNoContextBlockOrKey) {
  std::string socket = daemon_->socket_path();
  int successes = SuccessesAsOtherUser([&] {
    auto other = testing::ConnectTo(socket);
    if (!other.ok()) return 100;
    int reached = 0;
    // A guess for the id must not matter: try everything near it.
    for (uint64_t id = 0; id < context_.value + 16; ++id) {
      testing::OneRow row(spec_.shape, ContextId{id}, 0, {0, 600}, 3);
      if (row.Run(other->get()).ok()) ++reached;
      std::vector<std::byte> k(spec_.shape.kv_heads * spec_.shape.vector_bytes()), v(k.size());
      if ((*other)->Read(ContextId{id}, 0, {0, 1}, k, v).ok()) ++reached;
      if ((*other)->LeaseContextBlock(ContextId{id}, 0).ok()) ++reached;
      if ((*other)->Close(ContextId{id}).ok()) ++reached;
      if ((*other)->Fork({ContextId{id}, 256, 1024, {}}).ok()) ++reached;
    }
    if ((*other)->Lease("engine", "key").ok()) ++reached;
    if ((*other)->Get("engine", "key").ok()) ++reached;
    std::vector<std::string> keys = {"key"};
    auto exists = (*other)->Exists("engine", keys);
    if (!exists.ok() || (*exists)[0]) ++reached;
    auto opened = (*other)->Open(testing::OpenFor(spec_, data_, 1024));
    if (!opened.ok() || opened->reused_tokens != 0) ++reached;
    return reached;
  });
  EXPECT_EQ(successes, 0);
  // The owner still has it all.
  testing::OneRow row(spec_.shape, context_, 0, {0, 600}, 3);
  ASSERT_TRUE(row.Run(client_.get()).ok()) << row.answer.status;
  EXPECT_LT(row.Error(data_), 1e-3);
}

TEST_F(TenantIsolationTest, OtherUserGetsNoExtentByIndex) {
  std::string socket = daemon_->socket_path();
  EXPECT_EQ(SuccessesAsOtherUser([&] {
              int fd = RawHandshake(socket);
              if (fd < 0) return 100;
              int given = 0;
              for (uint32_t extent = 0; extent < 64; ++extent) given += ExtentGiven(fd, extent);
              return given;
            }),
            0);
}

TEST_F(TenantIsolationTest, OwnersMappingIsReadOnly) {
  auto lease = client_->LeaseContextBlock(context_, 0);
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_TRUE((*lease)->Verify().ok());
  std::span<const std::byte> bytes = (*lease)->bytes();
  // mprotect to writable must fail on a mapping of a sealed descriptor.
  auto page = reinterpret_cast<uintptr_t>(bytes.data()) & ~uintptr_t{4095};
  EXPECT_NE(mprotect(reinterpret_cast<void*>(page), 4096, PROT_READ | PROT_WRITE), 0);
}

}  // namespace
}  // namespace quarry

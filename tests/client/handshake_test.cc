// Connecting to servers that misbehave. Deadlines are the client's own; nothing here sleeps for a
// fixed time.
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "client/channel.h"
#include "tests/client/scripted.h"
#include "tests/daemon/other_user.h"

namespace quarry {
namespace {

using ::testing::AllOf;
using testing::Connect;
using testing::FakeServer;
using ::testing::HasSubstr;
using testing::kLong;
using testing::Text;

absl::Status RefusalOf(FakeServer::Script script, absl::Duration deadline = kLong) {
  FakeServer server(std::move(script));
  return Connect(server, deadline).status();
}

TEST(HandshakeTest, AnsweredHelloGivesSessionAndTenant) {
  FakeServer server({});
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_EQ((*client)->tenant(), "acme");
  EXPECT_EQ((*client)->session(), SessionId{17});
  EXPECT_TRUE((*client)->Nop().ok());
}

TEST(HandshakeTest, ANewerDaemonIsRefusedWithBothRanges) {
  FakeServer::Script script;
  script.min_version = 4;
  script.max_version = 5;
  const absl::Status status = RefusalOf(script);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Text(status), AllOf(HasSubstr("4 to 5"), HasSubstr("1 to 3")));
}

TEST(HandshakeTest, ANewerClientIsRefusedWithBothRanges) {
  FakeServer server({});
  shm::HelloRequest hello{};
  hello.magic = shm::kMagic;
  hello.min_version = 4;
  hello.max_version = 6;
  const absl::Status status = ClientChannel::Connect(server.path(), hello, kLong).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Text(status), AllOf(HasSubstr("1 to 3"), HasSubstr("4 to 6")));
}

TEST(HandshakeTest, AVersionThatWasNotOfferedIsRefused) {
  FakeServer::Script script;
  script.min_version = script.max_version = 0;
  script.choose_wrong_version = true;
  const absl::Status status = RefusalOf(script);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Text(status), HasSubstr("chose version 0"));
}

TEST(HandshakeTest, AnotherProgramsMagicIsNoDaemon) {
  FakeServer::Script script;
  script.magic = 0x12345678;
  const absl::Status status = RefusalOf(script);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Text(status), HasSubstr("not quarryd"));
}

TEST(HandshakeTest, AShortReplyIsUnavailableWithItsSize) {
  FakeServer::Script script;
  script.reply_bytes = 100;
  const absl::Status status = RefusalOf(script);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Text(status), AllOf(HasSubstr("100 bytes"), HasSubstr("256")));
}

TEST(HandshakeTest, ARefusalsCodeAndTextAreTheDaemons) {
  FakeServer::Script script;
  script.status = static_cast<uint32_t>(absl::StatusCode::kResourceExhausted);
  script.message = "shm.max_channels = 64 clients are attached";
  const absl::Status status = RefusalOf(script);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Text(status), HasSubstr(script.message));
}

TEST(HandshakeTest, ARefusalThatFillsItsFieldIsReadToItsEnd) {
  FakeServer::Script script;
  script.status = static_cast<uint32_t>(absl::StatusCode::kUnavailable);
  script.message = std::string(sizeof(shm::HelloReply::message), 'x');  // no NUL behind it
  const absl::Status status = RefusalOf(script);
  EXPECT_THAT(Text(status), HasSubstr(script.message + " ("));
}

TEST(HandshakeTest, MissingDescriptorsAreCounted) {
  FakeServer::Script script;
  script.descriptors = 1;
  const absl::Status status = RefusalOf(script);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Text(status), HasSubstr("1 descriptors"));
}

TEST(HandshakeTest, ASilentDaemonIsUnavailableAtTheDeadline) {
  FakeServer::Script script;
  script.no_reply = true;
  EXPECT_EQ(RefusalOf(script, absl::Milliseconds(50)).code(), absl::StatusCode::kUnavailable);
}

TEST(HandshakeTest, AClosedConnectionIsUnavailableAtOnce) {
  FakeServer::Script script;
  script.close_at_hello = true;
  const absl::Time start = absl::Now();
  EXPECT_EQ(RefusalOf(script).code(), absl::StatusCode::kUnavailable);
  EXPECT_LT(absl::Now() - start, kLong / 2);
}

TEST(HandshakeTest, NobodyListeningIsUnavailableAndNamesThePath) {
  ClientOptions options;
  options.socket_path = "/nonexistent/quarryd.sock";
  const absl::Status status = Client::Connect(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Text(status), HasSubstr(options.socket_path));
}

// An engine's profiler interrupts poll, which the kernel never restarts.
TEST(HandshakeTest, SignalsDoNotEndTheWaitForTheReply) {
  struct sigaction act {
  }, old{};
  act.sa_handler = [](int) {};
  sigaction(SIGALRM, &act, &old);
  const itimerval every_ms{{0, 1000}, {0, 1000}}, never{};
  FakeServer::Script script;
  script.hello_delay_ms = 50;
  FakeServer server(std::move(script));
  setitimer(ITIMER_REAL, &every_ms, nullptr);
  const absl::Status status = Connect(server).status();
  setitimer(ITIMER_REAL, &never, nullptr);
  sigaction(SIGALRM, &old, nullptr);
  EXPECT_TRUE(status.ok()) << status;
}

// Listens, never accepts, and has no room for another connection: a stopped daemon.
class FullListener {
 public:
  FullListener() {
    char directory[] = "/tmp/quarry-full-XXXXXX";
    EXPECT_NE(mkdtemp(directory), nullptr);
    directory_ = directory;
    path_ = directory_ + "/socket";
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.data(), path_.size());
    const auto* at = reinterpret_cast<const sockaddr*>(&address);
    descriptors_.push_back(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    EXPECT_EQ(bind(descriptors_[0], at, sizeof(address)), 0);
    EXPECT_EQ(listen(descriptors_[0], 0), 0);
    int connected;
    do {
      descriptors_.push_back(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
      connected = connect(descriptors_.back(), at, sizeof(address));
    } while (connected == 0 && descriptors_.size() < 100);
    EXPECT_EQ(errno, EAGAIN);
  }
  ~FullListener() {
    for (const int fd : descriptors_) close(fd);
    unlink(path_.c_str());
    rmdir(directory_.c_str());
  }
  const std::string& path() const { return path_; }

 private:
  std::string directory_, path_;
  std::vector<int> descriptors_;
};

TEST(HandshakeTest, AStoppedDaemonWithAFullBacklogIsUnavailableAtTheDeadline) {
  const FullListener listener;
  ClientOptions options;
  options.socket_path = listener.path();
  options.deadline = absl::Milliseconds(50);
  const absl::Time start = absl::Now();
  const absl::Status status = Client::Connect(options).status();
  EXPECT_LT(absl::Now() - start, kLong / 2);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Text(status), AllOf(HasSubstr(listener.path()), HasSubstr("50ms")));
}

TEST(HandshakeTest, ARefusedUserLearnsWhatDecides) {
  if (!testing::IsRoot()) GTEST_SKIP() << "needs root";
  const FullListener listener;  // in a directory of its owner's alone
  absl::Status status;
  testing::AsUser(65534, [&] {
    ClientOptions options;
    options.socket_path = listener.path();
    status = Client::Connect(options).status();
  });
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Text(status), AllOf(HasSubstr("Permission denied"), HasSubstr("shm.socket_mode")));
}

TEST(HandshakeTest, SignalsDoNotPutOffTheDeadlineOfAConnection) {
  const FullListener listener;
  struct sigaction act {
  }, old{};
  act.sa_handler = [](int) {};
  sigaction(SIGALRM, &act, &old);
  const itimerval every_ms{{0, 1000}, {0, 1000}}, never{};
  ClientOptions options;
  options.socket_path = listener.path();
  options.deadline = absl::Milliseconds(50);
  const absl::Time start = absl::Now();
  setitimer(ITIMER_REAL, &every_ms, nullptr);
  const absl::Status status = Client::Connect(options).status();
  setitimer(ITIMER_REAL, &never, nullptr);
  sigaction(SIGALRM, &old, nullptr);
  EXPECT_GE(absl::Now() - start, options.deadline);
  EXPECT_LT(absl::Now() - start, kLong / 2);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace quarry

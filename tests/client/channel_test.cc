// The client against servers that misbehave. Deadlines are the client's own; nothing here sleeps
// for a fixed time.
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

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/time/clock.h"
#include "client/channel.h"
#include "client/client.h"
#include "proto/convert.h"
#include "tests/client/fake_server.h"

namespace quarry {
namespace {

using testing::FakeServer;
using ::testing::AllOf;
using ::testing::HasSubstr;
using Answer = FakeServer::Answer;
using Request = FakeServer::Request;

constexpr KvShape kShape{2, 4, 2, 16, DType::kFp32};
constexpr absl::Duration kLong = absl::Seconds(60);

absl::StatusOr<std::unique_ptr<Client>> Connect(const FakeServer& server,
                                                absl::Duration deadline = kLong) {
  ClientOptions options;
  options.socket_path = server.path();
  options.deadline = deadline;
  return Client::Connect(options);
}

absl::Status RefusalOf(FakeServer::Script script, absl::Duration deadline = kLong) {
  FakeServer server(std::move(script));
  return Connect(server, deadline).status();
}

std::string Text(const absl::Status& status) { return std::string(status.message()); }

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
Answer Contexts() {
  wire::ListContextsReply reply;
  ContextInfo info;
  info.context = {5};
  info.shape = kShape;
  *reply.add_contexts() = ToProto(info);
  return {.payload = reply.SerializeAsString()};
}

bool Eventually(const std::function<bool()>& condition) {
  const absl::Time end = absl::Now() + absl::Seconds(20);
  while (!condition()) {
    if (absl::Now() > end) return false;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
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
  script.min_version = 2;
  script.max_version = 3;
  const absl::Status status = RefusalOf(script);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Text(status), AllOf(HasSubstr("2 to 3"), HasSubstr("1 to 1")));
}

TEST(HandshakeTest, ANewerClientIsRefusedWithBothRanges) {
  FakeServer server({});
  shm::HelloRequest hello{};
  hello.magic = shm::kMagic;
  hello.min_version = 4;
  hello.max_version = 6;
  const absl::Status status = ClientChannel::Connect(server.path(), hello, kLong).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Text(status), AllOf(HasSubstr("1 to 1"), HasSubstr("4 to 6")));
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
  struct sigaction act{}, old{};
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

TEST(HandshakeTest, SignalsDoNotPutOffTheDeadlineOfAConnection) {
  const FullListener listener;
  struct sigaction act{}, old{};
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

TEST(ChannelTest, ADaemonThatDiesMidRequestIsNoticedQuickly) {
  FakeServer server({.serve = [](const Request&) { return Answer{.hang_up = true}; }});
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  const absl::Time start = absl::Now();
  const absl::Status status = (*client)->Nop();
  EXPECT_LT(absl::Now() - start, kLong / 2);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Text(status), HasSubstr(server.path()));
  EXPECT_EQ((*client)->Nop().code(), absl::StatusCode::kUnavailable);
}

TEST(ChannelTest, AMissedDeadlineEndsEveryCallOfEveryThread) {
  FakeServer server({.serve = [](const Request&) { return Answer{.given = false}; }});
  auto client = Connect(server, absl::Milliseconds(100));
  ASSERT_TRUE(client.ok()) << client.status();
  std::vector<std::thread> threads;
  std::vector<absl::Status> statuses(8);  // more than slots: some wait for one
  for (absl::Status& status : statuses) {
    threads.emplace_back([&] { status = (*client)->Nop(); });
  }
  for (std::thread& thread : threads) thread.join();
  size_t unavailable = 0;
  for (const absl::Status& status : statuses) {
    EXPECT_FALSE(status.ok());
    unavailable += absl::IsUnavailable(status) ? 1 : 0;
  }
  EXPECT_GE(unavailable, 4u);
  const size_t sent = server.requests().size();
  EXPECT_EQ((*client)->Nop().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(server.requests().size(), sent);  // not even tried
}

TEST(ChannelTest, AnErrorsCodeAndTextAreTheDaemons) {
  FakeServer server({.serve = [](const Request&) {
    return Answer{static_cast<uint32_t>(absl::StatusCode::kNotFound), "pin \"x\" is not there"};
  }});
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_EQ((*client)->Unpin("x"), absl::NotFoundError("pin \"x\" is not there"));
  EXPECT_EQ((*client)->Nop().code(), absl::StatusCode::kNotFound);  // and the channel lives
}

TEST(ChannelTest, AReplyThatIsNoMessageIsDataLoss) {
  FakeServer server({.serve = [](const Request&) { return Answer{.payload = "\xff\xff"}; }});
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_EQ((*client)->Status().status().code(), absl::StatusCode::kDataLoss);
}

// Answers attends with generations and statuses as a test says, and o full of 1.
Answer AttendAnswerOf(const Request& request, std::vector<uint32_t> generations,
                      std::vector<uint32_t> statuses) {
  const auto header = PodAt<shm::AttendHeader>(request.payload);
  EXPECT_EQ(header.rows, generations.size());
  std::string answers;
  for (uint32_t i = 0; i < header.rows; ++i) {
    const auto row = PodAt<shm::AttendRowPod>(request.payload, sizeof(header) + i * sizeof(shm::AttendRowPod));
    const std::vector<float> ones(row.heads * kShape.head_dim, 1.0f);
    std::memcpy(request.slot_start + row.o_offset, ones.data(), ones.size() * 4);
    shm::AttendAnswerPod pod{};
    pod.generation = generations[i];
    pod.status = statuses[i];
    pod.covered_lo = row.range_lo;
    pod.covered_hi = row.range_hi;
    answers += Raw(pod);
  }
  return {.payload = answers};
}

TEST(ChannelTest, ARowAnsweredForAnotherGenerationIsUnavailableAlone) {
  FakeServer server({.serve = [](const Request& r) {
    if (r.opcode == shm::Opcode::kCall) return Contexts();
    return AttendAnswerOf(r, {r.generation, r.generation + 1, r.generation},
                          {0, 0, static_cast<uint32_t>(absl::StatusCode::kOutOfRange)});
  }});
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  const std::vector<float> q(4 * 16, 0.5f);
  std::vector<AttendRow> rows(3);
  std::vector<std::vector<float>> o(3, std::vector<float>(4 * 16, 7.0f));
  std::vector<std::vector<float>> lse(3, std::vector<float>(4, 7.0f));
  std::vector<AttendAnswer> answers(3);
  for (size_t i = 0; i < 3; ++i) {
    rows[i].context = {5};
    rows[i].range = {2, 9};
    rows[i].heads = 4;
    rows[i].q = q.data();
    answers[i].o = o[i];
    answers[i].lse = lse[i];
  }
  EXPECT_TRUE((*client)->Attend(rows, answers).ok());
  EXPECT_TRUE(answers[0].status.ok()) << answers[0].status;
  EXPECT_EQ(answers[0].covered, (TokenRange{2, 9}));
  EXPECT_EQ(o[0], std::vector<float>(4 * 16, 1.0f));
  EXPECT_EQ(answers[1].status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(o[1], std::vector<float>(4 * 16, 7.0f));  // not touched
  EXPECT_EQ(answers[2].status.code(), absl::StatusCode::kOutOfRange);
  EXPECT_THAT(Text(answers[2].status), HasSubstr("row 2"));
}

// A channel whose slots the tests take themselves.
std::unique_ptr<ClientChannel> ConnectChannel(const FakeServer& server, absl::Duration deadline) {
  shm::HelloRequest hello{};
  hello.magic = shm::kMagic;
  hello.min_version = shm::kMinVersion;
  hello.max_version = shm::kMaxVersion;
  auto channel = ClientChannel::Connect(server.path(), hello, deadline);
  EXPECT_TRUE(channel.ok()) << channel.status();
  return channel.ok() ? *std::move(channel) : nullptr;
}

TEST(ChannelTest, NoFreeSlotIsResourceExhaustedAfterTheDeadline) {
  FakeServer server({});
  auto channel = ConnectChannel(server, absl::Milliseconds(60));
  ASSERT_NE(channel, nullptr);
  std::vector<ClientChannel::Slot> slots;
  for (int i = 0; i < 4; ++i) {
    auto slot = channel->Take();
    ASSERT_TRUE(slot.ok()) << slot.status();
    slots.push_back(*slot);
  }
  const absl::Time start = absl::Now();
  const absl::Status status = channel->Take().status();
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(60));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Text(status), HasSubstr("4 slots"));
  EXPECT_FALSE(channel->lost());  // the daemon did nothing wrong
}

TEST(ChannelTest, AnAbandonedSlotIsReusedOnlyAfterItsAnswer) {
  FakeServer server({.slots = 1, .serve = [](const Request&) { return Answer{.given = false}; }});
  auto channel = ConnectChannel(server, kLong);
  ASSERT_NE(channel, nullptr);
  auto first = channel->Take();
  ASSERT_TRUE(first.ok());
  channel->Submit(*first, shm::Opcode::kNop, 0);
  channel->Abandon(*first);
  ASSERT_TRUE(Eventually([&] { return server.requests().size() == 1; }));
  std::atomic<bool> answered{false};
  bool early = false;
  absl::StatusOr<ClientChannel::Slot> second;
  std::thread taker([&] {
    second = channel->Take();
    early = !answered.load();
  });
  absl::SleepFor(absl::Milliseconds(5));  // long enough to look at the slots a few times
  answered.store(true);
  server.AnswerLater(server.requests()[0], {});
  taker.join();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_FALSE(early);
  EXPECT_EQ(second->index, first->index);
  EXPECT_NE(second->generation, first->generation);
}

TEST(ChannelTest, AnAbandonedRequestThatIsNeverAnsweredEndsTheChannelAtTheDeadline) {
  FakeServer server({.slots = 1, .serve = [](const Request&) { return Answer{.given = false}; }});
  auto channel = ConnectChannel(server, absl::Milliseconds(60));
  ASSERT_NE(channel, nullptr);
  auto first = channel->Take();
  ASSERT_TRUE(first.ok());
  channel->Submit(*first, shm::Opcode::kNop, 0);
  channel->Abandon(*first);
  const absl::Time start = absl::Now();
  const absl::Status status = channel->Take().status();
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(60));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Text(status), HasSubstr("60ms"));
  EXPECT_TRUE(channel->lost());
}

// A lease's release is abandoned: the next request must not sit out the interval at which the
// socket is looked at (20 ms, 8 s in all).
TEST(ChannelTest, AnAbandonedSlotComesBackAsSoonAsItIsAnswered) {
  FakeServer server({.slots = 1});
  auto channel = ConnectChannel(server, kLong);
  ASSERT_NE(channel, nullptr);
  const absl::Time start = absl::Now();
  for (int i = 0; i < 400; ++i) {
    auto slot = channel->Take();
    ASSERT_TRUE(slot.ok()) << slot.status();
    channel->Submit(*slot, shm::Opcode::kNop, 0);
    channel->Abandon(*slot);
  }
  EXPECT_LT(absl::Now() - start, absl::Seconds(4));
}

TEST(ChannelTest, ASlotGivenBackIsTakenWhileAnotherStaysUnanswered) {
  FakeServer server({.slots = 2, .serve = [](const Request&) { return Answer{.given = false}; }});
  auto channel = ConnectChannel(server, kLong);
  ASSERT_NE(channel, nullptr);
  auto stuck = channel->Take(), held = channel->Take();
  ASSERT_TRUE(stuck.ok() && held.ok());
  channel->Submit(*stuck, shm::Opcode::kNop, 0);
  channel->Abandon(*stuck);
  channel->Submit(*held, shm::Opcode::kNop, 0);
  ASSERT_TRUE(Eventually([&] { return server.requests().size() == 2; }));
  absl::StatusOr<ClientChannel::Slot> taken;
  std::thread taker([&] { taken = channel->Take(); });
  server.AnswerLater(server.requests()[1], {});
  uint64_t bytes = 0;
  EXPECT_TRUE(channel->Wait(*held, &bytes).ok());
  channel->Abandon(*held);
  taker.join();
  ASSERT_TRUE(taken.ok()) << taken.status();
  EXPECT_EQ(taken->index, held->index);
}

TEST(ChannelTest, WaitingForASlotOfADeadDaemonIsUnavailable) {
  FakeServer server({.slots = 1, .serve = [](const Request&) { return Answer{.hang_up = true}; }});
  auto channel = ConnectChannel(server, kLong);
  ASSERT_NE(channel, nullptr);
  auto slot = channel->Take();
  ASSERT_TRUE(slot.ok());
  channel->Submit(*slot, shm::Opcode::kNop, 0);
  channel->Abandon(*slot);
  const absl::Time start = absl::Now();
  EXPECT_EQ(channel->Take().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_LT(absl::Now() - start, kLong / 2);
}

TEST(ChannelTest, ManyThreadsShareFewSlots) {
  FakeServer server({.slots = 2});
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  std::vector<std::thread> threads;
  std::atomic<int> good{0};
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) good += (*client)->Nop().ok() ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good.load(), 300);
  EXPECT_EQ(server.requests().size(), 300u);
}

TEST(ChannelTest, AnAppendLargerThanASlotArrivesWholeAndInOrder) {
  FakeServer server({.serve = [](const Request& r) {
    return r.opcode == shm::Opcode::kCall ? Contexts() : Answer{};
  }});
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  const uint32_t tokens = 301, values = tokens * 2 * 16;  // 2 KV heads of 16: 38 kB each
  std::vector<float> k(values), v(values), samples(1 * 4 * 16, 0.25f);
  std::vector<uint32_t> ids(tokens);
  const std::vector<uint32_t> positions = {77};
  for (uint32_t i = 0; i < values; ++i) {
    k[i] = static_cast<float>(i);
    v[i] = -static_cast<float>(i);
  }
  for (uint32_t i = 0; i < tokens; ++i) ids[i] = 1000 + i;
  AppendRequest append;
  append.context = {5};
  append.layer = 1;
  append.kv_heads = 2;
  append.range = {100, 100 + tokens};
  append.k = k.data();
  append.v = v.data();
  append.new_token_ids = ids;
  append.query_samples = samples.data();
  append.query_positions = positions;
  ASSERT_TRUE((*client)->Append(append).ok());

  std::string got_k, got_v, got_ids, got_samples, got_positions;
  uint32_t next = 100, pieces = 0;
  for (const Request& r : server.requests()) {
    if (r.opcode != shm::Opcode::kAppend) continue;
    ++pieces;
    const auto header = PodAt<shm::AppendHeader>(r.payload);
    EXPECT_EQ(header.context, 5u);
    EXPECT_EQ(header.layer, 1u);
    ASSERT_EQ(header.token_lo, next);
    ASSERT_GT(header.token_hi, next);
    next = header.token_hi;
    const auto part = [&](uint64_t offset, uint64_t bytes) {
      EXPECT_EQ(offset % 4, 0u);
      EXPECT_LE(offset - shm::kSlotPayload + bytes, r.payload.size());
      return r.payload.substr(offset - shm::kSlotPayload, bytes);
    };
    const uint64_t n = header.token_hi - header.token_lo;
    got_k += part(header.k_offset, n * 2 * 16 * 4);
    got_v += part(header.v_offset, n * 2 * 16 * 4);
    EXPECT_EQ(header.new_token_ids, n);
    got_ids += part(header.ids_offset, n * 4);
    if (header.query_samples == 0) continue;
    got_samples += part(header.samples_offset, header.query_samples * 4 * 16 * 4);
    got_positions += part(header.positions_offset, header.query_samples * 4);
  }
  EXPECT_GE(pieces, 5u);
  EXPECT_EQ(next, 100 + tokens);
  const auto raw = [](const auto& x) {
    return std::string(reinterpret_cast<const char*>(x.data()), x.size() * sizeof(x[0]));
  };
  EXPECT_TRUE(got_k == raw(k));
  EXPECT_TRUE(got_v == raw(v));
  EXPECT_TRUE(got_ids == raw(ids));
  EXPECT_TRUE(got_samples == raw(samples));
  EXPECT_TRUE(got_positions == raw(positions));
}

TEST(ChannelTest, AnAppendStopsAtItsFirstRefusedPiece) {
  auto pieces = std::make_shared<std::atomic<int>>(0);
  FakeServer server({.serve = [pieces](const Request& r) {
    if (r.opcode == shm::Opcode::kCall) return Contexts();
    if (++*pieces < 2) return Answer{};
    return Answer{static_cast<uint32_t>(absl::StatusCode::kResourceExhausted), "full"};
  }});
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  std::vector<float> kv(300 * 2 * 16);
  AppendRequest append;
  append.context = {5};
  append.kv_heads = 2;
  append.range = {0, 300};
  append.k = append.v = kv.data();
  EXPECT_EQ((*client)->Append(append), absl::ResourceExhaustedError("full"));
  EXPECT_EQ(pieces->load(), 2);
}

// Leases bytes [offset, offset + 4096) of an extent of 8192.
FakeServer::Script Leasing(uint64_t offset) {
  return {.serve = [offset](const Request& r) {
    if (r.opcode != shm::Opcode::kLease) return Answer{};
    shm::LeaseReply reply{};
    reply.lease = 33;
    reply.extent = 2;
    reply.offset = offset;
    reply.bytes = 4096;
    return Answer{.payload = Raw(reply)};
  }};
}

bool Released(const FakeServer& server, uint64_t lease) {
  for (const Request& r : server.requests()) {
    if (r.opcode == shm::Opcode::kRelease &&
        PodAt<shm::ReleaseHeader>(r.payload).lease == lease) {
      return true;
    }
  }
  return false;
}

TEST(LeaseTest, ALeaseIsReleasedAndItsExtentMappedOnce) {
  FakeServer server(Leasing(4096));
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  for (int i = 0; i < 3; ++i) {
    auto block = (*client)->Lease("vllm", "key");
    ASSERT_TRUE(block.ok()) << block.status();
    EXPECT_EQ((*block)->bytes().size(), 4096u);
  }
  EXPECT_EQ(server.extents_asked(), 1u);
  EXPECT_TRUE(Eventually([&] { return Released(server, 33); }));
}

TEST(LeaseTest, AnExtentThatTheDaemonGaveBackIsUnmappedOnceNoBlockInItIsLeased) {
  std::atomic<uint32_t> extent{2};
  FakeServer::Script script = Leasing(0);
  script.serve = [&, serve = script.serve](const Request& r) {
    Answer answer = serve(r);
    if (r.opcode != shm::Opcode::kLease) return answer;
    auto reply = PodAt<shm::LeaseReply>(answer.payload);
    reply.extent = extent;
    return Answer{.payload = Raw(reply)};
  };
  script.extent_gone = [&](uint32_t asked) { return asked == 2 && extent > 2; };
  FakeServer server(std::move(script));
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  auto held = (*client)->Lease("vllm", "key");
  ASSERT_TRUE(held.ok()) << held.status();
  extent = 3;
  ASSERT_TRUE((*client)->Lease("vllm", "key").ok());
  EXPECT_EQ(server.extents_asked(), 2u);           // 2 is leased: not asked for again
  EXPECT_EQ((*held)->bytes().front(), std::byte{});  // and still there
  held->reset();
  extent = 4;
  ASSERT_TRUE((*client)->Lease("vllm", "key").ok());
  EXPECT_EQ(server.extents_asked(), 5u);  // 4, and 2 and 3 again: 2 has gone
  extent = 3;
  ASSERT_TRUE((*client)->Lease("vllm", "key").ok());
  EXPECT_EQ(server.extents_asked(), 5u);  // 3 is kept
  extent = 2;
  EXPECT_EQ((*client)->Lease("vllm", "key").ok(), true);
  EXPECT_EQ(server.extents_asked(), 8u);  // 2 is mapped anew, 3 and 4 are asked for
}

TEST(LeaseTest, APendingLeaseThatIsDroppedIsGivenBack) {
  FakeServer server(Leasing(4096));
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  auto pending = (*client)->LeaseAsync("vllm", "key");
  ASSERT_TRUE(pending.ok()) << pending.status();
  pending->reset();
  EXPECT_TRUE(Eventually([&] { return Released(server, 33); }));
}

TEST(LeaseTest, BytesThatDoNotHaveTheirDigestAreDataLoss) {
  FakeServer server(Leasing(0));  // says digest 0
  auto client = Connect(server);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_EQ((*client)->Get("vllm", "key").status().code(), absl::StatusCode::kDataLoss);
}

TEST(LeaseTest, ALeaseOutsideItsExtentIsDataLossAndIsGivenBack) {
  for (const uint64_t offset : {uint64_t{4097}, uint64_t{8192}, ~uint64_t{0} - 100}) {
    FakeServer server(Leasing(offset));
    auto client = Connect(server);
    ASSERT_TRUE(client.ok()) << client.status();
    const absl::Status status = (*client)->Lease("vllm", "key").status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    EXPECT_THAT(Text(status), HasSubstr("extent 2"));
    EXPECT_TRUE(Eventually([&] { return Released(server, 33); })) << offset;
  }
}

}  // namespace
}  // namespace quarry

// A channel to servers that die, stay silent or answer wrong. Deadlines are the client's own;
// nothing here sleeps for a fixed time.
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "client/channel.h"
#include "tests/client/scripted.h"

namespace quarry {
namespace {

using testing::Answer;
using testing::Connect;
using testing::Contexts;
using testing::Eventually;
using testing::FakeServer;
using testing::kLong;
using testing::kShape;
using testing::PodAt;
using testing::Raw;
using testing::Request;
using testing::Text;
using ::testing::HasSubstr;

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

}  // namespace
}  // namespace quarry

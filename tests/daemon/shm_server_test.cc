#include "daemon/shm_server.h"

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "tests/daemon/server_fixture.h"

namespace quarry::testing {
namespace {

using shm::Opcode;

class ShmServerTest : public ServerFixture {};

TEST_F(ShmServerTest, ANopIsAnswered) {
  StartServer();
  auto client = Connect();
  EXPECT_EQ(client->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
  EXPECT_EQ(client->Run(3, Opcode::kNop, 0), absl::StatusCode::kOk);
  EXPECT_EQ(counters().shm_requests[7], 2u);
  EXPECT_EQ(client->hello_reply().tenant, tenant());
}

TEST_F(ShmServerTest, TheRingGoesRoundManyTimes) {
  StartServer();
  auto client = Connect(RawShmClient::Hello(/*slots=*/2));
  for (int i = 0; i < 1000; ++i) {
    ASSERT_EQ(client->Run(i % 2, Opcode::kNop, 0), absl::StatusCode::kOk) << i;
  }
}

TEST_F(ShmServerTest, EntriesWithoutAUsableSlotCloseOnlyTheirChannel) {
  StartServer();
  auto other = Connect();
  const std::vector<RawShmClient::Entry> entries = {
      {4, Opcode::kNop, 0, 1},  // of 4 slots
      {~0u, Opcode::kNop, 0, 1},
      {0, Opcode::kNop, 0, 0},  // never a generation
      {0, Opcode::kNop, 0, ~0u},
  };
  for (const auto& entry : entries) {
    auto client = Connect();
    client->Submit(entry);
    EXPECT_TRUE(client->AwaitHangUp());
    EXPECT_EQ(client->header()->closing, 1u);
  }
  auto repeated = Connect();
  repeated->Submit({0, Opcode::kNop, 0, 7});
  ASSERT_TRUE(repeated->Await(0, 7).has_value());
  repeated->Submit({0, Opcode::kNop, 0, 7});
  EXPECT_TRUE(repeated->AwaitHangUp());
  auto skipping = Connect();
  skipping->ring()[0].sequence.store(6);
  skipping->RingDoorbell();
  EXPECT_TRUE(skipping->AwaitHangUp());
  EXPECT_EQ(counters().shm_channels_malformed, 6u);
  EXPECT_EQ(other->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
}

TEST_F(ShmServerTest, ASlotSubmittedTwiceClosesTheChannelAndTheAnswerInFlightIsHarmless) {
  StartServer();
  auto client = Connect();
  engine_.HoldAttends(true);
  const uint64_t context = OpenContext(*client);
  const uint64_t bytes = WriteAttend(*client, 0, context, 1);
  client->Submit({0, Opcode::kAttend, bytes, 1});
  ASSERT_TRUE(Eventually([&] { return engine_.held() == 1; }));
  client->Submit({0, Opcode::kAttend, bytes, 2});
  EXPECT_TRUE(client->AwaitHangUp());
  client.reset();
  engine_.ReleaseAttends();  // writes into memory that must still be mapped here
  EXPECT_TRUE(Eventually([&] { return engine_.sessions().empty(); }));
}

TEST_F(ShmServerTest, ADeadClientsSessionEndsAtOnceAlsoWithRequestsInFlight) {
  StartServer();
  auto other = Connect();
  auto client = Connect();
  const uint64_t session = client->hello_reply().session;
  engine_.HoldAttends(true);
  const uint64_t bytes = WriteAttend(*client, 0, OpenContext(*client), 1);
  client->Submit({0, Opcode::kAttend, bytes, 1});
  ASSERT_TRUE(Eventually([&] { return engine_.held() == 1; }));
  client.reset();
  EXPECT_TRUE(Eventually([&] { return !engine_.sessions().contains(session); }, absl::Seconds(1)));
  EXPECT_EQ(other->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
  engine_.ReleaseAttends();
}

TEST_F(ShmServerTest, ArmingKeepsThePollerAwakeForABoundedTimeOnly) {
  StartServer();
  auto client = Connect();
  client->header()->armed.store(1);
  client->RingDoorbell();
  EXPECT_TRUE(Eventually([&] { return engine_.armed(); }));
  // No traffic: it parks although we stay armed, and wakes for the next request.
  EXPECT_TRUE(Eventually([&] { return !engine_.armed(); }));
  EXPECT_TRUE(Eventually([&] { return client->header()->parked == 1; }));
  EXPECT_EQ(client->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
  EXPECT_TRUE(Eventually([&] { return !engine_.armed(); }));
  client->header()->armed.store(0);
}

TEST_F(ShmServerTest, ADeadArmedClientDoesNotKeepThePollerSpinning) {
  ShmOptions options = SmallOptions();
  options.armed_idle_ms = 10000;
  StartServer(options);
  auto other = Connect();
  auto client = Connect();
  client->header()->armed.store(1);
  client->RingDoorbell();
  ASSERT_TRUE(Eventually([&] { return engine_.armed(); }));
  client.reset();
  EXPECT_TRUE(Eventually([&] { return other->header()->parked == 1; }, absl::Seconds(1)));
  EXPECT_FALSE(engine_.armed());
}

TEST_F(ShmServerTest, AnIdleServerUsesNoProcessor) {
  StartServer();
  std::vector<std::unique_ptr<RawShmClient>> clients;
  for (int i = 0; i < 8; ++i) clients.push_back(Connect());
  ASSERT_TRUE(Eventually([&] { return clients[7]->header()->parked == 1; }));
  const uint64_t parks = counters().shm_parks;
  // Nothing happens, so nothing may wake it: the count of parks stands still.
  EXPECT_FALSE(Eventually([&] { return counters().shm_parks != parks; }, absl::Milliseconds(300)));
}

TEST_F(ShmServerTest, NoWakeUpIsLostBetweenParkingAndSubmitting) {
  ShmOptions options = SmallOptions();
  options.linger_us = 0;  // park after every request
  StartServer(options);
  constexpr int kClients = 3, kRequests = 4000;
  std::vector<std::thread> threads;
  std::atomic<int> failures{0};
  for (int c = 0; c < kClients; ++c) {
    threads.emplace_back([&, c] {
      auto client = Connect();
      uint32_t spin = static_cast<uint32_t>(c) * 977 + 1;
      for (int i = 0; i < kRequests && failures == 0; ++i) {
        // Waits of varying length hit the moments around parking.
        spin = spin * 1664525 + 1013904223;
        for (uint32_t k = 0; k < spin >> 22; ++k) asm volatile("");
        if (client->Run(i % 4, Opcode::kNop, 0) != absl::StatusCode::kOk) ++failures;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
  EXPECT_GT(counters().shm_parks, 1000u);
}

TEST_F(ShmServerTest, DrainFinishesWhatIsInFlightAndRefusesTheRest) {
  StartServer();
  auto client = Connect();
  engine_.HoldAttends(true);
  const uint64_t bytes = WriteAttend(*client, 0, OpenContext(*client), 1);
  client->Submit({0, Opcode::kAttend, bytes, 1});
  ASSERT_TRUE(Eventually([&] { return engine_.held() == 1; }));
  draining_ = true;
  server_->BeginDrain();
  EXPECT_TRUE(Eventually([&] { return client->header()->closing == 1; }));
  EXPECT_EQ(client->Run(1, Opcode::kNop, 0), absl::StatusCode::kUnavailable);
  EXPECT_EQ(RawShmClient::Connect(socket_path()).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(server_->AwaitDrained(absl::Now() + absl::Milliseconds(20)));
  engine_.ReleaseAttends();
  EXPECT_EQ(client->Await(0, 1), absl::StatusCode::kOk);
  EXPECT_TRUE(server_->AwaitDrained(absl::Now() + kPatience));
}

TEST_F(ShmServerTest, ASecondServerOnTheSocketIsRefused) {
  StartServer();
  ShmOptions options = SmallOptions();
  options.socket = socket_path();
  const auto second = ShmServer::Start(options, parts_, *tenants_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Connect()->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
}

}  // namespace
}  // namespace quarry::testing

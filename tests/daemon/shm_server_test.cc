#include "daemon/shm_server.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <thread>

#include "gmock/gmock.h"
#include "tests/daemon/other_user.h"
#include "tests/daemon/server_fixture.h"

namespace quarry::testing {
namespace {

using shm::Opcode;
using ::testing::HasSubstr;

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

TEST_F(ShmServerTest, AClientOfAnotherVersionIsRefusedWithTheRange) {
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

TEST_F(ShmServerTest, GarbageAndWrongSizesInsteadOfHelloAreRefused) {
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

TEST_F(ShmServerTest, ASilentConnectionIsClosedAndCostsNobodyAnything) {
  StartServer();
  auto silent = RawShmClient::Dial(socket_path());
  ASSERT_TRUE(silent.ok());
  auto client = Connect();
  char byte;
  EXPECT_EQ(recv(silent->get(), &byte, 1, 0), 0);  // the daemon's hang-up
  EXPECT_EQ(client->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
}

TEST_F(ShmServerTest, SilentConnectionsOfOneUserDoNotKeepOthersOut) {
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

TEST_F(ShmServerTest, ChannelsAreLimited) {
  ShmOptions options = SmallOptions();
  options.max_channels = 2;
  StartServer(options);
  auto a = Connect(), b = Connect();
  const auto c = RawShmClient::Connect(socket_path());
  EXPECT_EQ(c.status().code(), absl::StatusCode::kResourceExhausted);
  a.reset();
  EXPECT_TRUE(Eventually([&] { return RawShmClient::Connect(socket_path()).ok(); }));
}

TEST_F(ShmServerTest, ChannelMemoryIsLimited) {
  ShmOptions options = SmallOptions();
  options.max_total_bytes = 1 << 20;
  StartServer(options);
  auto a = Connect(RawShmClient::Hello(4, 128 << 10));
  const auto b = RawShmClient::Connect(socket_path(), RawShmClient::Hello(4, 128 << 10));
  EXPECT_EQ(b.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(b.status().message()), HasSubstr("shm.max_total_bytes"));
}

TEST_F(ShmServerTest, UnknownUsersAreRefusedWhenConfigured) {
  PeerTenantOptions tenants;
  tenants.refuse_unknown_users = true;
  StartServer(SmallOptions(), {}, tenants);
  EXPECT_EQ(RawShmClient::Connect(socket_path()).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(ShmServerTest, TheChannelsMemoryCannotBeResized) {
  StartServer();
  auto client = Connect();
  EXPECT_NE(ftruncate(client->memory_fd(), 0), 0);
  EXPECT_NE(ftruncate(client->memory_fd(), 1 << 30), 0);
  EXPECT_NE(fcntl(client->memory_fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
  const int seals = fcntl(client->memory_fd(), F_GET_SEALS);
  EXPECT_EQ(seals & (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL),
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
}

TEST_F(ShmServerTest, PunchingHolesIntoTheChannelHarmsNobody) {
  StartServer();
  auto client = Connect();
  auto other = Connect();
  ASSERT_EQ(fallocate(client->memory_fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                      static_cast<off_t>(client->hello_reply().channel_bytes)),
            0);
  client->RingDoorbell();
  EXPECT_EQ(other->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
}

TEST_F(ShmServerTest, AttendIsAnsweredRowByRow) {
  StartServer();
  auto client = Connect(RawShmClient::Hello(4, 256 << 10));
  const uint64_t context = OpenContext(*client);
  const uint32_t generation = client->NextGeneration(1);
  const uint64_t bytes = WriteAttend(*client, 1, context, 3, /*layer=*/1);
  const auto rows = {RowOf(*client, 1, 0), RowOf(*client, 1, 1), RowOf(*client, 1, 2)};
  client->Submit({1, Opcode::kAttend, bytes, generation});
  ASSERT_EQ(client->Await(1, generation), absl::StatusCode::kOk);
  uint32_t r = 0;
  for (const shm::AttendRowPod& row : rows) {
    const shm::AttendAnswerPod answer = AnswerOf(*client, 1, r);
    EXPECT_EQ(answer.status, 0u);
    EXPECT_EQ(answer.generation, generation);
    EXPECT_EQ(answer.covered_hi, 10u);
    EXPECT_EQ(answer.tokens_attended, 40u);
    const auto* o = reinterpret_cast<const float*>(client->slot(1) + row.o_offset);
    for (int i = 0; i < 64; ++i) {
      ASSERT_EQ(o[i], static_cast<float>(r) + static_cast<float>(i) / 16 + 1.0f);
    }
    ++r;
  }
  EXPECT_EQ(metrics_.Flat().at("quarry_shm_attend_latency_seconds_count"), 1);
}

TEST_F(ShmServerTest, ARowOverNoTokensHasNeitherQueriesNorOutputs) {
  StartServer();
  auto client = Connect(RawShmClient::Hello(4, 256 << 10));
  const uint64_t context = OpenContext(*client);
  const uint32_t generation = client->NextGeneration(1);
  const uint64_t bytes = WriteAttend(*client, 1, context, 2);
  shm::AttendRowPod row = RowOf(*client, 1, 0);
  const uint64_t o_offset = row.o_offset;
  row.range_lo = row.range_hi = 7;
  row.q_offset = row.o_offset = row.lse_offset = ~0ull;
  SetRow(*client, 1, 0, row);
  std::memset(client->slot(1) + o_offset, 0xAB, 256);
  client->Submit({1, Opcode::kAttend, bytes, generation});
  ASSERT_EQ(client->Await(1, generation), absl::StatusCode::kOk);
  const shm::AttendAnswerPod answer = AnswerOf(*client, 1, 0);
  EXPECT_EQ(answer.status, 0u);
  EXPECT_EQ(answer.generation, generation);
  EXPECT_EQ(answer.covered_lo, 7u);
  EXPECT_EQ(answer.covered_hi, 7u);
  EXPECT_EQ(answer.tokens_attended, 0u);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(client->slot(1) + o_offset), 256),
            std::string(256, '\xAB'));
  EXPECT_EQ(AnswerOf(*client, 1, 1).tokens_attended, 40u);
}

TEST_F(ShmServerTest, AWrongRowGetsItsOwnStatusAndTheOthersAreAnswered) {
  StartServer();
  auto client = Connect(RawShmClient::Hello(4, 256 << 10));
  const uint64_t context = OpenContext(*client);
  const uint64_t slot_bytes = client->hello_reply().slot_bytes;
  using Change = std::function<void(shm::AttendRowPod&)>;
  const std::vector<std::pair<const char*, Change>> changes = {
      {"q past the slot", [&](auto& r) { r.q_offset = slot_bytes - 252; }},
      {"q far past the slot", [](auto& r) { r.q_offset = ~0ull - 3; }},
      {"q over the header", [](auto& r) { r.q_offset = 64; }},
      {"q unaligned", [](auto& r) { r.q_offset += 1; }},
      {"o over the rows", [](auto& r) { r.o_offset = shm::kSlotPayload; }},
      {"o past the slot", [&](auto& r) { r.o_offset = slot_bytes; }},
      {"lse unaligned", [](auto& r) { r.lse_offset += 2; }},
      {"lse past the slot", [&](auto& r) { r.lse_offset = slot_bytes - 8; }},
      {"k past the slot", [&](auto& r) { r.has_token = 1, r.k_offset = slot_bytes - 4; }},
      {"v missing", [](auto& r) { r.has_token = 1, r.k_offset = r.q_offset; }},
      {"has_token 2", [](auto& r) { r.has_token = 2; }},
      {"no heads", [](auto& r) { r.heads = 0; }},
      {"too many heads", [](auto& r) { r.heads = 6; }},
      {"heads overflow", [](auto& r) { r.first_head = 2, r.heads = ~0u - 1; }},
      {"half a group", [](auto& r) { r.heads = 1; }},
      {"unaligned group", [](auto& r) { r.first_head = 1, r.heads = 2; }},
      {"layer", [](auto& r) { r.layer = 2; }},
      {"inverted range", [](auto& r) { r.range_lo = 11; }},
      {"dtype", [](auto& r) { r.q_dtype = 0; }},
      {"budget", [](auto& r) { r.budget_kind = 6; }},
      {"merged", [](auto& r) { r.merged = 2; }},
      {"error of 0", [](auto& r) { r.budget_kind = 3, r.budget_amount = 0; }},
      {"beta below 0", [](auto& r) { r.budget_kind = 4, r.budget_amount = -1; }},
      {"a sample of 0", [](auto& r) { r.budget_kind = 5, r.budget_k = 0; }},
  };
  for (const auto& [name, change] : changes) {
    const uint64_t bytes = WriteAttend(*client, 0, context, 3);
    shm::AttendRowPod row = RowOf(*client, 0, 1);
    change(row);
    SetRow(*client, 0, 1, row);
    ASSERT_EQ(client->Run(0, Opcode::kAttend, bytes), absl::StatusCode::kOk) << name;
    EXPECT_EQ(AnswerOf(*client, 0, 0).status, 0u) << name;
    EXPECT_EQ(AnswerOf(*client, 0, 1).status,
              static_cast<uint32_t>(absl::StatusCode::kInvalidArgument))
        << name;
    EXPECT_EQ(AnswerOf(*client, 0, 2).status, 0u) << name;
  }
  const uint64_t bytes = WriteAttend(*client, 0, context, 2);
  shm::AttendRowPod row = RowOf(*client, 0, 0);
  row.context = context + 1000;
  SetRow(*client, 0, 0, row);
  ASSERT_EQ(client->Run(0, Opcode::kAttend, bytes), absl::StatusCode::kOk);
  EXPECT_EQ(AnswerOf(*client, 0, 0).status, static_cast<uint32_t>(absl::StatusCode::kNotFound));
  EXPECT_EQ(AnswerOf(*client, 0, 1).status, 0u);
}

TEST_F(ShmServerTest, AWrongMessageIsAnErrorWithItsReason) {
  StartServer();
  auto client = Connect();
  const uint64_t context = OpenContext(*client);
  for (const uint32_t rows : {0u, 1025u, ~0u}) {
    const uint64_t bytes = WriteAttend(*client, 0, context, 1);
    std::memcpy(client->payload(0), &rows, 4);
    EXPECT_EQ(client->Run(0, Opcode::kAttend, bytes), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(client->Response(0), HasSubstr(std::to_string(rows) + " rows"));
  }
  WriteAttend(*client, 0, context, 1);
  EXPECT_EQ(client->Run(0, Opcode::kAttend, 95), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client->Run(0, Opcode::kAttend, client->hello_reply().slot_bytes),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client->Run(0, Opcode::kNop, ~0ull), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client->Run(0, static_cast<Opcode>(99), 0), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client->Run(0, static_cast<Opcode>(0), 0), absl::StatusCode::kInvalidArgument);
  const uint32_t generation = client->NextGeneration(0);
  client->Submit({0, Opcode::kNop, 0, generation, /*flags=*/1});
  EXPECT_EQ(client->Await(0, generation), absl::StatusCode::kInvalidArgument);
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

TEST_F(ShmServerTest, ExtentsGoToTheirOwnTenantOnly) {
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

TEST_F(ShmServerTest, AMalformedSocketRequestClosesTheClient) {
  StartServer();
  for (const size_t bytes : {size_t{1}, size_t{8}, size_t{9}}) {
    auto client = Connect();
    const std::vector<char> garbage(bytes, 'x');
    ASSERT_EQ(send(client->socket(), garbage.data(), bytes, 0), static_cast<ssize_t>(bytes));
    EXPECT_TRUE(client->AwaitHangUp()) << bytes;
  }
}

TEST_F(ShmServerTest, AClientThatDoesNotReadItsSocketIsClosedAndOthersAreServed) {
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

TEST_F(ShmServerTest, BlockedBulkRequestsDoNotHoldUpThePollerAndAFullQueueIsRefused) {
  ShmOptions options = SmallOptions();
  options.bulk_threads = 1;
  options.bulk_queue = 2;
  options.bulk_queue_per_client = 2;
  StartServer(options);
  auto client = Connect(RawShmClient::Hello(8));
  auto other = Connect();
  const uint64_t context = OpenContext(*client);
  engine_.HoldAppends(true);
  const auto submit_append = [&](uint32_t slot) {
    shm::AppendHeader header{};
    header.context = context;
    header.kv_heads = 2;
    header.token_hi = 1;
    header.k_offset = header.v_offset = shm::kSlotPayload + sizeof(header);
    std::memcpy(client->payload(slot), &header, sizeof(header));
    const uint32_t generation = client->NextGeneration(slot);
    client->Submit({slot, Opcode::kAppend, sizeof(header) + 256, generation});
    return generation;
  };
  const uint32_t g0 = submit_append(0), g1 = submit_append(1), g2 = submit_append(2);
  EXPECT_EQ(client->Await(2, g2), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(client->Run(3, Opcode::kNop, 0), absl::StatusCode::kOk);
  EXPECT_EQ(other->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
  EXPECT_EQ(client->slot_header(0)->done, 0u);
  EXPECT_EQ(counters().shm_bulk_refused, 1u);
  engine_.HoldAppends(false);
  EXPECT_EQ(client->Await(0, g0), absl::StatusCode::kOk);
  EXPECT_EQ(client->Await(1, g1), absl::StatusCode::kOk);
}

TEST_F(ShmServerTest, AppendsAreParsedAndBoundsChecked) {
  StartServer();
  auto client = Connect();
  const uint64_t context = OpenContext(*client);
  const auto run = [&](auto change, uint64_t request_bytes = 4096) {
    shm::AppendHeader header{};
    header.context = context;
    header.layer = 1;
    header.kv_heads = 2;
    header.token_lo = 5;
    header.token_hi = 8;
    header.k_offset = 256;
    header.v_offset = 1024;
    header.new_token_ids = 3;
    header.ids_offset = 2048;
    change(header);
    std::memcpy(client->payload(0), &header, sizeof(header));
    return client->Run(0, Opcode::kAppend, request_bytes);
  };
  const auto bad = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(run([](auto&) {}), absl::StatusCode::kOk);
  EXPECT_EQ(engine_.appended().back(), std::to_string(context) + " layer 1 tokens 5-8 ids 3");
  EXPECT_EQ(run([](auto& h) { h.k_offset = 4096 + 128 - 383; }), bad);
  EXPECT_EQ(run([](auto& h) { h.v_offset = ~0ull; }), bad);
  EXPECT_EQ(run([](auto& h) { h.v_offset = 8; }), bad);
  EXPECT_EQ(run([](auto& h) { h.token_hi = ~0u; }), bad);
  EXPECT_EQ(run([](auto& h) { h.token_hi = 5; }), bad);
  EXPECT_EQ(run([](auto& h) { h.kv_heads = 0; }), bad);
  EXPECT_EQ(run([](auto& h) { h.kv_heads = 3; }), bad);
  EXPECT_EQ(run([](auto& h) { h.new_token_ids = ~0u; }), bad);
  EXPECT_EQ(run([](auto& h) { h.ids_offset = 2049; }), bad);
  EXPECT_EQ(run([](auto& h) {
              h.query_samples = ~0u;
              h.samples_offset = 256;
            }),
            bad);
  EXPECT_EQ(run([](auto& h) {
              h.query_samples = 1;
              h.samples_offset = 256;
              h.positions_offset = 2;
            }),
            bad);
  EXPECT_EQ(run([](auto& h) { h.context += 99; }), absl::StatusCode::kNotFound);
  EXPECT_EQ(run([](auto&) {}, sizeof(shm::AppendHeader) - 1), bad);
  EXPECT_EQ(run([](auto&) {}, 0), bad);
  EXPECT_EQ(engine_.appended().size(), 1u);
}

TEST_F(ShmServerTest, PutLeaseAndReleaseGoRound) {
  StartServer();
  auto client = Connect();
  shm::PutHeader put{};
  put.namespace_bytes = 2;
  put.key_bytes = 3;
  put.data_offset = 512;
  put.data_bytes = 1000;
  std::memcpy(client->payload(0), &put, sizeof(put));
  std::memcpy(client->payload(0) + sizeof(put), "nskey", 5);
  ASSERT_EQ(client->Run(0, Opcode::kPut, 2000), absl::StatusCode::kOk);
  shm::PutReply put_reply;
  std::memcpy(&put_reply, client->payload(0), sizeof(put_reply));
  EXPECT_EQ(put_reply.existed, 0u);
  EXPECT_EQ(put_reply.digest_low, 5u);

  shm::LeaseHeader lease{};
  lease.kind = static_cast<uint32_t>(shm::LeaseKind::kEngineKey);
  lease.namespace_bytes = 2;
  lease.key_bytes = 3;
  const auto write_lease = [&] {
    std::memcpy(client->payload(0), &lease, sizeof(lease));
    std::memcpy(client->payload(0) + sizeof(lease), "nskey", 5);
  };
  write_lease();
  ASSERT_EQ(client->Run(0, Opcode::kLease, sizeof(lease) + 5), absl::StatusCode::kOk);
  shm::LeaseReply reply;
  std::memcpy(&reply, client->payload(0), sizeof(reply));
  EXPECT_EQ(reply.bytes, 1000u);
  EXPECT_EQ(reply.digest_high, 4u);
  shm::ReleaseHeader release{reply.lease};
  std::memcpy(client->payload(0), &release, sizeof(release));
  EXPECT_EQ(client->Run(0, Opcode::kRelease, sizeof(release)), absl::StatusCode::kOk);

  lease.key_bytes = 4;  // past the request
  write_lease();
  EXPECT_EQ(client->Run(0, Opcode::kLease, sizeof(lease) + 5), absl::StatusCode::kInvalidArgument);
  lease.key_bytes = ~0u;
  write_lease();
  EXPECT_EQ(client->Run(0, Opcode::kLease, sizeof(lease) + 5), absl::StatusCode::kInvalidArgument);
  lease.key_bytes = 2;
  write_lease();
  EXPECT_EQ(client->Run(0, Opcode::kLease, sizeof(lease) + 5), absl::StatusCode::kNotFound);
  lease.kind = 3;
  write_lease();
  EXPECT_EQ(client->Run(0, Opcode::kLease, sizeof(lease) + 5), absl::StatusCode::kInvalidArgument);
  put.data_bytes = ~0ull - 4;
  std::memcpy(client->payload(0), &put, sizeof(put));
  EXPECT_EQ(client->Run(0, Opcode::kPut, 2000), absl::StatusCode::kInvalidArgument);
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
  EXPECT_TRUE(server_->AwaitDrained(absl::Now() + absl::Seconds(10)));
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

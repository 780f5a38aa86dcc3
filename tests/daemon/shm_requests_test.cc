// Requests as clients write them into their slots: read, checked against the slot, and answered.
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "tests/daemon/server_fixture.h"

namespace quarry::testing {
namespace {

using shm::Opcode;
using ::testing::HasSubstr;

class ShmRequestsTest : public ServerFixture {};

TEST_F(ShmRequestsTest, AttendIsAnsweredRowByRow) {
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

TEST_F(ShmRequestsTest, ARowOverNoTokensHasNeitherQueriesNorOutputs) {
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

TEST_F(ShmRequestsTest, AWrongRowGetsItsOwnStatusAndTheOthersAreAnswered) {
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

TEST_F(ShmRequestsTest, AWrongMessageIsAnErrorWithItsReason) {
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

TEST_F(ShmRequestsTest, BlockedBulkRequestsDoNotHoldUpThePollerAndAFullQueueIsRefused) {
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

TEST_F(ShmRequestsTest, AppendsAreParsedAndBoundsChecked) {
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

TEST_F(ShmRequestsTest, PutLeaseAndReleaseGoRound) {
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

}  // namespace
}  // namespace quarry::testing

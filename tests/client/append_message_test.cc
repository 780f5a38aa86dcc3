// Appends that are larger than a slot.
#include <memory>
#include <string>
#include <vector>

#include "tests/client/scripted.h"

namespace quarry {
namespace {

using testing::Answer;
using testing::Connect;
using testing::Contexts;
using testing::FakeServer;
using testing::PodAt;
using testing::Request;

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

}  // namespace
}  // namespace quarry

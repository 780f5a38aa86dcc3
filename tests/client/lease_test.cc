// Leases from a scripted server: what is mapped, released and believed.
#include <atomic>
#include <memory>
#include <utility>

#include "tests/client/scripted.h"

namespace quarry {
namespace {

using testing::Answer;
using testing::Connect;
using testing::Eventually;
using testing::FakeServer;
using ::testing::HasSubstr;
using testing::PodAt;
using testing::Raw;
using testing::Request;
using testing::Text;

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
    if (r.opcode == shm::Opcode::kRelease && PodAt<shm::ReleaseHeader>(r.payload).lease == lease) {
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
  EXPECT_EQ(server.extents_asked(), 2u);             // 2 is leased: not asked for again
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

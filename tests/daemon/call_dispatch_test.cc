#include "daemon/call_dispatch.h"

#include "daemon/call_handlers.h"
#include "gmock/gmock.h"
#include "proto/convert.h"
#include "proto/shm_layout.h"
#include "tests/daemon/server_fixture.h"

namespace quarry::testing {
namespace {

using shm::Method;
using ::testing::HasSubstr;

class CallDispatchTest : public ServerFixture {
 protected:
  void SetUp() override {
    caller_.session = *engine_.StartSession("alice", "test");
    caller_.peer.tenant = "alice";
    caller_.max_reply_bytes = 1 << 20;
  }

  template <typename Reply, typename Request>
  absl::StatusOr<Reply> Run(Method method, const Request& request) {
    const auto bytes =
        DispatchCall(parts_, caller_, static_cast<uint32_t>(method), request.SerializeAsString());
    if (!bytes.ok()) return bytes.status();
    Reply reply;
    EXPECT_TRUE(reply.ParseFromString(*bytes));
    return reply;
  }

  uint64_t OpenOne(uint32_t max_tokens = 64) {
    OpenRequest request;
    request.spec.shape = FakeShape();
    request.max_tokens = max_tokens;
    const auto reply = Run<v1::OpenReply>(Method::kOpen, ToProto(request));
    EXPECT_TRUE(reply.ok()) << reply.status();
    return reply.ok() ? reply->context() : 0;
  }

  Caller caller_;
};

TEST_F(CallDispatchTest, ContextMethodsReachTheEngine) {
  const uint64_t context = OpenOne();
  v1::SealRequest seal;
  seal.set_context(context);
  EXPECT_EQ(Run<v1::SealReply>(Method::kSeal, seal)->info().model(), "fake");
  v1::ForkRequest fork;
  fork.set_context(context);
  fork.set_max_tokens(128);
  EXPECT_NE(Run<v1::ForkReply>(Method::kFork, fork)->context(), context);
  EXPECT_EQ(
      Run<v1::ListContextsReply>(Method::kListContexts, v1::ListContextsRequest())->contexts_size(),
      2);
  v1::DeclareTokensRequest declare;
  declare.set_context(context);
  declare.add_tokens(1);
  EXPECT_TRUE(Run<v1::DeclareTokensReply>(Method::kDeclareTokens, declare).ok());
  v1::CloseRequest close;
  close.set_context(context);
  EXPECT_TRUE(Run<v1::CloseReply>(Method::kClose, close).ok());
  EXPECT_EQ(Run<v1::CloseReply>(Method::kClose, close).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(CallDispatchTest, ReadReturnsBothPartsAndRefusesWhatDoesNotFit) {
  v1::ReadRequest read;
  read.set_context(OpenOne());
  read.set_layer(1);
  read.mutable_range()->set_lo(2);
  read.mutable_range()->set_hi(5);
  const auto reply = Run<v1::ReadReply>(Method::kRead, read);
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->k(), std::string(3 * 2 * 16 * 4, 'l'));
  EXPECT_EQ(reply->v(), std::string(3 * 2 * 16 * 4, 'w'));
  caller_.max_reply_bytes = 700;
  EXPECT_EQ(Run<v1::ReadReply>(Method::kRead, read).status().code(),
            absl::StatusCode::kResourceExhausted);
  read.mutable_range()->set_hi(0xffffffff);
  EXPECT_EQ(Run<v1::ReadReply>(Method::kRead, read).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(CallDispatchTest, BlockMethodsReachTheEngine) {
  ASSERT_TRUE(engine_.Put(caller_.session, "ns", "key", {}, std::nullopt).ok());
  v1::ExistsRequest exists;
  exists.set_engine_namespace("ns");
  exists.add_keys("key");
  exists.add_keys("other");
  const auto reply = Run<v1::ExistsReply>(Method::kExists, exists);
  ASSERT_EQ(reply->exists_size(), 2);
  EXPECT_TRUE(reply->exists(0));
  EXPECT_FALSE(reply->exists(1));
  exists.add_keys(std::string(257, 'x'));
  EXPECT_THAT(std::string(Run<v1::ExistsReply>(Method::kExists, exists).status().message()),
              HasSubstr("key 2 has 257 bytes"));
  v1::PinRequest pin;
  pin.set_name("p");
  pin.add_blocks(std::string(32, 'b'));
  EXPECT_EQ(Run<v1::PinReply>(Method::kPin, pin)->bytes(), 1000u);
  v1::UnpinRequest unpin;
  unpin.set_name("unknown");
  EXPECT_EQ(Run<v1::UnpinReply>(Method::kUnpin, unpin).status().code(),
            absl::StatusCode::kNotFound);
  v1::PurgeRequest purge;
  purge.add_blocks(std::string(32, 'b'));
  EXPECT_EQ(Run<v1::PurgeReply>(Method::kPurge, purge)->blocks(), 1u);
  OpenRequest open;
  open.spec.shape = FakeShape();
  open.tokens = {1, 2, 3};
  v1::PrefetchRequest prefetch;
  *prefetch.mutable_open() = ToProto(open);
  EXPECT_EQ(Run<v1::PrefetchReply>(Method::kPrefetch, prefetch)->blocks(), 3u);
  v1::FlushRequest flush;
  flush.add_blocks(std::string(32, 'b'));
  EXPECT_EQ(Run<v1::FlushReply>(Method::kFlush, flush)->durable_blocks(), 1u);
  EXPECT_EQ(
      Run<v1::ListBlocksReply>(Method::kListBlocks, v1::ListBlocksRequest())->blocks(0).state(),
      "PUBLISHED");
}

TEST_F(CallDispatchTest, TopKChecksTheRowAgainstTheContext) {
  v1::TopKRequest request;
  v1::AttendRow& row = *request.mutable_row();
  row.set_context(OpenOne());
  row.mutable_range()->set_hi(10);
  row.set_heads(4);
  row.set_q_dtype(v1::DTYPE_FP32);
  row.set_q(std::string(4 * 16 * 4, '\0'));
  request.set_k(3);
  const auto reply = Run<v1::TopKReply>(Method::kTopK, request);
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->heads_size(), 4);
  EXPECT_EQ(reply->heads(0).tokens_size(), 3);
  row.set_q("short");
  EXPECT_EQ(Run<v1::TopKReply>(Method::kTopK, request).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(CallDispatchTest, StatusAndStatisticsDescribeTheDaemonAndTheCaller) {
  const auto status = Run<v1::StatusReply>(Method::kStatus, v1::StatusRequest());
  EXPECT_EQ(status->tenant(), "alice");
  EXPECT_EQ(status->version(), "test");
  EXPECT_EQ(status->pid(), static_cast<uint64_t>(getpid()));
  EXPECT_FALSE(status->draining());
  const auto statistics = Run<v1::StatisticsReply>(Method::kStatistics, v1::StatisticsRequest());
  EXPECT_EQ(statistics->values().at("quarry_engine_sessions_count"), 1);
}

TEST_F(CallDispatchTest, AuditsAreThoseOfTheSessionsTenant) {
  const auto audit = Run<v1::AuditReply>(Method::kAudit, v1::AuditRequest());
  ASSERT_TRUE(audit.ok()) << audit.status();
  ASSERT_EQ(audit->heads_size(), 1);
  EXPECT_EQ(audit->heads(0).model(), "model of alice");
  EXPECT_EQ(audit->heads(0).layer(), 3u);
  EXPECT_EQ(audit->heads(0).audits(), 4u);
  caller_.session = *engine_.StartSession("bob", "test");
  EXPECT_EQ(Run<v1::AuditReply>(Method::kAudit, v1::AuditRequest())->heads(0).model(),
            "model of bob");
  caller_.session = SessionId{999};
  EXPECT_EQ(Run<v1::AuditReply>(Method::kAudit, v1::AuditRequest()).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(CallDispatchTest, OnlyAnAdministratorDrains) {
  EXPECT_EQ(Run<v1::DrainReply>(Method::kDrain, v1::DrainRequest()).status().code(),
            absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(drain_requests_, 0);
  caller_.peer.admin = true;
  EXPECT_TRUE(Run<v1::DrainReply>(Method::kDrain, v1::DrainRequest()).ok());
  EXPECT_EQ(drain_requests_, 1);
}

TEST_F(CallDispatchTest, UnknownMethodsAndBrokenMessagesAreRefused) {
  for (const uint32_t method : {0u, 21u, ~0u}) {
    EXPECT_EQ(DispatchCall(parts_, caller_, method, "").status().code(),
              absl::StatusCode::kUnimplemented);
  }
  for (uint32_t method = 1; method <= 20; ++method) {
    EXPECT_EQ(DispatchCall(parts_, caller_, method, "\xff\xff\xff").status().code(),
              absl::StatusCode::kInvalidArgument)
        << method;
  }
}

TEST_F(CallDispatchTest, ACallOverSharedMemoryIsTheSameCall) {
  StartServer();
  auto client = Connect();
  const shm::CallHeader header{static_cast<uint32_t>(Method::kStatus), 0};
  std::memcpy(client->payload(0), &header, sizeof(header));
  ASSERT_EQ(client->Run(0, shm::Opcode::kCall, sizeof(header)), absl::StatusCode::kOk);
  v1::StatusReply reply;
  ASSERT_TRUE(reply.ParseFromString(client->Response(0)));
  EXPECT_EQ(reply.tenant(), tenant());
}

}  // namespace
}  // namespace quarry::testing

// Reuse at another position through the real daemon: asked for, placed and flagged on every
// transport.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "proto/convert.h"
#include "tests/daemon/raw_shm_client.h"
#include "tests/support/daemon_process.h"
#include "tests/support/grpc_session.h"
#include "tests/support/kv_client.h"

namespace quarry {
namespace {

using testing::DaemonProcess;
using testing::GrpcSession;
using testing::KvData;
using testing::OneRow;
using testing::RawShmClient;

constexpr uint32_t kFirstText = 512, kSecondText = 256, kDocument = 512, kRest = 100;
constexpr uint32_t kTotal = kSecondText + kDocument + kRest;
constexpr ShiftedRange kMoved = {{kSecondText, kSecondText + kDocument}, -256};

class ShiftedReuseTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::DaemonOptions options;
    options.arguments = {"--arena-bytes", "256MiB"};
    auto daemon = DaemonProcess::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    auto client = testing::ConnectTo(daemon_->socket_path());
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    // The document behind the first text.
    const KvData cached(spec_.shape, kFirstText + kDocument + 1, 21);
    const auto opened = client_->Open(testing::OpenFor(spec_, cached, 1200));
    ASSERT_TRUE(opened.ok()) << opened.status();
    ASSERT_TRUE(testing::AppendTokens(client_.get(), opened->context, cached, 0,
                                      static_cast<uint32_t>(cached.tokens.size()))
                    .ok());
    ASSERT_TRUE(client_->Seal(opened->context).ok());
    // And behind the second; keys turned in double. fp32 keeps what is compared apart from
    // rounding.
    std::copy_n(cached.tokens.begin() + kFirstText, kDocument, data_.tokens.begin() + kSecondText);
    wanted_ = std::make_unique<KvData>(data_);
    for (uint32_t layer = 0; layer < spec_.shape.layers; ++layer) {
      for (uint32_t t = kMoved.tokens.lo; t < kMoved.tokens.hi; ++t) {
        for (uint32_t h = 0; h < spec_.shape.kv_heads; ++h) MoveVector(cached, layer, t, h);
      }
    }
  }

  void MoveVector(const KvData& from, uint32_t layer, uint32_t token, uint32_t h) {
    const uint32_t pairs = spec_.rope.rotary_dim / 2, source = token - kMoved.shift;
    const char* const key = from.k[layer].data() + from.offset(source, h);
    char* const to = wanted_->k[layer].data() + wanted_->offset(token, h);
    for (uint32_t i = 0; i < pairs; ++i) {
      const double angle = double{spec_.rope.inv_freq[i]} * kMoved.shift;
      const double a = LoadAsFloat(key, i, DType::kFp32);
      const double b = LoadAsFloat(key, i + pairs, DType::kFp32);
      StoreFromFloat(to, i, DType::kFp32,
                     static_cast<float>(a * std::cos(angle) - b * std::sin(angle)));
      StoreFromFloat(to, i + pairs, DType::kFp32,
                     static_cast<float>(b * std::cos(angle) + a * std::sin(angle)));
    }
    std::memcpy(wanted_->v[layer].data() + wanted_->offset(token, h),
                from.v[layer].data() + from.offset(source, h), from.shape.vector_bytes());
  }

  OpenRequest Asking() const {
    OpenRequest request = testing::OpenFor(spec_, data_, 1200);
    request.reuse_shifted = true;
    return request;
  }
  // Appends what the context does not have.
  void Fill(ContextId context) {
    ASSERT_TRUE(testing::AppendTokens(client_.get(), context, data_, 0, kMoved.tokens.lo).ok());
    ASSERT_TRUE(
        testing::AppendTokens(client_.get(), context, data_, kMoved.tokens.hi, kTotal).ok());
  }
  ContextId OpenAndFill() {
    const auto opened = client_->Open(Asking());
    EXPECT_TRUE(opened.ok()) << opened.status();
    if (!opened.ok()) return {};
    EXPECT_EQ(opened->reused_tokens, 0u);
    EXPECT_EQ(opened->shifted, std::vector<ShiftedRange>{kMoved});
    Fill(opened->context);
    return opened->context;
  }

  const ModelSpec spec_ = testing::SmallSpec(DType::kFp32);
  KvData data_{spec_.shape, kTotal, 22};
  std::unique_ptr<KvData> wanted_;
  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<Client> client_;
};

TEST_F(ShiftedReuseTest, AnswersOverSharedMemoryAreFlagged) {
  const ContextId context = OpenAndFill();
  OneRow row(spec_.shape, context, 1, {10, kTotal}, 5);
  ASSERT_TRUE(row.Run(client_.get()).ok());
  EXPECT_EQ(row.answer.shifted_tokens, kDocument);
  EXPECT_LT(row.Error(*wanted_), 1e-4);
  OneRow before(spec_.shape, context, 1, {10, kSecondText}, 5);
  ASSERT_TRUE(before.Run(client_.get()).ok());
  EXPECT_EQ(before.answer.shifted_tokens, 0u);
  const auto contexts = client_->ListContexts();
  ASSERT_TRUE(contexts.ok());
  EXPECT_EQ(contexts->back().shifted_tokens, kDocument);
}

TEST_F(ShiftedReuseTest, AnswersOverGrpcAreFlagged) {
  const GrpcSession grpc(daemon_->grpc_path());
  wire::OpenReply opened;
  ASSERT_TRUE(grpc.kv->Open(grpc.Context().get(), ToProto(Asking()), &opened).ok());
  ASSERT_EQ(opened.shifted_size(), 1);
  EXPECT_EQ(opened.shifted(0).tokens().lo(), kMoved.tokens.lo);
  EXPECT_EQ(opened.shifted(0).shift(), kMoved.shift);
  Fill({opened.context()});
  const OneRow row(spec_.shape, {opened.context()}, 1, {10, kTotal}, 5);
  wire::AttendRequest request;
  *request.add_rows() =
      ToProto(row.row, spec_.shape.head_dim, spec_.shape.group(), spec_.shape.dtype);
  wire::AttendReply reply;
  ASSERT_TRUE(grpc.retrieval->Attend(grpc.Context().get(), request, &reply).ok());
  ASSERT_EQ(reply.answers_size(), 1);
  EXPECT_EQ(reply.answers(0).status(), 0u) << reply.answers(0).error();
  EXPECT_EQ(reply.answers(0).shifted_tokens(), kDocument);
  OneRow same(spec_.shape, {opened.context()}, 1, {10, kTotal}, 5);
  ASSERT_TRUE(FromProto(reply.answers(0), &same.answer).ok());
  EXPECT_LT(same.Error(*wanted_), 1e-4);
}

// A channel whose answers have no room for the flag neither opens such contexts nor attends them.
TEST_F(ShiftedReuseTest, ChannelsOfOlderVersionsAreRefused) {
  const ContextId context = OpenAndFill();
  for (const uint16_t version : {uint16_t{1}, uint16_t{2}}) {
    shm::HelloRequest hello = RawShmClient::Hello();
    hello.max_version = version;
    const auto old = RawShmClient::Connect(daemon_->socket_path(), hello);
    ASSERT_TRUE(old.ok()) << old.status();
    std::string message = ToProto(Asking()).SerializeAsString();
    const shm::CallHeader call{static_cast<uint32_t>(shm::Method::kOpen), 0};
    std::memcpy((*old)->payload(0), &call, sizeof(call));
    std::memcpy((*old)->payload(0) + sizeof(call), message.data(), message.size());
    EXPECT_EQ((*old)->Run(0, shm::Opcode::kCall, sizeof(call) + message.size()),
              absl::StatusCode::kFailedPrecondition);
    EXPECT_NE((*old)->Response(0).find("version 3"), std::string::npos) << (*old)->Response(0);

    const shm::AttendHeader header{1, 0};
    shm::AttendRowPod pod{};
    pod.context = context.value;
    pod.range_hi = 10;
    pod.heads = spec_.shape.heads;
    pod.q_dtype = static_cast<uint8_t>(DType::kFp32);
    const uint64_t q_bytes = uint64_t{spec_.shape.heads} * spec_.shape.head_dim * 4;
    pod.q_offset = shm::kSlotPayload + sizeof(header) + sizeof(pod);
    pod.o_offset = pod.q_offset + q_bytes;
    pod.lse_offset = pod.o_offset + q_bytes;
    std::memcpy((*old)->payload(1), &header, sizeof(header));
    std::memcpy((*old)->payload(1) + sizeof(header), &pod, sizeof(pod));
    EXPECT_EQ((*old)->Run(1, shm::Opcode::kAttend, sizeof(header) + sizeof(pod) + q_bytes),
              absl::StatusCode::kOk);
    shm::AttendAnswerPod answer;
    std::memcpy(&answer, (*old)->payload(1), sizeof(answer));
    EXPECT_EQ(answer.status, static_cast<uint32_t>(absl::StatusCode::kFailedPrecondition));
  }
}

TEST_F(ShiftedReuseTest, MetricsCountIt) {
  const ContextId context = OpenAndFill();
  OneRow row(spec_.shape, context, 1, {10, kTotal}, 5);
  ASSERT_TRUE(row.Run(client_.get()).ok());
  const auto statistics = client_->Statistics();
  ASSERT_TRUE(statistics.ok()) << statistics.status();
  EXPECT_EQ(statistics->at("quarry_context_shifted_tokens_total"), kDocument);
  EXPECT_EQ(statistics->at("quarry_attend_shifted_rows_total"), 1);
  EXPECT_EQ(statistics->at("quarry_context_reused_tokens_total"), 0);
}

}  // namespace
}  // namespace quarry

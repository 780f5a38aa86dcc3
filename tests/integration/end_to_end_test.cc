// The whole API through the real daemon: shared memory by the C++ client, gRPC beside it.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <span>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "proto/convert.h"
#include "tests/daemon/raw_shm_client.h"
#include "tests/support/daemon_process.h"
#include "tests/support/grpc_session.h"
#include "tests/support/kv_client.h"

namespace quarry {
namespace {

using testing::DaemonProcess;
using testing::GrpcSession;
using testing::OneRow;

class EndToEndTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::DaemonOptions options;
    options.arguments = {"--arena-bytes", "256MiB"};
    auto daemon = DaemonProcess::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    client_ = Connect();
  }
  std::unique_ptr<Client> Connect() const {
    auto client = testing::ConnectTo(daemon_->socket_path());
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }
  // A context with all of data_'s tokens.
  ContextId Fill(Client* client, uint32_t* reused = nullptr) {
    auto opened = client->Open(testing::OpenFor(spec_, data_, 2048));
    EXPECT_TRUE(opened.ok()) << opened.status();
    if (!opened.ok()) return {};
    if (reused != nullptr) *reused = opened->reused_tokens;
    const absl::Status appended =
        testing::AppendTokens(client, opened->context, data_, opened->reused_tokens, kTokens);
    EXPECT_TRUE(appended.ok()) << appended;
    return opened->context;
  }

  static constexpr uint32_t kTokens = 1000;
  ModelSpec spec_ = testing::SmallSpec();
  testing::KvData data_{spec_.shape, kTokens, 21};
  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<Client> client_;
};

TEST_F(EndToEndTest, ARefusedAppendDeclaresNoIdsSoThatItCanBeRetried) {
  OpenRequest open = testing::OpenFor(spec_, data_, 2048);
  const std::vector<uint32_t> ids = open.tokens;
  open.tokens.resize(1);  // the prompt's first id is known, the others come with the append
  open.inputs.clear();
  const auto opened = client_->Open(open);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const size_t bytes = kTokens * spec_.shape.kv_heads * spec_.shape.vector_bytes();
  std::vector<char> bad(data_.k[0].begin(), data_.k[0].begin() + static_cast<ptrdiff_t>(bytes));
  std::memset(bad.data() + bytes / 2, 0xFF, 64);  // NaN
  AppendRequest append;
  append.context = opened->context;
  append.kv_heads = spec_.shape.kv_heads;
  append.range = {0, kTokens};
  append.k = bad.data();
  append.v = data_.v[0].data();
  append.new_token_ids = std::span(ids).subspan(1);
  EXPECT_EQ(client_->Append(append).code(), absl::StatusCode::kInvalidArgument);
  append.k = data_.k[0].data();
  const absl::Status again = client_->Append(append);
  EXPECT_TRUE(again.ok()) << again;
  const auto contexts = client_->ListContexts();
  ASSERT_TRUE(contexts.ok() && contexts->size() == 1);
  EXPECT_EQ(contexts->front().known_tokens, kTokens);
}

TEST_F(EndToEndTest, AContextIsAppendedAttendedReadForkedSealedAndClosed) {
  const ContextId context = Fill(client_.get());
  for (const TokenRange range : {TokenRange{0, kTokens}, {0, 1}, {128, 488}, {999, 1000}}) {
    OneRow row(spec_.shape, context, 1, range, 5);
    ASSERT_TRUE(row.Run(client_.get()).ok()) << row.answer.status;
    EXPECT_EQ(row.answer.covered, range);
    EXPECT_LT(row.Error(data_), 1e-3);
  }
  const size_t bytes = 300 * spec_.shape.kv_heads * spec_.shape.vector_bytes();
  std::vector<std::byte> k(bytes), v(bytes);
  ASSERT_TRUE(client_->Read(context, 1, {200, 500}, k, v).ok());
  EXPECT_EQ(std::memcmp(k.data(), data_.k[1].data() + data_.offset(200), bytes), 0);
  EXPECT_EQ(std::memcmp(v.data(), data_.v[1].data() + data_.offset(200), bytes), 0);

  const auto fork = client_->Fork({context, 700, 1024, {}});
  ASSERT_TRUE(fork.ok()) << fork.status();
  OneRow forked(spec_.shape, *fork, 0, {0, 700}, 6);
  ASSERT_TRUE(forked.Run(client_.get()).ok());
  EXPECT_LT(forked.Error(data_), 1e-3);

  const auto sealed = client_->Seal(context);
  ASSERT_TRUE(sealed.ok()) << sealed.status();
  EXPECT_TRUE(sealed->sealed);
  EXPECT_EQ(client_->ListContexts()->size(), 2u);
  EXPECT_TRUE(client_->Close(context).ok());
  OneRow closed(spec_.shape, context, 0, {0, 1}, 7);
  EXPECT_EQ(closed.Run(client_.get()).code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(forked.Run(client_.get()).ok()) << "a fork outlives what it was forked from";
}

TEST_F(EndToEndTest, APrefixIsReusedByAnotherClientAfterTheFirstHasGone) {
  const ContextId context = Fill(client_.get());
  ASSERT_TRUE(client_->Seal(context).ok());
  client_.reset();
  auto second = Connect();
  uint32_t reused = 0;
  const ContextId again = Fill(second.get(), &reused);
  EXPECT_EQ(reused, kTokens / kBlockTokens * kBlockTokens);
  OneRow row(spec_.shape, again, 0, {0, kTokens}, 8);
  ASSERT_TRUE(row.Run(second.get()).ok());
  EXPECT_LT(row.Error(data_), 1e-3);
}

TEST_F(EndToEndTest, OpaqueBlocksArePutLeasedReadPinnedAndPurged) {
  std::string block(300'000, '\0');
  for (size_t i = 0; i < block.size(); ++i) block[i] = static_cast<char>(i * 7 >> 2);
  ASSERT_TRUE(client_->Put("engine", "key", std::as_bytes(std::span(block))).ok());
  EXPECT_TRUE(*client_->Get("engine", "key") == block);
  const std::vector<std::string> keys = {"key", "other"};
  EXPECT_EQ(*client_->Exists("engine", keys), (std::vector<bool>{true, false}));
  {
    auto lease = client_->Lease("engine", "key");
    ASSERT_TRUE(lease.ok()) << lease.status();
    EXPECT_TRUE((*lease)->Verify().ok());
    EXPECT_EQ(std::memcmp((*lease)->bytes().data(), block.data(), block.size()), 0);
  }
  {
    auto ahead = client_->LeaseAsync("engine", "key");
    auto miss = client_->LeaseAsync("engine", "other");
    ASSERT_TRUE(ahead.ok() && miss.ok()) << ahead.status() << miss.status();
    const auto lease = (*ahead)->Wait();
    ASSERT_TRUE(lease.ok()) << lease.status();
    EXPECT_TRUE((*lease)->Verify().ok());
    EXPECT_EQ((*ahead)->Wait().status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ((*miss)->Wait().status().code(), absl::StatusCode::kNotFound);
  }
  EXPECT_EQ(client_->Get("engine", "other").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(client_->Lease("other", "key").status().code(), absl::StatusCode::kNotFound);

  const ContextId context = Fill(client_.get());
  ASSERT_TRUE(client_->Seal(context).ok());
  PinRequest pin;
  pin.name = "keep";
  pin.context = context;
  const auto pinned = client_->Pin(pin);
  ASSERT_TRUE(pinned.ok()) << pinned.status();
  EXPECT_EQ(*pinned, kTokens / kBlockTokens * spec_.shape.block_bytes());
  EXPECT_TRUE(client_->Unpin("keep").ok());
  EXPECT_EQ(client_->Unpin("keep").code(), absl::StatusCode::kNotFound);
  PurgeRequest purge;
  purge.whole_tenant = true;
  const auto purged = client_->Purge(purge);
  ASSERT_TRUE(purged.ok()) << purged.status();
  EXPECT_GE(*purged, 4u);
  EXPECT_EQ(client_->Get("engine", "key").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(EndToEndTest, TheDescriptorOfAnExtentCannotBeWrittenThrough) {
  ASSERT_TRUE(client_->Seal(Fill(client_.get())).ok());
  auto lease = client_->LeaseContextBlock(client_->ListContexts()->front().context, 0);
  ASSERT_TRUE(lease.ok()) << lease.status();
  // Another client of the same tenant may ask for the same extents; it keeps the descriptors.
  auto raw = testing::RawShmClient::Connect(daemon_->socket_path());
  ASSERT_TRUE(raw.ok()) << raw.status();
  int given = 0;
  for (uint32_t extent = 0; extent < 64; ++extent) {
    const auto answer = (*raw)->AskExtent(extent);
    ASSERT_TRUE(answer.has_value());
    if (answer->reply.status != 0) continue;
    ++given;
    const int fd = answer->fd.get();
    EXPECT_LT(pwrite(fd, "x", 1, 0), 0);
    EXPECT_NE(ftruncate(fd, 0), 0);
    EXPECT_NE(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), 0);
    EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
    void* readable = mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 0);
    ASSERT_NE(readable, MAP_FAILED);
    EXPECT_NE(mprotect(readable, 4096, PROT_READ | PROT_WRITE), 0);
    munmap(readable, 4096);
    const int reopened = open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDWR);
    if (reopened < 0) continue;
    EXPECT_LT(pwrite(reopened, "x", 1, 0), 0);
    EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, reopened, 0), MAP_FAILED);
    close(reopened);
  }
  EXPECT_GT(given, 0);
  EXPECT_TRUE((*lease)->Verify().ok());
}

TEST_F(EndToEndTest, GrpcAnswersAreTheSharedMemoryAnswersBitForBit) {
  const ContextId context = Fill(client_.get());
  const GrpcSession grpc(daemon_->grpc_path());
  const Budget budgets[] = {{}, {Budget::Kind::kFixedK, 64, 1.0f}, {Budget::Kind::kTopP, 0, 0.9f},
                            {.kind = Budget::Kind::kError, .error = 0.125f},
                            {.kind = Budget::Kind::kDipr, .beta = 1.0f},
                            {.kind = Budget::Kind::kSoftmaxLift, .k = 64, .seed = 3}};
  for (const Budget& budget : budgets) {
    for (const TokenRange range : {TokenRange{0, kTokens}, {100, 900}}) {
      OneRow row(spec_.shape, context, 1, range, 9);
      row.row.budget = budget;
      row.row.token_position = 5;
      row.row.merged = budget.kind == Budget::Kind::kError;
      ASSERT_TRUE(row.Run(client_.get()).ok()) << row.answer.status;
      wire::AttendRequest request;
      *request.add_rows() =
          ToProto(row.row, spec_.shape.head_dim, spec_.shape.group(), spec_.shape.dtype);
      wire::AttendReply reply;
      const grpc::Status status = grpc.retrieval->Attend(grpc.Context().get(), request, &reply);
      ASSERT_TRUE(status.ok()) << status.error_message();
      ASSERT_EQ(reply.answers_size(), 1);
      const wire::AttendAnswer& answer = reply.answers(0);
      ASSERT_EQ(answer.status(), 0u) << answer.error();
      ASSERT_EQ(answer.o().size(), row.o.size() * 4);
      EXPECT_EQ(std::memcmp(answer.o().data(), row.o.data(), answer.o().size()), 0);
      EXPECT_EQ(std::memcmp(answer.lse().data(), row.lse.data(), answer.lse().size()), 0);
      EXPECT_EQ(answer.tokens_attended(), row.answer.tokens_attended);
      EXPECT_EQ(answer.error_estimate(), row.answer.error_estimate);
      const bool exact = budget.kind == Budget::Kind::kUnlimited ||
                         budget.kind == Budget::Kind::kError;  // nothing here has an index
      EXPECT_EQ(row.answer.error_estimate == 0, exact);
    }
  }
}

TEST_F(EndToEndTest, AContextIsBuiltOverGrpcAloneAndSeenOverSharedMemory) {
  const GrpcSession grpc(daemon_->grpc_path());
  wire::OpenReply opened;
  ASSERT_TRUE(
      grpc.kv->Open(grpc.Context().get(), ToProto(testing::OpenFor(spec_, data_, 2048)), &opened)
          .ok());
  auto context = grpc.Context();
  wire::AppendReply appended;
  auto writer = grpc.kv->Append(context.get(), &appended);
  for (uint32_t layer = 0; layer < spec_.shape.layers; ++layer) {
    AppendRequest append;
    append.context = {opened.context()};
    append.layer = layer;
    append.kv_heads = spec_.shape.kv_heads;
    append.range = {0, kTokens};
    append.k = data_.k[layer].data();
    append.v = data_.v[layer].data();
    const size_t bytes = kTokens * append.kv_heads * spec_.shape.vector_bytes();
    ASSERT_TRUE(writer->Write(ToProto(append, bytes, bytes, 0)));
  }
  writer->WritesDone();
  const grpc::Status status = writer->Finish();
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(appended.tokens(), uint64_t{kTokens} * spec_.shape.layers);
  OneRow row(spec_.shape, ContextId{opened.context()}, 0, {0, kTokens}, 3);
  ASSERT_TRUE(row.Run(client_.get()).ok()) << row.answer.status;
  EXPECT_LT(row.Error(data_), 1e-3);
}

TEST_F(EndToEndTest, AGrpcClientThatStopsReadingHoldsUpNobody) {
  const GrpcSession lazy(daemon_->grpc_path());
  const std::string block(16 << 20, 'b');
  ASSERT_TRUE(client_->Put("engine", "big", std::as_bytes(std::span(block).first(4 << 20))).ok());
  wire::GetRequest get;
  get.set_engine_namespace("engine");
  get.set_key("big");
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<wire::GetReply>>> readers;
  for (int i = 0; i < 16; ++i) {
    contexts.push_back(lazy.Context());
    readers.push_back(lazy.kv->Get(contexts.back().get(), get));
  }
  const GrpcSession other(daemon_->grpc_path());
  for (int i = 0; i < 100; ++i) {
    wire::StatusReply status;
    ASSERT_TRUE(other.admin->Status(other.Context().get(), wire::StatusRequest(), &status).ok());
  }
  ASSERT_TRUE(client_->Nop().ok());
  for (auto& c : contexts) c->TryCancel();
  for (auto& reader : readers) (void)reader->Finish();
}

TEST_F(EndToEndTest, OversizedAndWrongRequestsAreErrorsAndNothingIsLost) {
  const ContextId context = Fill(client_.get());
  // More than a slot carries.
  const std::vector<std::byte> huge(100 << 20);
  EXPECT_FALSE(client_->Put("engine", "huge", huge).ok());
  EXPECT_FALSE(client_->Put("engine", std::string(257, 'k'), std::span(huge).first(10)).ok());
  OpenRequest open = testing::OpenFor(spec_, data_, 1u << 31);
  EXPECT_FALSE(client_->Open(open).ok());
  open.max_tokens = 1u << 22;  // more than the arena holds
  EXPECT_EQ(client_->Open(open).status().code(), absl::StatusCode::kResourceExhausted);
  testing::KvData nan = data_;
  reinterpret_cast<uint16_t*>(nan.k[0].data())[5] = 0x7fc0;
  auto other = client_->Open(testing::OpenFor(spec_, data_, 1024));
  EXPECT_EQ(testing::AppendTokens(client_.get(), other->context, nan, 0, 10).code(),
            absl::StatusCode::kInvalidArgument);
  OneRow row(spec_.shape, context, 0, {0, kTokens + 1}, 3);
  absl::Status refused = row.Run(client_.get());
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()),
              ::testing::HasSubstr(absl::StrCat("context ", context.value, ", layer 0, tokens [0, ",
                                                kTokens + 1, ")")));
  row.row.range = {0, kTokens};
  row.row.layer = spec_.shape.layers;
  refused = row.Run(client_.get());
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()),
              ::testing::HasSubstr(absl::StrCat("layer ", spec_.shape.layers, " of ",
                                                spec_.shape.layers, " layers")));
  row.row.layer = 0;
  row.q[3] = NAN;
  EXPECT_EQ(row.Run(client_.get()).code(), absl::StatusCode::kInvalidArgument);
  OneRow good(spec_.shape, context, 0, {0, kTokens}, 4);
  ASSERT_TRUE(good.Run(client_.get()).ok());
  EXPECT_LT(good.Error(data_), 1e-3);
}

TEST_F(EndToEndTest, SeveralClientsAttendAtOnceAndEachGetsItsOwnAnswers) {
  const ContextId context = Fill(client_.get());
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      auto client = Connect();
      if (t % 2 == 0) client->Arm();
      for (uint32_t i = 0; i < 60; ++i) {
        OneRow row(spec_.shape, context, i % 2, {i, kTokens - t}, t * 1000 + i);
        if (!row.Run(client.get()).ok() || !(row.Error(data_) < 1e-3)) ++failures;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
}

}  // namespace
}  // namespace quarry

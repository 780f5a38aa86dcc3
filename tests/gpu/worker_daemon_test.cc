// The worker with its K/V in a real daemon, on the reference models.
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "client/client.h"
#include "gpu/sequence_batch.h"
#include "proto/half.h"
#include "tests/gpu/golden.h"
#include "tests/support/daemon_process.h"
#include "tests/support/eventually.h"

namespace quarry {
namespace {

using testing::DaemonProcess;
using testing::Golden;
using testing::GoldenData;

Golden GoldenOf(const std::string& model, const std::string& name) {
  const std::string root = QUARRY_TEST_MODELS;
  if (model.starts_with("tiny/")) {
    return {root + "/" + model, root + "/" + model + "/" + name + ".safetensors"};
  }
  return {root + "/" + model, root + "/goldens/" + model + "/" + name + ".safetensors"};
}

class WorkerDaemonTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::DaemonOptions options;
    options.arguments = {"--arena-bytes", "512MiB"};
    auto daemon = DaemonProcess::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    service_ = Connect(absl::Seconds(60));
  }
  void TearDown() override {
    // The daemon must be there for the sequences to be closed; who is stopped cannot close.
    if (daemon_ != nullptr && daemon_->Running()) daemon_->Signal(SIGCONT);
  }
  std::unique_ptr<KvService> Connect(absl::Duration deadline, uint32_t slots = 0) const {
    ClientOptions options;
    options.socket_path = daemon_->socket_path();
    options.deadline = deadline;
    options.slots = slots;
    auto client = Client::Connect(options);
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? MakeKvService(*std::move(client)) : nullptr;
  }
  void Load(const Golden& golden) {
    ASSERT_NO_FATAL_FAILURE(testing::ReadGolden(golden, &golden_));
    auto model = Model::Load(golden.model, device_.get());
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
  }
  std::unique_ptr<Sequence> Open(KvService* service, std::span<const uint32_t> prompt,
                                 uint32_t max_tokens) {
    auto out = Sequence::Open(*model_, *device_, service, options_, prompt, max_tokens);
    EXPECT_TRUE(out.ok()) << out.status();
    return out.ok() ? *std::move(out) : nullptr;
  }
  static void Extend(Sequence* sequence, std::span<const uint32_t> tokens,
                     Sequence::Role role = Sequence::Role::kPrompt) {
    auto logits = sequence->Extend(tokens, role);
    ASSERT_TRUE(logits.ok()) << logits.status();
  }
  // What can be reused of a prompt: whole blocks, and one token is left to compute.
  static uint32_t Whole(std::span<const uint32_t> prompt) {
    return static_cast<uint32_t>(prompt.size() - 1) / kBlockTokens * kBlockTokens;
  }
  // Tokens that a new context of this prompt would reuse, once `at_least` are published; publishing
  // runs in the background.
  uint32_t Reused(std::span<const uint32_t> prompt, uint32_t max_tokens, uint32_t at_least) {
    uint32_t reused = 0;
    testing::Eventually([&] {
      reused = Open(service_.get(), prompt, max_tokens)->reused_tokens();
      return reused >= at_least;
    });
    return reused;
  }

  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<KvService> service_;
  std::unique_ptr<Device> device_ = MakeHostDevice({});
  std::unique_ptr<Model> model_;
  SequenceOptions options_;
  GoldenData golden_;
};

// Rows sent by the host, or by the device itself, in steps called anew or recorded.
enum class Sender { kHost, kDevice, kRecording };
class WorkerDaemonRingsTest : public WorkerDaemonTest,
                              public ::testing::WithParamInterface<Sender> {
 protected:
  void SetUp() override {
    WorkerDaemonTest::SetUp();
    options_.device_rings = GetParam() != Sender::kHost;
    options_.recording =
        GetParam() == Sender::kRecording ? RowStep::Recording::kOn : RowStep::Recording::kOff;
  }
  void ExpectReplayed(const Sequence& sequence) const {
    EXPECT_EQ(sequence.replayed_steps() > 0, GetParam() == Sender::kRecording);
  }
};
std::string SenderName(const ::testing::TestParamInfo<Sender>& info) {
  if (info.param == Sender::kHost) return "Host";
  return info.param == Sender::kDevice ? "Device" : "Recording";
}
INSTANTIATE_TEST_SUITE_P(By, WorkerDaemonRingsTest,
                         ::testing::Values(Sender::kHost, Sender::kDevice, Sender::kRecording),
                         SenderName);

// Unlimited attention through the daemon is transformers' attention: default and llama3 rope, both
// LongRoPE regimes, a sliding window, every head layout.
TEST_P(WorkerDaemonRingsTest, LogitsAndGreedyTokensAgreeWithTransformers) {
  options_.kv_dtype = DType::kFp32;
  for (const Golden& golden :
       {GoldenOf("llama-a", "n1500"), GoldenOf("phi3-b", "n1500"), GoldenOf("phi3-b", "n4500"),
        GoldenOf("tiny/llama3-rope", "golden"), GoldenOf("tiny/llama-untied-mha", "golden"),
        GoldenOf("tiny/phi3-partial-rotary", "golden-long"),
        GoldenOf("tiny/phi3-sliding-window", "golden")}) {
    SCOPED_TRACE(golden.Name());
    golden_ = {};
    ASSERT_NO_FATAL_FAILURE(Load(golden));
    options_.window = golden_.prompt.size() > 1000 ? LocalKv::Window{128, 512, false}
                                                   : LocalKv::Window{8, 16, false};
    for (uint32_t again = 0; again < 2; ++again) {  // cold, and with a prefix reused
      auto sequence = Open(service_.get(), golden_.prompt, golden_.tokens());
      ASSERT_NE(sequence, nullptr);
      EXPECT_EQ(sequence->reused_tokens(), again * Whole(golden_.prompt));
      ASSERT_NO_FATAL_FAILURE(testing::ExpectGolden(golden_, sequence.get()));
      const AttendCost& cost = sequence->cost();
      EXPECT_EQ(cost.tokens_local + cost.tokens_daemon, cost.tokens_in_reach);
      EXPECT_GT(cost.tokens_daemon, 0u);
      EXPECT_EQ(cost.recoveries, 0u);
      // The next round finds what this one published.
      Reused(golden_.prompt, golden_.tokens(), Whole(golden_.prompt));
    }
  }
}

TEST_P(WorkerDaemonRingsTest, SequencesThatDecodeTogetherAnswerAsAlone) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenOf("llama-a", "n1500")));
  options_.window = {16, 32, false};
  options_.kv_dtype =
      DType::kFp32;  // else what rounds differently in a batch may round to another bf16
  const std::span<const uint32_t> prompt(golden_.prompt);
  std::vector<std::unique_ptr<Sequence>> alone, together;
  for (auto* const all : {&alone, &together}) {
    for (const uint32_t tokens : {700u, 1100u, 300u}) {
      all->push_back(Open(service_.get(), prompt.first(tokens), 1500));
      ASSERT_NO_FATAL_FAILURE(
          Extend(all->back().get(), prompt.first(tokens).subspan(all->back()->tokens())));
    }
  }
  // What a prompt cost depends on how much of it was cached.
  std::vector<uint64_t> before;
  for (size_t i = 0; i < alone.size(); ++i) {
    before.push_back(together[i]->cost().tokens_daemon - alone[i]->cost().tokens_daemon);
  }
  SequenceBatch batch({together[0].get(), together[1].get(), together[2].get()});
  for (uint32_t step = 0; step < 60; ++step) {  // the windows' memory is full more than once
    std::vector<uint32_t> tokens;
    for (const auto& sequence : together) tokens.push_back(prompt[sequence->tokens()]);
    const auto got = batch.Extend(tokens);
    for (size_t i = 0; i < alone.size(); ++i) {
      const auto want =
          alone[i]->Extend(std::span(tokens).subspan(i, 1), Sequence::Role::kBudgeted);
      ASSERT_TRUE(want.ok()) << want.status();
      ASSERT_TRUE(got[i].ok()) << got[i].status();
      float size = 0, worst = 0;
      for (size_t j = 0; j < want->size(); ++j) {
        size = std::max(size, std::abs((*want)[j]));
        worst = std::max(worst, std::abs((*want)[j] - (*got[i])[j]));
      }
      ASSERT_LE(worst, 1e-4f * size) << "sequence " << i << " step " << step;
    }
  }
  EXPECT_EQ(batch.replayed_steps() > 0, GetParam() == Sender::kRecording);
  for (size_t i = 0; i < alone.size(); ++i) {
    EXPECT_EQ(together[i]->cost().tokens_daemon - alone[i]->cost().tokens_daemon, before[i]);
    EXPECT_EQ(together[i]->cost().recoveries, 0u);
  }
}

// The daemon voids the row of a context that it no longer has; the others' are computed again, each
// by itself, and go on together.
TEST_P(WorkerDaemonRingsTest, ARowThatIsVoidTakesNoOtherSequenceAlong) {
  constexpr uint32_t kVoid = 12;  // step
  ASSERT_NO_FATAL_FAILURE(Load(GoldenOf("llama-a", "n1500")));
  options_.window = {16, 32, false};
  options_.kv_dtype = DType::kFp32;
  const std::span<const uint32_t> prompt(golden_.prompt);
  std::vector<std::unique_ptr<Sequence>> alone, together;
  for (auto* const all : {&alone, &together}) {
    for (const uint32_t tokens : {700u, 400u, 300u}) {
      // All ids are known from the opening, so that it is an attend that fails.
      all->push_back(Open(service_.get(), prompt.first(tokens + 2 * kVoid), 1500));
      ASSERT_NO_FATAL_FAILURE(
          Extend(all->back().get(), prompt.first(tokens).subspan(all->back()->tokens())));
    }
  }
  SequenceBatch batch({together[0].get(), together[1].get(), together[2].get()});
  for (uint32_t step = 0; step < 2 * kVoid; ++step) {
    if (step == kVoid) {
      EXPECT_EQ(batch.replayed_steps() > 0, GetParam() == Sender::kRecording);
      ASSERT_TRUE(service_->Close(together[1]->context()).ok());
    }
    std::vector<uint32_t> tokens;
    std::vector<TokenDraw> draws;
    for (size_t i = 0; i < alone.size(); ++i) {
      tokens.push_back(prompt[alone[i]->tokens()]);
      draws.push_back({0.8, 0.95, 0.1 + 0.3 * static_cast<double>(i) + 0.01 * step});
    }
    const auto got = batch.ExtendAndDraw(tokens, draws);
    for (size_t i = 0; i < alone.size(); ++i) {
      const auto want =
          alone[i]->Extend(std::span(tokens).subspan(i, 1), Sequence::Role::kBudgeted);
      ASSERT_TRUE(want.ok()) << want.status();
      if (i == 1 && step >= kVoid) {
        EXPECT_EQ(got[i].status().code(), step == kVoid ? absl::StatusCode::kNotFound
                                                        : absl::StatusCode::kFailedPrecondition)
            << got[i].status();
        continue;
      }
      ASSERT_TRUE(got[i].ok()) << "step " << step << ", " << i << ": " << got[i].status();
      EXPECT_EQ(*got[i], ChooseToken(*want, draws[i])) << "sequence " << i << " step " << step;
    }
  }
  for (const size_t i : {0u, 2u}) {
    EXPECT_EQ(together[i]->cost().recoveries, 1u);
    EXPECT_EQ(together[i]->tokens(), alone[i]->tokens());
  }
}

// A document cached behind one text, reused behind another: keys of the first layer know nothing
// but their token and position, so there reuse is exact. All ropes, LongRoPE in both regimes.
TEST_F(WorkerDaemonTest, ADocumentReusedAtAnotherPositionIsExactInTheFirstLayer) {
  constexpr uint32_t kFirstText = 512, kSecondText = 256, kDocument = 256, kRest = 40;
  struct Case {
    Golden golden;
    uint32_t max_tokens;
  };
  options_.kv_dtype = DType::kFp32;
  options_.window = {8, 64, false};
  for (const Case& c :
       {Case{GoldenOf("llama-a", "n300"), 1000}, Case{GoldenOf("tiny/llama3-rope", "golden"), 1000},
        Case{GoldenOf("tiny/phi3-partial-rotary", "golden-long"), 1000},
        Case{GoldenOf("phi3-b", "n300"), 1000}, Case{GoldenOf("phi3-b", "n300"), 5000}}) {
    SCOPED_TRACE(c.golden.Name());
    golden_ = {};
    ASSERT_NO_FATAL_FAILURE(Load(c.golden));
    const auto text = [](uint32_t count, uint32_t first) {
      std::vector<uint32_t> ids(count);
      for (uint32_t i = 0; i < count; ++i) ids[i] = (first + i * i * 7 + i * first) % 251;
      return ids;
    };
    std::vector<uint32_t> cached = text(kFirstText, 3), prompt = text(kSecondText, 5);
    for (std::vector<uint32_t>* ids : {&cached, &prompt}) {
      for (const uint32_t id : text(kDocument, 11)) ids->push_back(id);
      for (const uint32_t id : text(kRest, 13)) ids->push_back(id);
    }
    options_.reuse_shifted = false;
    ASSERT_NO_FATAL_FAILURE(Extend(Open(service_.get(), cached, c.max_tokens).get(), cached));
    ASSERT_EQ(Reused(cached, c.max_tokens, Whole(cached)), Whole(cached));
    auto exact = Open(nullptr, prompt, c.max_tokens);
    ASSERT_NO_FATAL_FAILURE(Extend(exact.get(), prompt));

    options_.reuse_shifted = true;
    std::vector<std::vector<float>> logits;
    for (const uint32_t by_rows : {256u, 0u}) {  // the rest through the daemon, or prefilled
      options_.max_attend_rows = by_rows;
      auto sequence = Open(service_.get(), prompt, c.max_tokens);
      ASSERT_NE(sequence, nullptr);
      EXPECT_TRUE(absl::IsInvalidArgument(
          sequence
              ->Extend(std::span(prompt).subspan(sequence->reused_tokens(),
                                                 kSecondText + 100 - sequence->reused_tokens()),
                       Sequence::Role::kPrompt)
              .status()));
      auto answer = sequence->Extend(std::span(prompt).subspan(sequence->reused_tokens()),
                                     Sequence::Role::kPrompt);
      ASSERT_TRUE(answer.ok()) << answer.status();
      EXPECT_EQ(sequence->shifted_tokens(), kDocument);
      EXPECT_EQ(sequence->tokens(), prompt.size());
      logits.push_back(*std::move(answer));
      const size_t bytes =
          prompt.size() * sequence->shape().kv_heads * sequence->shape().vector_bytes();
      std::vector<std::byte> k(bytes), v(bytes), exact_k(bytes), exact_v(bytes);
      ASSERT_TRUE(sequence->ReadKv(0, k, v).ok());
      ASSERT_TRUE(exact->ReadKv(0, exact_k, exact_v).ok());
      double worst = 0, largest = 0;
      for (size_t i = 0; i < bytes / 4; ++i) {
        const double want = LoadAsFloat(exact_k.data(), i, DType::kFp32);
        worst = std::max(worst, std::abs(LoadAsFloat(k.data(), i, DType::kFp32) - want));
        largest = std::max(largest, std::abs(want));
      }
      EXPECT_LT(worst, 1e-4 * largest);
      worst = largest = 0;
      for (size_t i = 0; i < bytes / 4; ++i) {
        const double want = LoadAsFloat(exact_v.data(), i, DType::kFp32);
        worst = std::max(worst, std::abs(LoadAsFloat(v.data(), i, DType::kFp32) - want));
        largest = std::max(largest, std::abs(want));
      }
      EXPECT_LT(worst, 1e-4 * largest);
      const uint32_t next = 17;
      ASSERT_NO_FATAL_FAILURE(
          Extend(sequence.get(), std::span(&next, 1), Sequence::Role::kBudgeted));
    }
    float low = logits[0][0], high = low, worst = 0;
    for (size_t i = 0; i < logits[0].size(); ++i) {
      low = std::min(low, logits[0][i]);
      high = std::max(high, logits[0][i]);
      worst = std::max(worst, std::abs(logits[0][i] - logits[1][i]));
    }
    EXPECT_LT(worst, 1e-3f * (high - low));
    // Nothing behind the document is found as exact; the text before it is.
    options_.reuse_shifted = false;
    options_.max_attend_rows = 256;
    EXPECT_EQ(Reused(prompt, c.max_tokens, kSecondText), kSecondText);
  }
}

// Counts who sends.
class CountingService final : public KvService {
 public:
  explicit CountingService(std::unique_ptr<KvService> inner) : inner_(std::move(inner)) {}
  int rung = 0, attends = 0;

  absl::StatusOr<OpenResult> Open(const OpenRequest& r) override { return inner_->Open(r); }
  absl::Status Append(const AppendRequest& r) override { return inner_->Append(r); }
  absl::StatusOr<ContextId> Fork(const ForkRequest& r) override { return inner_->Fork(r); }
  absl::Status DeclareTokens(ContextId context, std::span<const uint32_t> ids) override {
    return inner_->DeclareTokens(context, ids);
  }
  absl::Status Close(ContextId context) override { return inner_->Close(context); }
  absl::Status Read(ContextId context, uint32_t layer, TokenRange range, std::span<std::byte> k,
                    std::span<std::byte> v) override {
    return inner_->Read(context, layer, range, k, v);
  }
  absl::StatusOr<std::unique_ptr<PendingAttend>> Attend(std::span<const AttendRow> rows,
                                                        std::span<AttendAnswer> answers) override {
    ++attends;
    return inner_->Attend(rows, answers);
  }
  absl::StatusOr<std::unique_ptr<RungAttends>> RingElsewhere(std::span<const AttendRow> rows,
                                                             uint32_t messages) override {
    ++rung;
    return inner_->RingElsewhere(rows, messages);
  }
  void Arm(bool armed) override { inner_->Arm(armed); }
  absl::StatusOr<uint64_t> HeldBytes(ContextId context) override {
    return inner_->HeldBytes(context);
  }

 private:
  const std::unique_ptr<KvService> inner_;
};

TEST_F(WorkerDaemonTest, WhoSendsTheRowsMakesNoDifference) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenOf("llama-a", "n1500")));
  // The model has more layers than the channel slots.
  auto counting = std::make_unique<CountingService>(Connect(absl::Seconds(60), 4));
  const CountingService& counted = *counting;
  service_ = std::move(counting);
  options_.window = {16, 32, false};
  options_.budget.share = 0.5;
  const std::span<const uint32_t> prompt(golden_.prompt);
  // Both go on from the same prefix.
  ASSERT_NO_FATAL_FAILURE(Extend(Open(service_.get(), prompt, 2000).get(), prompt));
  ASSERT_EQ(Reused(prompt, 2000, Whole(prompt)), Whole(prompt));
  std::vector<uint32_t> steps = {1, 64, 3};
  steps.insert(steps.end(), 150, 1);
  std::vector<std::vector<std::vector<float>>> logits;
  std::vector<AttendCost> costs;
  for (const Sender sender : {Sender::kHost, Sender::kDevice, Sender::kRecording}) {
    options_.device_rings = sender != Sender::kHost;
    options_.recording =
        sender == Sender::kRecording ? RowStep::Recording::kOn : RowStep::Recording::kOff;
    auto sequence = Open(service_.get(), prompt, 2000);
    ASSERT_EQ(sequence->tokens(), Whole(prompt));
    logits.emplace_back();
    // The window's memory is full more than once: what it holds moves there.
    for (const uint32_t rows : steps) {
      auto answer =
          sequence->Extend(prompt.subspan(sequence->tokens(), rows), Sequence::Role::kBudgeted);
      ASSERT_TRUE(answer.ok()) << answer.status();
      logits.back().push_back(*std::move(answer));
    }
    EXPECT_EQ(sequence->replayed_steps(), sender == Sender::kRecording ? 149u : 0u);
    costs.push_back(sequence->cost());
  }
  for (const size_t other : {1, 2}) {
    SCOPED_TRACE(other);
    for (size_t i = 0; i < steps.size(); ++i) EXPECT_EQ(logits[0][i], logits[other][i]) << i;
    EXPECT_EQ(costs[0].tokens_daemon, costs[other].tokens_daemon);
    EXPECT_EQ(costs[0].tokens_local, costs[other].tokens_local);
    EXPECT_EQ(costs[0].tokens_in_reach, costs[other].tokens_in_reach);
    EXPECT_EQ(costs[0].head_steps, costs[other].head_steps);
    EXPECT_EQ(costs[0].bytes_touched, costs[other].bytes_touched);
    EXPECT_EQ(costs[0].bytes_moved, costs[other].bytes_moved);
  }
  EXPECT_EQ(counted.rung, static_cast<int>(2 * steps.size()));
  EXPECT_EQ(counted.attends, static_cast<int>(steps.size() * model_->config().layers));
}

TEST_F(WorkerDaemonTest, RoundedKvGivesTheTokensOfFullAttention) {
  for (const char* model : {"llama-a", "phi3-b"}) {
    golden_ = {};
    ASSERT_NO_FATAL_FAILURE(Load(GoldenOf(model, "n1500")));
    options_.kv_dtype = DType::kBf16;
    std::vector<std::vector<uint32_t>> tokens;
    for (KvService* service : {static_cast<KvService*>(nullptr), service_.get()}) {
      auto sequence = Open(service, golden_.prompt, golden_.tokens());
      auto logits = sequence->Extend(golden_.prompt, Sequence::Role::kPrompt);
      std::vector<uint32_t>& greedy = tokens.emplace_back();
      for (size_t i = 0; i < golden_.greedy.size() && logits.ok(); ++i) {
        greedy.push_back(Sampler({}).Next(*logits));
        if (i + 1 == golden_.greedy.size()) break;
        logits = sequence->Extend(std::span(&greedy.back(), 1), Sequence::Role::kBudgeted);
      }
      ASSERT_TRUE(logits.ok()) << logits.status();
      if (service != nullptr) {
        const KvShape shape = model_->SpecFor(golden_.tokens(), DType::kBf16)->shape;
        EXPECT_LE(sequence->local_kv_bytes(), 640 * shape.bytes_per_token() * 5 / 4);
      }
    }
    EXPECT_EQ(tokens[0], tokens[1]) << model;
  }
}

TEST_F(WorkerDaemonTest, TheRegimesOfLongRopeShareNothing) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenOf("phi3-b", "n300")));
  const std::span<const uint32_t> prompt(golden_.prompt);
  Extend(Open(service_.get(), prompt, 4096).get(), prompt);
  EXPECT_EQ(Reused(prompt, 4096, 256), 256u);
  EXPECT_EQ(Reused(prompt, 2000, 256), 256u) << "the same regime";
  EXPECT_EQ(Open(service_.get(), prompt, 4097)->reused_tokens(), 0u) << "the long regime";
  Extend(Open(service_.get(), prompt, 4097).get(), prompt);
  EXPECT_EQ(Reused(prompt, 100000, 256), 256u);
}

TEST_F(WorkerDaemonTest, KvOfABudgetIsNeverReusedAsExact) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenOf("llama-a", "n1500")));
  const std::span<const uint32_t> all = std::span(golden_.prompt).first(1025);
  std::vector<uint32_t> other(all.begin(), all.end());
  other[0] ^= 1;
  options_.window = {16, 32, false};
  const auto run = [&](std::span<const uint32_t> tokens) {
    auto sequence = Open(service_.get(), tokens.first(300), 2000);
    Extend(sequence.get(), tokens.first(300));
    for (uint32_t lo = 300; lo < 1025; lo += 145) {
      Extend(sequence.get(), tokens.subspan(lo, 145), Sequence::Role::kBudgeted);
    }
    return sequence;
  };
  options_.budget.share = 0.5;
  const auto budgeted = run(all);
  EXPECT_LT(budgeted->cost().tokens_daemon + budgeted->cost().tokens_local,
            budgeted->cost().tokens_in_reach * 7 / 10);
  options_.budget = {};
  const auto exact = run(other);
  // Once the exact context's blocks are there, the other's have had their time.
  EXPECT_EQ(Reused(other, 2000, 1024), 1024u);
  EXPECT_EQ(Reused(all, 2000, 256), 256u);
}

TEST_P(WorkerDaemonRingsTest, AKilledDaemonVoidsTheTokenAtOnce) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenOf("llama-a", "n1500")));
  auto sequence = Open(service_.get(), golden_.prompt, 4000);
  Extend(sequence.get(), golden_.prompt);
  std::atomic<int> done{0};
  std::thread killer([&] {
    while (done < 3) std::this_thread::yield();
    daemon_->Kill();
  });
  const absl::Time begun = absl::Now();
  absl::Status status;
  std::vector<uint32_t> tokens;
  const uint32_t token = 7;
  while (status.ok() && tokens.size() < 2000) {
    auto logits = sequence->Extend(std::span(&token, 1), Sequence::Role::kBudgeted);
    status = logits.status();
    if (status.ok()) tokens.push_back(Sampler({}).Next(*logits));
    ++done;
  }
  killer.join();
  ExpectReplayed(*sequence);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_NE(std::string(status.message()).find("is void"), std::string::npos) << status;
  EXPECT_LT(absl::Now() - begun, absl::Seconds(30)) << "the deadline is 60 s; a death is seen";
  // What was answered before is right.
  auto full = Open(nullptr, golden_.prompt, 4000);
  Extend(full.get(), golden_.prompt);
  for (size_t i = 0; i < std::min<size_t>(tokens.size(), 10); ++i) {
    auto logits = full->Extend(std::span(&token, 1), Sequence::Role::kBudgeted);
    ASSERT_TRUE(logits.ok());
    EXPECT_EQ(tokens[i], Sampler({}).Next(*logits)) << i;
  }
}

TEST_P(WorkerDaemonRingsTest, AStoppedDaemonVoidsTheTokenAtItsDeadline) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenOf("llama-a", "n300")));
  auto service = Connect(absl::Milliseconds(700));
  options_.window = {16, 32, false};
  // The ids are known from the opening, so that it is an attend that goes unanswered.
  const std::span<const uint32_t> prompt(golden_.prompt);
  auto sequence = Open(service.get(), prompt, 1000);
  Extend(sequence.get(), prompt.first(296));
  for (uint32_t t = 296; t < 299; ++t) {
    Extend(sequence.get(), prompt.subspan(t, 1), Sequence::Role::kBudgeted);
  }
  ExpectReplayed(*sequence);
  daemon_->Signal(SIGSTOP);
  ASSERT_TRUE(testing::AwaitStopped(daemon_->pid()));
  const absl::Time begun = absl::Now();
  const absl::Status status =
      sequence->Extend(prompt.subspan(299), Sequence::Role::kBudgeted).status();
  const absl::Duration took = absl::Now() - begun;
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_NE(std::string(status.message()).find("is void"), std::string::npos) << status;
  EXPECT_GE(took, absl::Milliseconds(600));
  EXPECT_LT(took, absl::Seconds(10));
  daemon_->Signal(SIGCONT);
}

}  // namespace
}  // namespace quarry

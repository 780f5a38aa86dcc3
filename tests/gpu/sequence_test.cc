// The worker with its K/V in a service: a fake one here, which keeps every token and can fail.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "gpu/sequence.h"
#include "tests/gpu/fake_service.h"
#include "tests/gpu/guarded_device.h"
#include "tests/gpu/tiny_models.h"
#include "tests/gpu/watched_device.h"

namespace quarry {
namespace {

using testing::FakeService;

class SequenceTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    device_ = MakeHostDevice({});
    auto model =
        Model::Load(std::string(QUARRY_TEST_MODELS) + "/tiny/" + GetParam(), device_.get());
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    uint32_t x = 7;
    for (int i = 0; i < 200; ++i) {
      x = x * 1664525 + 1013904223;
      tokens_.push_back((x >> 8) % model_->config().vocab);
    }
    options_.kv_dtype = DType::kFp32;
    options_.window = {8, 16, false};
    options_.max_attend_rows = 40;
    options_.rows_per_message = 7;
  }
  std::unique_ptr<Sequence> Open(KvService* service, size_t prompt = 100) {
    auto s =
        Sequence::Open(*model_, *device_, service, options_, std::span(tokens_).first(prompt), 256);
    EXPECT_TRUE(s.ok()) << s.status();
    return *std::move(s);
  }
  // Logits after every step of: a prefill of 100, a chunk of 30, 20 single tokens.
  std::vector<std::vector<float>> Run(Sequence* s) {
    std::vector<std::vector<float>> out;
    const auto step = [&](uint32_t lo, uint32_t hi, Sequence::Role role) {
      auto logits = s->Extend(std::span(tokens_).subspan(lo, hi - lo), role);
      ASSERT_TRUE(logits.ok()) << logits.status() << " at " << lo;
      out.push_back(*std::move(logits));
    };
    step(s->tokens(), 100, Sequence::Role::kPrompt);
    step(100, 130, Sequence::Role::kBudgeted);
    for (uint32_t t = 130; t < 150; ++t) step(t, t + 1, Sequence::Role::kBudgeted);
    return out;
  }
  static void ExpectSame(const std::vector<std::vector<float>>& a,
                         const std::vector<std::vector<float>>& b, float share = 1e-5f) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      float low = 1e30f, high = -1e30f, worst = 0;
      for (size_t j = 0; j < a[i].size(); ++j) {
        low = std::min(low, a[i][j]);
        high = std::max(high, a[i][j]);
        worst = std::max(worst, std::abs(a[i][j] - b[i][j]));
      }
      EXPECT_LE(worst, share * (high - low) + 1e-6f) << "step " << i;
    }
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Model> model_;
  std::vector<uint32_t> tokens_;
  SequenceOptions options_;
};

TEST_P(SequenceTest, ServiceWithUnlimitedBudgetEqualsFullAttention) {
  auto full = Run(Open(nullptr).get());
  FakeService service;
  {
    auto sequence = Open(&service);
    ExpectSame(full, Run(sequence.get()));
    EXPECT_EQ(sequence->cost().tokens_local + sequence->cost().tokens_daemon,
              sequence->cost().tokens_in_reach)
        << "every token counts exactly once";
    EXPECT_GT(service.samples, 0u);
    EXPECT_EQ(service.armed_balance, 0);
  }
  EXPECT_TRUE(service.contexts.empty()) << "the context was not closed";
}

// Through places where the K/V's memory grows, so that steps are recorded again, and other shapes.
TEST_P(SequenceTest, RecordedStepsGiveTheSameTokens) {
  std::vector<std::vector<std::vector<float>>> logits;
  std::vector<AttendCost> costs;
  for (const auto recording : {RowStep::Recording::kOff, RowStep::Recording::kOn}) {
    options_.recording = recording;
    auto sequence = Open(nullptr);
    logits.push_back(Run(sequence.get()));
    EXPECT_EQ(sequence->replayed_steps(), recording == RowStep::Recording::kOn ? 19u : 0u);
    uint64_t replayed = 0;
    for (const uint32_t rows : {3u, 3u, 3u, 1u, 1u, 1u, 9u, 1u}) {
      auto answer = sequence->Extend(std::span(tokens_).subspan(sequence->tokens(), rows),
                                     Sequence::Role::kBudgeted);
      ASSERT_TRUE(answer.ok()) << answer.status();
      logits.back().push_back(*std::move(answer));
      replayed += sequence->replayed_steps();
    }
    // 3, 3, 3: 0, 1, 2; single ones again: 0, 1, 2; 9 are a prefill, behind which it goes on.
    EXPECT_EQ(replayed, recording == RowStep::Recording::kOn ? 1 + 2 + 1 + 2 + 2 + 3u : 0u);
    while (sequence->tokens() < tokens_.size()) {
      auto answer = sequence->Extend(std::span(tokens_).subspan(sequence->tokens(), 1),
                                     Sequence::Role::kBudgeted);
      ASSERT_TRUE(answer.ok()) << answer.status();
      logits.back().push_back(*std::move(answer));
    }
    costs.push_back(sequence->cost());
  }
  EXPECT_EQ(logits[0], logits[1]);
  EXPECT_EQ(costs[0].tokens_local, costs[1].tokens_local);
  EXPECT_EQ(costs[0].tokens_in_reach, costs[1].tokens_in_reach);
  EXPECT_EQ(costs[0].head_steps, costs[1].head_steps);
}

TEST_P(SequenceTest, LocalKvInTheHostsMemoryGivesTheSameTokens) {
  const auto on_device = Run(Open(nullptr).get());
  options_.local_kv = KvMemory::kHost;
  const uint64_t before = device_->Stats().used_bytes;
  auto full = Open(nullptr);
  EXPECT_EQ(on_device, Run(full.get()));
  EXPECT_GT(full->local_kv_bytes(), device_->Stats().used_bytes - before);
  FakeService service;
  ExpectSame(on_device, Run(Open(&service).get()));
  options_.window.first = 1000;  // everything, though there is a service
  ExpectSame(on_device, Run(Open(&service).get()));
}

TEST_P(SequenceTest, ADeviceThatKeepsNoStepIsAskedOnce) {
  testing::WatchedDevice device;
  const auto model = Model::Load(std::string(QUARRY_TEST_MODELS) + "/tiny/" + GetParam(), &device);
  ASSERT_TRUE(model.ok()) << model.status();
  const std::span<const uint32_t> prompt = std::span(tokens_).first(20);
  auto sequence = Sequence::Open(**model, device, nullptr, options_, prompt, 256);
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  for (uint32_t t = 0; t < prompt.size(); ++t) {
    ASSERT_TRUE((*sequence)->Extend(prompt.subspan(t, 1), Sequence::Role::kBudgeted).ok());
  }
  EXPECT_EQ(device.asked_to_record, 1u);
}

TEST_P(SequenceTest, ReusedPrefixGivesTheSameTokens) {
  auto full = Run(Open(nullptr).get());
  FakeService first, second;
  auto origin = Open(&first);
  ASSERT_TRUE(origin->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  second.reuse = &first.contexts.begin()->second;
  // A suffix short enough to attend by rows, one that streams the prefix, and no overlap at all
  // between prefix and window.
  for (uint32_t reused : {96u, 40u, 5u}) {
    second.reuse_tokens = reused;
    auto sequence = Open(&second);
    EXPECT_EQ(sequence->reused_tokens(), reused);
    ExpectSame(full, Run(sequence.get()));
  }
}

TEST_P(SequenceTest, VoidedTokenIsComputedAgain) {
  auto full = Run(Open(nullptr).get());
  for (int at : {0, 3, 11, 14}) {
    FakeService service;
    service.fail_attend = at;
    service.failure = absl::ResourceExhaustedError("queue full");
    auto sequence = Open(&service);
    ExpectSame(full, Run(sequence.get()));
    EXPECT_EQ(sequence->cost().recoveries, 1u);
    EXPECT_EQ(service.armed_balance, 0);
  }
}

TEST_P(SequenceTest, LostDaemonFailsTheRequestAndStaysFailed) {
  FakeService service;
  service.fail_attend = 4;
  service.failure = absl::UnavailableError("gone");
  auto sequence = Open(&service);
  ASSERT_TRUE(sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  auto logits = sequence->Extend(std::span(tokens_).subspan(100, 30), Sequence::Role::kBudgeted);
  EXPECT_TRUE(absl::IsUnavailable(logits.status())) << logits.status();
  EXPECT_NE(std::string(logits.status().message()).find("void"), std::string::npos);
  EXPECT_TRUE(absl::IsFailedPrecondition(
      sequence->Extend(std::span(tokens_).subspan(100, 1), Sequence::Role::kBudgeted).status()));
}

TEST_P(SequenceTest, ForksGoOnIndependently) {
  FakeService service;
  auto sequence = Open(&service);
  ASSERT_TRUE(sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  auto fork = sequence->Fork();
  ASSERT_TRUE(fork.ok()) << fork.status();
  const auto next = std::span(tokens_).subspan(100, 30);
  auto a = (*fork)->Extend(next, Sequence::Role::kBudgeted);
  auto other = (*fork)->Extend(std::span(tokens_).subspan(5, 9), Sequence::Role::kBudgeted);
  auto b = sequence->Extend(next, Sequence::Role::kBudgeted);
  ASSERT_TRUE(a.ok() && b.ok() && other.ok());
  EXPECT_EQ(*a, *b);
}

TEST_P(SequenceTest, BudgetedTokensGoToAContextOfTheirRecipe) {
  options_.budget.share = 0.25;
  FakeService service;
  auto sequence = Open(&service);
  ASSERT_TRUE(sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  EXPECT_TRUE(service.contexts.begin()->second.recipe.dense());
  ASSERT_TRUE(sequence->Extend(std::span(tokens_).subspan(100, 3), Sequence::Role::kBudgeted).ok());
  ASSERT_EQ(service.contexts.size(), 1u);
  EXPECT_FALSE(service.contexts.begin()->second.recipe.dense());
}

TEST_P(SequenceTest, BadTokensAndLengthsAreNamed) {
  FakeService service;
  auto sequence = Open(&service);
  const uint32_t vocab = model_->config().vocab;
  std::vector<uint32_t> bad = {1, 2, vocab};
  absl::Status status = sequence->Extend(bad, Sequence::Role::kPrompt).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_NE(std::string(status.message()).find(std::to_string(vocab)), std::string::npos);
  EXPECT_NE(std::string(status.message()).find("token 2"), std::string::npos) << status;
  std::vector<uint32_t> many(300, 1);
  status = sequence->Extend(many, Sequence::Role::kPrompt).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_NE(std::string(status.message()).find("256"), std::string::npos) << status;
  EXPECT_TRUE(absl::IsFailedPrecondition(
      Sequence::Open(*model_, *device_, &service, options_, {}, 1u << 30).status()));
}

TEST_P(SequenceTest, WindowsOfEverySizeEqualFullAttention) {
  auto full = Run(Open(nullptr).get());
  for (const LocalKv::Window window : {LocalKv::Window{8, 0, false},
                                       {0, 16, false},
                                       {0, 0, false},
                                       {0, 1, false},
                                       {100, 50, false},
                                       {1000, 1000, false}}) {
    SCOPED_TRACE(::testing::Message() << window.first << " + " << window.last);
    options_.window = window;
    FakeService service;
    auto sequence = Open(&service);
    ExpectSame(full, Run(sequence.get()));
    EXPECT_EQ(sequence->cost().tokens_local + sequence->cost().tokens_daemon,
              sequence->cost().tokens_in_reach);
  }
}

TEST_P(SequenceTest, PrefillInChunksEqualsPrefillAtOnce) {
  auto full = Run(Open(nullptr).get());
  for (const uint32_t rows : {1u, 7u, 64u, 100u}) {
    options_.prefill_rows = rows;
    ExpectSame(full, Run(Open(nullptr).get()));
    FakeService service;
    auto sequence = Open(&service);
    ExpectSame(full, Run(sequence.get()));
    // As many samples as asked for, whatever the chunks: one prefill of 100 tokens.
    EXPECT_EQ(service.samples, 64u * model_->config().layers) << rows;
    // A quarter are the last positions, the others are spread over what is before.
    ASSERT_EQ(service.sampled.size(), 64u);
    for (uint32_t i = 0; i < 64; ++i) {
      EXPECT_EQ(service.sampled[i], i < 48 ? i * 84 / 48 : 84 + i - 48) << rows;
    }
  }
}

TEST_P(SequenceTest, HoldsOnlyTheWindowAfterPrefillAndFreesWhatItUsed) {
  const uint64_t before = device_->Stats().used_bytes;
  FakeService service;
  auto sequence = Open(&service);
  ASSERT_TRUE(sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  EXPECT_EQ(device_->Stats().used_bytes - before, sequence->local_kv_bytes());
  const ModelConfig& c = model_->config();
  EXPECT_EQ(sequence->local_kv_bytes(), size_t{2} * c.layers * c.kv_heads * c.head_dim * 4 * 24);
  sequence.reset();
  EXPECT_EQ(device_->Stats().used_bytes, before);
}

TEST_P(SequenceTest, TheHostNeverTouchesTheDevicesMemory) {
  auto full = Run(Open(nullptr).get());
  testing::GuardedDevice guarded;
  auto model = Model::Load(std::string(QUARRY_TEST_MODELS) + "/tiny/" + GetParam(), &guarded);
  ASSERT_TRUE(model.ok()) << model.status();
  FakeService first, second;
  const auto open = [&](FakeService* service) {
    return *Sequence::Open(**model, guarded, service, options_, std::span(tokens_).first(100), 256);
  };
  auto origin = open(&first);
  ExpectSame(full, Run(origin.get()));
  second.reuse = &first.contexts.begin()->second;
  for (const uint32_t reused : {96u, 5u}) {  // the window is read back, and a prefix is streamed
    second.reuse_tokens = reused;
    auto sequence = open(&second);
    ExpectSame(full, Run(sequence.get()));
    ASSERT_TRUE(sequence->Fork().ok());
  }
}

TEST_P(SequenceTest, ATokenThatIsVoidTwiceFailsTheRequest) {
  FakeService service;
  service.fail_attend = 3;
  service.fail_attends = 1000;
  service.failure = absl::ResourceExhaustedError("queue full");
  auto sequence = Open(&service);
  ASSERT_TRUE(sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  const absl::Status status =
      sequence->Extend(std::span(tokens_).subspan(100, 30), Sequence::Role::kBudgeted).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_NE(std::string(status.message()).find("is void"), std::string::npos) << status;
  EXPECT_EQ(sequence->cost().recoveries, 1u);
  EXPECT_EQ(service.armed_balance, 0);
}

TEST_P(SequenceTest, AnAnswerThatLeavesTokensOutIsVoid) {
  auto full = Run(Open(nullptr).get());
  FakeService service;
  service.fail_attend = 4;
  service.cover_less = true;
  auto sequence = Open(&service);
  ExpectSame(full, Run(sequence.get()));
  EXPECT_EQ(sequence->cost().recoveries, 1u);
}

TEST_P(SequenceTest, AFailedAppendFailsThePrefill) {
  for (const int at : {0, 1}) {
    FakeService service;
    service.fail_append = at;
    service.failure = absl::UnavailableError("gone");
    auto sequence = Open(&service);
    const auto logits = sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt);
    EXPECT_TRUE(absl::IsUnavailable(logits.status())) << logits.status();
    EXPECT_FALSE(sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
  }
}

TEST_P(SequenceTest, OtherTokensThanDeclaredAreRefusedAndNothingIsLost) {
  FakeService service;
  auto sequence = Open(&service);
  std::vector<uint32_t> other(tokens_.begin(), tokens_.begin() + 100);
  other[42] = (other[42] + 1) % model_->config().vocab;
  const absl::Status status = sequence->Extend(other, Sequence::Role::kPrompt).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_NE(std::string(status.message()).find("token 42"), std::string::npos) << status;
  EXPECT_TRUE(sequence->Extend(std::span(tokens_).first(100), Sequence::Role::kPrompt).ok());
}

TEST_P(SequenceTest, RoundedKvIsWhatBothSidesAttend) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    options_.kv_dtype = dtype;
    auto full = Run(Open(nullptr).get());
    FakeService service;
    auto sequence = Open(&service);
    // The same rounded K/V, summed in another order by other kernels.
    ExpectSame(full, Run(sequence.get()), 1e-3f);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, SequenceTest,
                         ::testing::Values("llama-untied-mha", "llama3-rope", "phi3-partial-rotary",
                                           "phi3-sliding-window"),
                         TinyModelName);

}  // namespace
}  // namespace quarry

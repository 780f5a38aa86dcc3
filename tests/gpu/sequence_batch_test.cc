// Sequences that decode together answer as they do alone.
#include "gpu/sequence_batch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "tests/gpu/fake_service.h"
#include "tests/gpu/tiny_models.h"

namespace quarry {
namespace {

using testing::FakeService;
using Logits = std::vector<float>;

constexpr uint32_t kSteps = 20;

class SequenceBatchTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    auto model =
        Model::Load(std::string(QUARRY_TEST_MODELS) + "/tiny/" + GetParam(), device_.get());
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    for (uint32_t i = 0, x = 7; i < 200; ++i) {
      x = x * 1664525 + 1013904223;
      tokens_.push_back((x >> 8) % model_->config().vocab);
    }
    options_.kv_dtype = DType::kFp32;
    options_.window = {8, 16, false};
  }
  // Behind a prompt of so many tokens. With other maxima, ropes of some models are others.
  std::unique_ptr<Sequence> Open(KvService* service, uint32_t prompt, uint32_t max_tokens = 150) {
    const auto ids = std::span(tokens_).first(prompt);
    auto s = Sequence::Open(*model_, *device_, service, options_, ids, max_tokens);
    EXPECT_TRUE(s.ok()) << s.status();
    EXPECT_TRUE((*s)->Extend(ids, Sequence::Role::kPrompt).ok());
    return *std::move(s);
  }
  std::vector<std::unique_ptr<Sequence>> OpenAll(KvService* service) {
    std::vector<std::unique_ptr<Sequence>> out;
    for (const uint32_t prompt : {40u, 90u, 12u, 61u}) {
      out.push_back(Open(service, prompt, prompt == 61 ? model_->config().max_tokens : 150));
    }
    return out;
  }
  static SequenceBatch BatchOf(const std::vector<std::unique_ptr<Sequence>>& sequences) {
    std::vector<Sequence*> all;
    for (const auto& sequence : sequences) all.push_back(sequence.get());
    return SequenceBatch(std::move(all));
  }
  uint32_t Token(size_t sequence, uint32_t step) const {
    return tokens_[(31 * sequence + step) % tokens_.size()];
  }
  std::vector<uint32_t> TokensOf(size_t sequences, uint32_t step) const {
    std::vector<uint32_t> out;
    for (size_t i = 0; i < sequences; ++i) out.push_back(Token(i, step));
    return out;
  }
  static void ExpectSame(const Logits& a, const Logits& b) {
    ASSERT_EQ(a.size(), b.size());
    const auto [low, high] = std::minmax_element(a.begin(), a.end());
    for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-5f * (*high - *low) + 1e-6f);
  }
  // The sequences take kSteps tokens together, with what each of `alone` answers by itself.
  void ExpectAsAlone(const std::vector<std::unique_ptr<Sequence>>& alone,
                     const std::vector<std::unique_ptr<Sequence>>& together, SequenceBatch* batch) {
    for (uint32_t step = 0; step < kSteps; ++step) {
      const auto tokens = TokensOf(alone.size(), step);
      const auto got = batch->Extend(tokens);
      for (size_t i = 0; i < alone.size(); ++i) {
        const auto want =
            alone[i]->Extend(std::span(tokens).subspan(i, 1), Sequence::Role::kBudgeted);
        ASSERT_TRUE(want.ok()) << want.status();
        ASSERT_TRUE(got[i].ok()) << got[i].status();
        ASSERT_NO_FATAL_FAILURE(ExpectSame(*want, *got[i])) << "sequence " << i << " step " << step;
        EXPECT_EQ(together[i]->tokens(), alone[i]->tokens());
      }
    }
    for (size_t i = 0; i < alone.size(); ++i) {
      EXPECT_EQ(together[i]->cost().tokens_local, alone[i]->cost().tokens_local) << i;
      EXPECT_EQ(together[i]->cost().tokens_daemon, alone[i]->cost().tokens_daemon) << i;
      EXPECT_EQ(together[i]->cost().tokens_in_reach, alone[i]->cost().tokens_in_reach) << i;
      EXPECT_EQ(together[i]->cost().bytes_moved, alone[i]->cost().bytes_moved) << i;
    }
  }

  std::unique_ptr<Device> device_ = MakeHostDevice({.threads = 2});
  std::unique_ptr<Model> model_;
  std::vector<uint32_t> tokens_;
  SequenceOptions options_;
};

TEST_P(SequenceBatchTest, WithAServiceTheyAnswerAsAloneByOneMessageALayer) {
  FakeService service, other;
  const auto alone = OpenAll(&other), together = OpenAll(&service);
  SequenceBatch batch = BatchOf(together);
  ExpectAsAlone(alone, together, &batch);
  EXPECT_EQ(service.attends, static_cast<int>(kSteps * model_->config().layers));
  EXPECT_EQ(service.armed_balance, 0);
}

TEST_P(SequenceBatchTest, MoreRowsThanAMessageCarriesGoInSeveral) {
  options_.rows_per_message = 3;  // of four
  FakeService service, other;
  const auto alone = OpenAll(&other), together = OpenAll(&service);
  SequenceBatch batch = BatchOf(together);
  ExpectAsAlone(alone, together, &batch);
  EXPECT_EQ(service.attends, static_cast<int>(2 * kSteps * model_->config().layers));
}

TEST_P(SequenceBatchTest, DrawnTokensAreThoseOfTheLogits) {
  options_.rows_per_message = 3;  // of four: the last one's step is its own
  FakeService service, other;
  for (const auto& [for_logits, for_tokens] :
       {std::pair<KvService*, KvService*>{nullptr, nullptr}, {&other, &service}}) {
    const auto alone = OpenAll(for_logits), together = OpenAll(for_tokens);
    SequenceBatch batch = BatchOf(together);
    for (uint32_t step = 0; step < kSteps; ++step) {
      const auto tokens = TokensOf(alone.size(), step);
      std::vector<TokenDraw> draws;
      for (size_t i = 0; i < alone.size(); ++i) {
        draws.push_back({i % 2 == 0 ? 0 : 0.8, i == 1 ? 0.9 : 1, 0.05 + 0.9 * step / kSteps});
      }
      const auto got = batch.ExtendAndDraw(tokens, draws);
      for (size_t i = 0; i < alone.size(); ++i) {
        const auto logits =
            alone[i]->Extend(std::span(tokens).subspan(i, 1), Sequence::Role::kBudgeted);
        ASSERT_TRUE(logits.ok()) << logits.status();
        ASSERT_TRUE(got[i].ok()) << got[i].status();
        EXPECT_EQ(*got[i], ChooseToken(*logits, draws[i])) << "sequence " << i << " step " << step;
      }
    }
    // Several tokens at a time, too.
    const auto logits = alone[0]->Extend(std::span(tokens_).first(9), Sequence::Role::kBudgeted);
    const auto token = together[0]->ExtendAndDraw(std::span(tokens_).first(9),
                                                  Sequence::Role::kBudgeted, {0.8, 0.9, 0.4});
    ASSERT_TRUE(logits.ok() && token.ok()) << logits.status() << token.status();
    EXPECT_EQ(*token, ChooseToken(*logits, {0.8, 0.9, 0.4}));
  }
}

TEST_P(SequenceBatchTest, WithAllKvHereTheyAnswerAsAloneByRecordedSteps) {
  for (const auto recording : {RowStep::Recording::kOff, RowStep::Recording::kOn}) {
    options_.recording = recording;
    const auto alone = OpenAll(nullptr), together = OpenAll(nullptr);
    SequenceBatch batch = BatchOf(together);
    ExpectAsAlone(alone, together, &batch);
    EXPECT_EQ(batch.replayed_steps() > 0, recording == RowStep::Recording::kOn);
  }
}

TEST_P(SequenceBatchTest, WhatOneMayNotRunIsNoErrorOfAnother) {
  const auto alone = OpenAll(nullptr), together = OpenAll(nullptr);
  SequenceBatch batch = BatchOf(together);
  std::vector<uint32_t> tokens = TokensOf(4, 0);
  tokens[1] = model_->config().vocab;
  const auto got = batch.Extend(tokens);
  EXPECT_TRUE(absl::IsInvalidArgument(got[1].status())) << got[1].status();
  EXPECT_EQ(together[1]->tokens(), 90u);
  for (const size_t i : {0u, 2u, 3u}) {
    const auto want = alone[i]->Extend(std::span(tokens).subspan(i, 1), Sequence::Role::kBudgeted);
    ASSERT_TRUE(got[i].ok()) << got[i].status();
    ExpectSame(*want, *got[i]);
  }
  // Draws stay with their sequences where one of them has no row.
  const std::vector<TokenDraw> draws = {{0.8, 1, 0.1}, {0.8, 1, 0.4}, {0.8, 1, 0.6}, {0.8, 1, 0.9}};
  const auto drawn = batch.ExtendAndDraw(tokens, draws);
  EXPECT_TRUE(absl::IsInvalidArgument(drawn[1].status())) << drawn[1].status();
  for (const size_t i : {0u, 2u, 3u}) {
    const auto want = alone[i]->Extend(std::span(tokens).subspan(i, 1), Sequence::Role::kBudgeted);
    ASSERT_TRUE(want.ok() && drawn[i].ok()) << want.status() << drawn[i].status();
    EXPECT_EQ(*drawn[i], ChooseToken(*want, draws[i]));
  }
  const auto next = batch.Extend(TokensOf(4, 1));  // it is as it was
  for (const auto& logits : next) EXPECT_TRUE(logits.ok()) << logits.status();
}

TEST_P(SequenceBatchTest, AVoidedRowIsComputedAgainAndTheOthersWithIt) {
  FakeService service, other;
  const auto alone = OpenAll(&other), together = OpenAll(&service);
  SequenceBatch batch = BatchOf(together);
  service.fail_attend = static_cast<int>(2 * model_->config().layers) + 1;  // of the third step
  service.failure = absl::ResourceExhaustedError("queue full");
  for (uint32_t step = 0; step < 5; ++step) {
    const auto tokens = TokensOf(4, step);
    std::vector<TokenDraw> draws;
    for (size_t i = 0; i < 4; ++i) draws.push_back({0.8, 0.95, 0.1 + 0.2 * i + 0.05 * step});
    const auto got = batch.ExtendAndDraw(tokens, draws);
    for (size_t i = 0; i < 4; ++i) {
      const auto want =
          alone[i]->Extend(std::span(tokens).subspan(i, 1), Sequence::Role::kBudgeted);
      ASSERT_TRUE(want.ok() && got[i].ok()) << want.status() << got[i].status();
      EXPECT_EQ(*got[i], ChooseToken(*want, draws[i])) << "sequence " << i << " step " << step;
    }
  }
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(together[i]->cost().recoveries, 1u);
    EXPECT_EQ(together[i]->cost().tokens_daemon, alone[i]->cost().tokens_daemon);
  }
}

TEST_P(SequenceBatchTest, WhenTheServiceHasGoneAllFail) {
  FakeService service;
  const auto together = OpenAll(&service);
  SequenceBatch batch = BatchOf(together);
  service.fail_attend = 1;
  service.failure = absl::UnavailableError("gone");
  for (const auto& logits : batch.Extend(TokensOf(4, 0))) {
    EXPECT_TRUE(absl::IsUnavailable(logits.status())) << logits.status();
  }
  for (const auto& logits : batch.Extend(TokensOf(4, 1))) {
    EXPECT_TRUE(absl::IsFailedPrecondition(logits.status())) << logits.status();
  }
}

// Then tokens are prefilled, one by one.
TEST_P(SequenceBatchTest, WhereNoRowsAreAskedOfTheServiceNoneAreInABatch) {
  options_.max_attend_rows = 0;
  FakeService service, other;
  const auto alone = OpenAll(&other), together = OpenAll(&service);
  SequenceBatch batch = BatchOf(together);
  ExpectAsAlone(alone, together, &batch);
  EXPECT_EQ(service.attends, 0);
}

TEST_P(SequenceBatchTest, TheOthersGoOnByStepsOfTheirOwnWhereOneHasEnded) {
  constexpr uint32_t kEnd = 6;  // steps
  options_.recording = RowStep::Recording::kOn;
  const auto open = [&] {
    auto sequences = OpenAll(nullptr);
    sequences.push_back(Open(nullptr, 40, 40 + kEnd));
    return sequences;
  };
  const auto alone = open(), together = open();
  SequenceBatch batch = BatchOf(together);
  for (uint32_t step = 0; step < 2 * kEnd; ++step) {
    const auto tokens = TokensOf(alone.size(), step);
    const auto got = batch.Extend(tokens);
    for (size_t i = 0; i < alone.size(); ++i) {
      const auto want =
          alone[i]->Extend(std::span(tokens).subspan(i, 1), Sequence::Role::kBudgeted);
      ASSERT_EQ(got[i].status(), want.status()) << "sequence " << i << " step " << step;
      EXPECT_EQ(got[i].ok(), i < 4 || step < kEnd);
      if (want.ok()) {
        ASSERT_NO_FATAL_FAILURE(ExpectSame(*want, *got[i]));
      }
    }
    if (step == kEnd - 1) {
      EXPECT_GT(batch.replayed_steps(), 0u);
    } else if (step == kEnd) {
      EXPECT_EQ(batch.replayed_steps(), 0u);  // of four rows none was recorded yet
    }
  }
  EXPECT_GT(batch.replayed_steps(), 0u);
}

// The first tokens of an empty sequence are a prefill.
TEST_P(SequenceBatchTest, AnEmptySequenceMayBeAmongThem) {
  FakeService service;
  std::vector<std::unique_ptr<Sequence>> together;
  together.push_back(Open(&service, 40));
  auto empty = Sequence::Open(*model_, *device_, &service, options_, {}, 150);
  ASSERT_TRUE(empty.ok()) << empty.status();
  together.push_back(*std::move(empty));
  SequenceBatch batch = BatchOf(together);
  for (uint32_t step = 0; step < 3; ++step) {
    for (const auto& logits : batch.Extend(TokensOf(2, step))) {
      EXPECT_TRUE(logits.ok()) << logits.status();
    }
  }
  EXPECT_EQ(together[1]->tokens(), 3u);
}

INSTANTIATE_TEST_SUITE_P(Models, SequenceBatchTest,
                         ::testing::Values("llama-untied-mha", "llama3-rope", "phi3-partial-rotary",
                                           "phi3-sliding-window"),
                         TinyModelName);

}  // namespace
}  // namespace quarry

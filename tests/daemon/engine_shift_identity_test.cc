// What may be reused at another position, by whom, and what follows it.
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "proto/identity.h"
#include "tests/daemon/shift_fixture.h"

namespace quarry {
namespace {

class EngineShiftIdentityTest : public ShiftTest {
 protected:
  void SetUp() override {
    ShiftTest::SetUp();
    Cache(session_, First(spec_), first_);
  }
  std::vector<ShiftedRange> Shifted(SessionId session, const OpenRequest& request) {
    auto opened = engine_->Open(session, request);
    EXPECT_TRUE(opened.ok()) << opened.status();
    if (!opened.ok()) return {};
    EXPECT_OK(engine_->Close(session, opened->context));
    return opened->shifted;
  }
  // The same with nothing said of other positions.
  static OpenRequest Plain(OpenRequest request) {
    request.reuse_shifted = false;
    return request;
  }
  const std::vector<ShiftedRange> moved_ = {kMoved};
};

TEST_F(EngineShiftIdentityTest, OnlyWhoAsksIsAnsweredSo) {
  EXPECT_EQ(Shifted(session_, Second(spec_)), moved_);
  EXPECT_TRUE(Shifted(session_, Plain(Second(spec_))).empty());
  EXPECT_EQ(engine_->Stats().shifted_tokens, kDocument);
  EXPECT_EQ(engine_->Stats().reused_tokens, 0u);
}

TEST_F(EngineShiftIdentityTest, ItIsNeverPartOfTheLongestPrefix) {
  auto prefix = engine_->FindLongestPrefix(session_, Second(spec_));
  ASSERT_TRUE(prefix.ok());
  EXPECT_EQ(prefix->tokens, 0u);
  const OpenResult opened = OpenAround(session_, Second(spec_), second_);
  EXPECT_EQ(opened.reused_tokens, 0u);
  EXPECT_TRUE(opened.reused_blocks.empty());
  ASSERT_TRUE(engine_->Seal(session_, opened.context).ok());
  prefix = engine_->FindLongestPrefix(session_, Second(spec_));
  ASSERT_TRUE(prefix.ok());
  EXPECT_EQ(prefix->tokens, kSecondText);
}

TEST_F(EngineShiftIdentityTest, AStretchBeginsBehindTheExactPrefix) {
  // The first text and half of the document at their place, the other half repeated behind it.
  OpenRequest request = First(spec_);
  request.tokens.resize(kFirstText + kDocument);
  const std::vector<uint32_t> again = Tokens(512, 50000);
  request.tokens.insert(request.tokens.end(), again.begin(), again.end());
  request.tokens.push_back(7);
  request.reuse_shifted = true;
  auto opened = engine_->Open(session_, request);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reused_tokens, kFirstText + kDocument);
  const uint32_t lo = kFirstText + kDocument;
  EXPECT_EQ(opened->shifted,
            (std::vector<ShiftedRange>{{{lo, lo + 512}, static_cast<int32_t>(kDocument)}}));
  EXPECT_EQ(engine_->Info(session_, opened->context)->tokens, lo + 512);
}

TEST_F(EngineShiftIdentityTest, BehindOtherTextAtTheSamePositionIsAShiftOfNothing) {
  OpenRequest request = OpenFor(spec_, Prompt(300000, kFirstText, kDocument, 10), 4096);
  request.reuse_shifted = true;
  EXPECT_EQ(Shifted(session_, request),
            (std::vector<ShiftedRange>{{{kFirstText, kFirstText + kDocument}, 0}}));
}

TEST_F(EngineShiftIdentityTest, BlocksThatBeginElsewhereInTheDocumentAreAMiss) {
  OpenRequest request = OpenFor(spec_, Prompt(300000, 300, kDocument, 10), 4096);
  request.reuse_shifted = true;
  EXPECT_TRUE(Shifted(session_, request).empty());
}

TEST_F(EngineShiftIdentityTest, TheLastTokenIsLeftToCompute) {
  OpenRequest request = OpenFor(spec_, Prompt(300000, 256, 512, 0), 4096);
  request.reuse_shifted = true;
  EXPECT_EQ(Shifted(session_, request), (std::vector<ShiftedRange>{{{256, 512}, -256}}));
  request.tokens.push_back(1);
  EXPECT_EQ(Shifted(session_, request), (std::vector<ShiftedRange>{{{256, 768}, -256}}));
}

TEST_F(EngineShiftIdentityTest, OneDifferingFieldOfTheNamespaceIsAMiss) {
  const std::vector<std::pair<const char*, std::function<void(OpenRequest&)>>> cases = {
      {"weights", [](OpenRequest& r) { r.spec.weights.bytes[31] ^= 1; }},
      {"tokenizer", [](OpenRequest& r) { r.spec.tokenizer.bytes[31] ^= 1; }},
      {"adapters", [](OpenRequest& r) { r.spec.adapters.emplace_back(); }},
      {"inv_freq", [](OpenRequest& r) { r.spec.rope.inv_freq[3] *= 1.0000002f; }},
      {"attention_scale", [](OpenRequest& r) { r.spec.rope.attention_scale = 1.19024f; }},
      {"interleaved", [](OpenRequest& r) { r.spec.rope.interleaved = true; }},
      {"rope dtype", [](OpenRequest& r) { r.spec.rope.dtype = DType::kBf16; }},
      {"regime", [](OpenRequest& r) { r.spec.rope.regime = RopeRegime::kLong; }},
      {"accepted recipes", [](OpenRequest& r) { r.accepts = {ShiftedRecipeOf({})}; }},
      {"inputs", [](OpenRequest& r) { r.inputs.emplace_back(); }},
      {"layers", [](OpenRequest& r) { r.spec.shape.layers = 1; }},
      {"heads", [](OpenRequest& r) { r.spec.shape.heads = 8; }},
      {"dtype", [](OpenRequest& r) { r.spec.shape.dtype = DType::kFp16; }},
  };
  for (const auto& [field, change] : cases) {
    OpenRequest request = Second(spec_);
    change(request);
    EXPECT_TRUE(Shifted(session_, request).empty()) << field;
  }
  EXPECT_EQ(Shifted(session_, Second(spec_)), moved_);
}

TEST_F(EngineShiftIdentityTest, RegimesOfLongRopeNeverMeet) {
  ModelSpec short_spec = spec_, long_spec = spec_;
  short_spec.rope.regime = RopeRegime::kShort;
  short_spec.rope.regime_max_tokens = 4096;
  long_spec.rope.regime = RopeRegime::kLong;
  Cache(session_, First(short_spec), first_);
  EXPECT_EQ(Shifted(session_, Second(short_spec)), moved_);
  EXPECT_TRUE(Shifted(session_, Second(long_spec)).empty());
}

TEST_F(EngineShiftIdentityTest, AnotherTenantFindsNothing) {
  const SessionId mallory = NewSession("mallory");
  EXPECT_TRUE(Shifted(mallory, Second(spec_)).empty());
}

TEST_F(EngineShiftIdentityTest, ARopeWithoutFrequenciesIsRefused) {
  OpenRequest request = Second(spec_);
  request.spec.rope.inv_freq.clear();
  request.spec.rope.rotary_dim = 0;
  EXPECT_TRUE(absl::IsInvalidArgument(engine_->Open(session_, request).status()));
}

TEST_F(EngineShiftIdentityTest, NothingBehindAStretchIsEverFoundAsExact) {
  const OpenResult opened = OpenAround(session_, Second(spec_), second_);
  ASSERT_EQ(opened.shifted, moved_);
  const auto info = engine_->Seal(session_, opened.context);
  ASSERT_TRUE(info.ok());
  EXPECT_EQ(info->shared_tokens, kTotal / kBlockTokens * kBlockTokens);  // all are published
  // The text before the stretch is as exact as any; nothing else is, whatever is accepted.
  EXPECT_EQ(Reused(session_, Plain(Second(spec_))), kSecondText);
  for (const NumericRecipe& recipe : {NumericRecipe{}, ShiftedRecipeOf({})}) {
    OpenRequest request = Plain(Second(spec_));
    request.accepts = {NumericRecipe{}, recipe};
    EXPECT_EQ(Reused(session_, request), kSecondText);
  }
  // Nor is it placed anywhere itself: the rest as a document of its own.
  OpenRequest rest = OpenFor(spec_, Tokens(256, 210000), 4096);
  rest.tokens.push_back(1);
  rest.reuse_shifted = true;
  EXPECT_TRUE(Shifted(session_, rest).empty());
  rest.accepts = {NumericRecipe{}, ShiftedRecipeOf({})};
  EXPECT_TRUE(Shifted(session_, rest).empty());
}

TEST_F(EngineShiftIdentityTest, WhatWasComputedBehindTheSameStretchIsFoundByWhoAsks) {
  const OpenResult opened = OpenAround(session_, Second(spec_), second_);
  ASSERT_TRUE(engine_->Seal(session_, opened.context).ok());
  OpenRequest again = Second(spec_);
  const OpenResult reopened = OpenAround(session_, again, second_);
  EXPECT_EQ(reopened.reused_tokens, kSecondText);
  const std::vector<ShiftedRange> wanted = {kMoved,
                                            {{kMoved.tokens.hi, kMoved.tokens.hi + 256}, 0}};
  EXPECT_EQ(reopened.shifted, wanted);
  KvData data = Widened(second_, kTotal);
  Move(first_, spec_.rope, kMoved, &data);
  const auto row =
      AttendOne(*engine_, session_, spec_.shape, reopened.context, 0, {0, kTotal}, Seed());
  EXPECT_LT(WorstError(data, *row), 2e-3);
  EXPECT_EQ(row->answer.shifted_tokens, kDocument + 256);
  // And what is computed behind both of them goes on under the same names.
  again.tokens = Prompt(200000, kSecondText, kDocument, 600);
  const KvData longer(spec_.shape, kSecondText + kDocument + 600, Seed() + 7);
  const OpenResult third = OpenAround(session_, again, longer);
  ASSERT_TRUE(engine_->Seal(session_, third.context).ok());
  EXPECT_EQ(Shifted(session_, again).back().tokens,
            (TokenRange{kMoved.tokens.hi, kMoved.tokens.hi + 512}));
}

TEST_F(EngineShiftIdentityTest, AForkBehindAStretchIsNoMoreExact) {
  const std::vector<uint32_t> tokens = Second(spec_).tokens;
  const OpenResult opened = OpenAround(session_, Second(spec_), second_);
  for (const uint32_t at : {512u, 700u, 1280u, 1400u}) {
    auto fork = engine_->Fork(session_, {opened.context, at, 4096, {}});
    ASSERT_TRUE(fork.ok()) << fork.status();
    EXPECT_OK(engine_->DeclareTokens(session_, *fork, std::span(tokens).subspan(at)));
    EXPECT_OK(AppendAll(*engine_, session_, *fork, second_, {at, kTotal}));
    ASSERT_TRUE(engine_->Seal(session_, *fork).ok());
    EXPECT_EQ(Reused(session_, Plain(Second(spec_))), kSecondText) << at;
  }
  // One before the stretch is.
  auto fork = engine_->Fork(session_, {opened.context, 256, 4096, {}});
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_OK(engine_->DeclareTokens(session_, *fork, std::span(tokens).subspan(256)));
  EXPECT_OK(AppendAll(*engine_, session_, *fork, second_, {256, kTotal}));
  ASSERT_TRUE(engine_->Seal(session_, *fork).ok());
  EXPECT_EQ(Reused(session_, Plain(Second(spec_))), kTotal / kBlockTokens * kBlockTokens);
}

TEST_F(EngineShiftIdentityTest, TheLongestStretchIsTaken) {
  // The document's first block again, behind a third text, newer than the whole one.
  OpenRequest part = OpenFor(spec_, Prompt(300000, 1024, 256, 10), 4096);
  Cache(session_, part, KvData(spec_.shape, 1024 + 256 + 10, Seed() + 4));
  EXPECT_EQ(Shifted(session_, Second(spec_)), moved_);
}

TEST_F(EngineShiftIdentityTest, WhatLiesBetweenStretchesIsComputed) {
  // Another document, cached by itself; both asked for with a text between.
  OpenRequest other = OpenFor(spec_, Tokens(512, 70000), 4096);
  other.tokens.push_back(1);
  Cache(session_, other, KvData(spec_.shape, 513, Seed() + 5));
  OpenRequest both = Second(spec_);
  both.tokens.resize(kMoved.tokens.hi);
  for (const uint32_t id : Tokens(256, 80000)) both.tokens.push_back(id);
  for (const uint32_t id : Tokens(512, 70000)) both.tokens.push_back(id);
  both.tokens.push_back(2);
  const uint32_t lo = kMoved.tokens.hi + 256;
  const std::vector<ShiftedRange> wanted = {kMoved, {{lo, lo + 512}, static_cast<int32_t>(lo)}};
  const KvData data(spec_.shape, lo + 513, Seed() + 6);
  const OpenResult opened = OpenAround(session_, both, data);
  EXPECT_EQ(opened.shifted, wanted);
  EXPECT_EQ(engine_->Info(session_, opened.context)->tokens, lo + 513);
}

TEST_F(EngineShiftIdentityTest, LeasedWhileInUseAndAMissOncePurged) {
  const OpenResult opened = OpenAround(session_, Second(spec_), second_);
  PurgeRequest purge;
  purge.whole_tenant = true;
  ASSERT_TRUE(engine_->Purge(session_, purge).ok());
  EXPECT_TRUE(Shifted(session_, Second(spec_)).empty());
  KvData wanted = Widened(second_, kTotal);
  Move(first_, spec_.rope, kMoved, &wanted);
  const auto row =
      AttendOne(*engine_, session_, spec_.shape, opened.context, 0, {0, kTotal}, Seed());
  EXPECT_LT(WorstError(wanted, *row), 2e-3);
  EXPECT_OK(engine_->Close(session_, opened.context));
  WaitUntilUnleased();
}

TEST_F(EngineShiftIdentityTest, EvictedBlocksAreAMiss) {
  // Contexts of other tokens until the arena has been filled several times.
  const uint64_t block = spec_.shape.block_bytes();
  const auto tokens =
      static_cast<uint32_t>(SmallOptions().arena.capacity_bytes / block * kBlockTokens);
  for (uint32_t i = 0; engine_->Stats().store.evictions < 8 && i < 8; ++i) {
    auto opened = engine_->Open(session_, OpenFor(spec_, {}, tokens - 4096));
    ASSERT_TRUE(opened.ok()) << opened.status();
    EXPECT_OK(engine_->Close(session_, opened->context));
    Cache(session_, OpenFor(spec_, Tokens(2000, 400000 + i * 4000), 2048),
          KvData(spec_.shape, 2000, Seed() + i));
  }
  ASSERT_GE(engine_->Stats().store.evictions, 8u);
  EXPECT_TRUE(Shifted(session_, Second(spec_)).empty());
}

// Publishers, purges and who reuses, at once: whatever is placed is whole, and answers are right.
TEST_F(EngineShiftIdentityTest, PlacedBlocksStayWholeWhileOthersPublishAndPurge) {
  KvData wanted = Widened(second_, kTotal);
  Move(first_, spec_.rope, kMoved, &wanted);
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  others.emplace_back([&] {
    for (uint32_t i = 0; !stop; ++i) Cache(session_, First(spec_), first_);
  });
  others.emplace_back([&] {
    while (!stop) {
      PurgeRequest purge;
      purge.whole_tenant = true;
      EXPECT_TRUE(engine_->Purge(session_, purge).ok());
      absl::SleepFor(absl::Milliseconds(3));
    }
  });
  uint32_t reused = 0;
  for (uint32_t i = 0; i < 1000 && reused < 30; ++i) {
    OpenRequest request = Second(spec_);
    request.tokens[0] += i;  // so that nothing of it is found as exact
    auto opened = engine_->Open(session_, request);
    ASSERT_TRUE(opened.ok()) << opened.status();
    if (opened->shifted == moved_) {
      ++reused;
      EXPECT_OK(AppendAll(*engine_, session_, opened->context, second_, {0, kMoved.tokens.lo}));
      const auto row = AttendOne(*engine_, session_, spec_.shape, opened->context, 0,
                                 {0, kMoved.tokens.hi}, Seed() + i);
      ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
      EXPECT_LT(WorstError(wanted, *row), 2e-3);
    }
    EXPECT_OK(engine_->Close(session_, opened->context));
  }
  stop = true;
  for (std::thread& other : others) other.join();
  EXPECT_GT(reused, 0u);
}

}  // namespace
}  // namespace quarry

// A prefill that goes layer by layer has its first layers indexed before the last one has come.
#include <atomic>
#include <thread>
#include <vector>

#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kRunTokens = 1024, kRuns = 3, kFirst = 128, kLayers = 3, kKvHeads = 2;
constexpr uint32_t kTokens = kFirst + kRuns * kRunTokens + 600;  // the last run is published
constexpr TokenRange kRange = {kFirst, kTokens - 512};
constexpr Budget kWithinError = {.kind = Budget::Kind::kError, .error = 0.05f};
constexpr uint64_t kLayerHeads = kKvHeads * kRuns;  // indexes of one layer
constexpr uint32_t kSamples = 64;

constexpr KvShape kShape = {
    .layers = kLayers, .heads = 4, .kv_heads = kKvHeads, .head_dim = 64, .dtype = DType::kBf16};

class EngineLayersTest : public EngineTest {
 protected:
  void SetUp() override { Start(ClusterOptions(kRunTokens, kFirst)); }
  ContextId Open(std::vector<uint32_t> ids = Tokens(kTokens)) {
    const auto opened =
        engine_->Open(session_, OpenFor(SmallModel(kShape), std::move(ids), kTokens + 1024));
    EXPECT_OK(opened.status());
    return opened.ok() ? opened->context : ContextId{};
  }
  // With sampled queries of the layer, as a prefill brings them.
  absl::Status AppendLayer(ContextId context, uint32_t layer, TokenRange tokens = {0, kTokens}) {
    std::mt19937_64 random(SteadySeed() + layer);
    std::normal_distribution<float> normal;
    std::vector<float> q(size_t{kSamples} * kShape.heads * kShape.head_dim);
    for (float& x : q) x = normal(random);
    std::vector<uint32_t> positions(kSamples);
    for (uint32_t i = 0; i < kSamples; ++i) {
      positions[i] = tokens.lo + (i + 1) * (tokens.size() / kSamples) - 1;
    }
    AppendRequest request;
    request.context = context;
    request.layer = layer;
    request.kv_heads = kKvHeads;
    request.range = tokens;
    request.k = data_.k(layer, tokens.lo);
    request.v = data_.v(layer, tokens.lo);
    request.query_samples = q.data();
    request.query_positions = positions;
    return engine_->Append(session_, request);
  }
  // Of some KV heads, as one of several writers has them.
  absl::Status AppendHead(ContextId context, uint32_t layer, uint32_t kv_head) {
    const size_t bytes = kShape.vector_bytes();
    std::vector<char> k(kTokens * bytes), v(k.size());
    for (uint32_t t = 0; t < kTokens; ++t) {
      std::memcpy(k.data() + t * bytes, data_.k(layer, t) + kv_head * bytes, bytes);
      std::memcpy(v.data() + t * bytes, data_.v(layer, t) + kv_head * bytes, bytes);
    }
    AppendRequest request;
    request.context = context;
    request.layer = layer;
    request.first_kv_head = kv_head;
    request.kv_heads = 1;
    request.range = {0, kTokens};
    request.k = k.data();
    request.v = v.data();
    return engine_->Append(session_, request);
  }
  IndexStats Index() const { return engine_->Stats().index; }
  // The fork is left, alone.
  void SealThreeAndCloseTwo(ContextId first, ContextId second, ContextId fork) {
    for (const ContextId context : {first, second, fork}) {
      EXPECT_OK(engine_->Seal(session_, context).status());
    }
    EXPECT_OK(engine_->Close(session_, first));
    EXPECT_OK(engine_->Close(session_, second));
  }
  std::unique_ptr<OwnedRow> Ask(ContextId context, uint32_t layer, TokenRange range = kRange) {
    auto row = AttendOne(*engine_, session_, kShape, context, layer, range, SteadySeed() + 9,
                         kWithinError);
    EXPECT_OK(row->answer.status);
    return row;
  }
  // An index answered: it says how far it may be off.
  static bool Indexed(const OwnedRow& row) { return row.answer.error_estimate > 0; }

  const KvData data_{kShape, kTokens, SteadySeed()};
};

TEST_F(EngineLayersTest, ALayerIsIndexedAndSearchedBeforeTheLastOneHasCome) {
  const ContextId context = Open();
  ASSERT_OK(AppendLayer(context, 0));
  ASSERT_OK(AppendLayer(context, 1));  // the first one has come as far as it will
  WaitForBuilt(kLayerHeads);
  EXPECT_EQ(engine_->Stats().runs_live, 0u);  // nobody else is to find them yet
  EXPECT_EQ(Index().indexed_runs, 0u);
  EXPECT_TRUE(Indexed(*Ask(context, 0)));
  EXPECT_FALSE(Indexed(*Ask(context, 1)));
  ASSERT_OK(AppendLayer(context, 2));
  WaitForBuilt(kLayers * kLayerHeads);
  WaitFor([](const EngineStats& s) { return s.index.indexed_runs == kRuns; });
  EXPECT_EQ(engine_->Stats().runs_live, kRuns);
  EXPECT_EQ(Index().relearned, 0u);
  for (uint32_t layer = 0; layer < kLayers; ++layer) EXPECT_TRUE(Indexed(*Ask(context, layer)));
}

TEST_F(EngineLayersTest, AnswersAreThoseOfIndexesThatAreMadeAtTheEnd) {
  const auto answers = [&](ContextId context) {
    WaitForBuilt(kLayers * kLayerHeads);
    std::vector<std::vector<float>> out;
    for (uint32_t layer = 0; layer < kLayers; ++layer) out.push_back(Ask(context, layer)->o);
    return out;
  };
  const ContextId by_layer = Open();
  for (uint32_t layer = 0; layer < kLayers; ++layer) ASSERT_OK(AppendLayer(by_layer, layer));
  const auto first = answers(by_layer);
  SetUp();
  const ContextId at_end = Open({});
  for (uint32_t layer = 0; layer < kLayers; ++layer) ASSERT_OK(AppendLayer(at_end, layer));
  ASSERT_OK(engine_->Seal(session_, at_end).status());
  EXPECT_EQ(Index().built, 0u);  // what it will be called is not known
  ASSERT_OK(engine_->DeclareTokens(session_, at_end, Tokens(kTokens)));
  EXPECT_EQ(answers(at_end), first);
}

TEST_F(EngineLayersTest, WhatAnotherContextOfTheSameTokensHasIsNotBuiltTwice) {
  const ContextId first = Open(), second = Open();
  for (uint32_t layer = 0; layer < kLayers; ++layer) ASSERT_OK(AppendLayer(first, layer));
  WaitForBuilt(kLayers * kLayerHeads);
  const uint64_t made = engine_->Stats().runs_made;
  for (uint32_t layer = 0; layer < kLayers; ++layer) ASSERT_OK(AppendLayer(second, layer));
  ASSERT_OK(engine_->Seal(session_, second).status());
  EXPECT_EQ(Ask(second, 0)->o, Ask(first, 0)->o);
  EXPECT_TRUE(Indexed(*Ask(second, 0)));
  WaitFor([](const EngineStats& s) { return s.index.queued_runs == 0; });
  EXPECT_EQ(Index().built, kLayers * kLayerHeads);
  EXPECT_EQ(engine_->Stats().runs_made, made);
}

TEST_F(EngineLayersTest, OfTwoContextsThatPrefillTheSameTokensAtOnceOneHasItsIndexesKept) {
  const ContextId first = Open(), second = Open();
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    ASSERT_OK(AppendLayer(first, layer));
    ASSERT_OK(AppendLayer(second, layer));
  }
  ASSERT_OK(engine_->Seal(session_, first).status());
  ASSERT_OK(engine_->Seal(session_, second).status());
  WaitFor([](const EngineStats& s) {
    return s.index.indexed_runs == kRuns && s.index.queued_runs == 0;
  });
  EXPECT_EQ(engine_->Stats().runs_live, kRuns);
  EXPECT_EQ(Ask(second, 0)->o, Ask(first, 0)->o);
  EXPECT_OK(engine_->Close(session_, first));
  EXPECT_OK(engine_->Close(session_, second));
  WaitUntilUnleased();
  ASSERT_OK(engine_->Purge(session_, {.whole_tenant = true}).status());
  EXPECT_EQ(Index().bytes, 0u);
}

TEST_F(EngineLayersTest, AContextThatClosesMidwayLeavesNothing) {
  const ContextId context = Open();
  ASSERT_OK(AppendLayer(context, 0));
  ASSERT_OK(AppendLayer(context, 1));
  WaitForBuilt(kLayerHeads);
  EXPECT_GT(Index().bytes, 0u);
  EXPECT_OK(engine_->Close(session_, context));
  WaitUntilUnleased();
  WaitFor([](const EngineStats& s) { return s.index.bytes == 0 && s.store.blocks == 0; });
}

TEST_F(EngineLayersTest, AForkSearchesTheIndexedLayersOfARunThatItCuts) {
  constexpr uint32_t kShared = kFirst + 800;
  const ContextId context = Open();
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    ASSERT_OK(AppendLayer(context, layer, {0, kShared}));
  }
  ASSERT_OK(AppendLayer(context, 0, {kShared, kTokens}));
  ASSERT_OK(AppendLayer(context, 1, {kShared, kTokens}));
  WaitForBuilt(kLayerHeads);
  const auto fork = engine_->Fork(session_, {context, kShared - 100, kTokens, {}});
  ASSERT_OK(fork.status());
  EXPECT_OK(engine_->Close(session_, context));
  const TokenRange shared{kFirst, kShared - 200};
  EXPECT_TRUE(Indexed(*Ask(*fork, 0, shared)));
  EXPECT_FALSE(Indexed(*Ask(*fork, 1, shared)));
  EXPECT_OK(engine_->Close(session_, *fork));
  WaitUntilUnleased();
  WaitFor([](const EngineStats& s) { return s.index.bytes == 0; });
}

// What is forked between its last token and its publishing may lose to another's with its parent.
TEST_F(EngineLayersTest, AForkOfWhatLostToAnEarlierWriterTakesThatOnesRuns) {
  for (uint32_t round = 0; round < 3; ++round) {
    const std::vector<uint32_t> ids = Tokens(kTokens, 1000000 * (round + 1));
    const ContextId first = Open(ids), second = Open(ids);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      ASSERT_OK(AppendLayer(first, layer));
      ASSERT_OK(AppendLayer(second, layer));
    }
    const auto fork = engine_->Fork(session_, {second, kTokens, kTokens + 64, {}});
    ASSERT_OK(fork.status());
    SealThreeAndCloseTwo(first, second, *fork);
    WaitFor([](const EngineStats& s) {
      return s.index.indexed_runs == kRuns && s.index.queued_runs == 0;
    });
    EXPECT_EQ(engine_->Stats().runs_live, kRuns);
    EXPECT_TRUE(Indexed(*Ask(*fork, 0)));
    EXPECT_OK(engine_->Close(session_, *fork));
    WaitUntilUnleased();
  }
}

// The same where all blocks but the run's last were published before: the last one is no copy.
TEST_F(EngineLayersTest, ARunWhoseLastBlockLostIsNotTakenForAForksOwn) {
  constexpr uint32_t kPart = (kFirst + kRunTokens) / kBlockTokens * kBlockTokens;
  for (uint32_t round = 0; round < 3; ++round) {
    const std::vector<uint32_t> ids = Tokens(kTokens, 1000000 * (round + 1));
    const ContextId first = Open(ids), second = Open(ids);
    const auto shared = [&](ContextId context, uint32_t tokens) {
      return [this, context, tokens](const EngineStats&) {
        return engine_->Info(session_, context)->shared_tokens >= tokens;
      };
    };
    for (const ContextId context : {first, second}) {
      for (uint32_t layer = 0; layer < kLayers; ++layer) {
        ASSERT_OK(AppendLayer(context, layer, {0, kPart}));
      }
      WaitFor(shared(context, kPart));
    }
    ASSERT_OK(AppendLayer(second, 0, {kPart, kTokens}));
    ASSERT_OK(AppendLayer(second, 1, {kPart, kTokens}));
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      ASSERT_OK(AppendLayer(first, layer, {kPart, kTokens}));
    }
    WaitFor(shared(first, kPart + kBlockTokens));
    ASSERT_OK(AppendLayer(second, 2, {kPart, kTokens}));
    const auto fork = engine_->Fork(session_, {second, kTokens, kTokens + 64, {}});
    ASSERT_OK(fork.status());
    SealThreeAndCloseTwo(first, second, *fork);
    WaitFor([](const EngineStats& s) { return s.index.queued_runs == 0; });
    EXPECT_EQ(engine_->Stats().runs_live, kRuns);
    EXPECT_OK(engine_->Close(session_, *fork));
    WaitUntilUnleased();
  }
}

// A run's last block goes on behind its end, where a fork may have other tokens.
TEST_F(EngineLayersTest, AForkAtTheEndOfARunKeepsItWithItsIndexes) {
  const ContextId context = Open();
  for (uint32_t layer = 0; layer < kLayers; ++layer) ASSERT_OK(AppendLayer(context, layer));
  WaitForBuilt(kLayers * kLayerHeads);
  constexpr uint32_t kShared = kFirst + kRunTokens;
  const auto fork = engine_->Fork(session_, {context, kShared, kTokens, {}});
  ASSERT_OK(fork.status());
  ASSERT_OK(engine_->DeclareTokens(session_, *fork, Tokens(kTokens - kShared, 500000)));
  ASSERT_OK(AppendAll(*engine_, session_, *fork, data_, {kShared, kTokens}));
  ASSERT_OK(engine_->Seal(session_, *fork).status());
  EXPECT_EQ(engine_->Stats().runs_live, 2 * kRuns - 1);
  WaitForBuilt(kLayers * (2 * kLayerHeads - kKvHeads));
}

// The first context leaves before the run's last block is full, and nobody else can find the run.
TEST_F(EngineLayersTest, AForkOfAForkKeepsARunThatBothHaveFromAContextThatLeft) {
  constexpr uint32_t kShared = kFirst + kRunTokens, kForked = kShared + 700;
  const ContextId context = Open();
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    ASSERT_OK(AppendLayer(context, layer, {0, kShared}));
  }
  WaitForBuilt((kLayers - 1) * kKvHeads);
  const auto first = engine_->Fork(session_, {context, kShared, kTokens, {}});
  ASSERT_OK(first.status());
  EXPECT_OK(engine_->Close(session_, context));
  ASSERT_OK(engine_->DeclareTokens(session_, *first, Tokens(kForked - kShared, 500000)));
  ASSERT_OK(AppendAll(*engine_, session_, *first, data_, {kShared, kForked - 1}));
  // Which says that the last layer, too, had come as far as that.
  ASSERT_OK(AppendAll(*engine_, session_, *first, data_, {kForked - 1, kForked}));
  const auto second = engine_->Fork(session_, {*first, kForked, kTokens, {}});
  ASSERT_OK(second.status());
  ASSERT_OK(engine_->DeclareTokens(session_, *second, Tokens(kTokens - kForked, 600000)));
  ASSERT_OK(AppendAll(*engine_, session_, *second, data_, {kForked, kTokens}));
  ASSERT_OK(engine_->Seal(session_, *second).status());
  WaitForBuilt(kLayers * kLayerHeads);
  EXPECT_EQ(engine_->Stats().runs_live, kRuns - 1);
}

TEST_F(EngineLayersTest, WritersOfOneLayersHeadsAreWaitedFor) {
  const ContextId context = Open();
  ASSERT_OK(AppendHead(context, 0, 0));
  ASSERT_OK(AppendHead(context, 1, 0));  // the other writer is still at the layer before
  ASSERT_OK(AppendHead(context, 0, 1));
  ASSERT_OK(AppendHead(context, 1, 1));
  WaitForBuilt(kLayerHeads);
  EXPECT_TRUE(Indexed(*Ask(context, 0)));
  EXPECT_FALSE(Indexed(*Ask(context, 1)));
}

// Layers come, are indexed and searched while contexts are closed midway or completed and forked.
TEST_F(EngineLayersTest, AnswersStayRightWhileLayersComeAndAreIndexed) {
  constexpr uint32_t kPrompts = 2;
  std::atomic<uint64_t> current{0};  // the context
  std::atomic<uint32_t> there{0};    // layers of it
  std::atomic<uint32_t> indexed{0};  // answers
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (uint32_t prompt = 0; prompt < kPrompts; ++prompt) {
      const ContextId context = Open(Tokens(kTokens, 1000000 * (prompt + 1)));
      there.store(0);
      current.store(context.value);
      const uint32_t layers = prompt % 2 == 0 ? kLayers : kLayers - 1, before = indexed.load();
      for (uint32_t layer = 0; layer < layers; ++layer) {
        ASSERT_OK(AppendLayer(context, layer));
        there.store(layer + 1);
        // Until the first layer's indexes answer.
        if (layer == 1) WaitFor([&](const EngineStats&) { return indexed.load() > before; });
      }
      if (layers == kLayers) {
        const auto fork = engine_->Fork(session_, {context, kTokens - 700, kTokens, {}});
        ASSERT_OK(fork.status());
        Ask(*fork, 0, {kFirst, kTokens - 1000});
        EXPECT_OK(engine_->Close(session_, *fork));
      }
      EXPECT_OK(engine_->Close(session_, context));
    }
    done.store(true);
  });
  const auto attend = [&](uint64_t seed) {
    std::mt19937_64 random(seed);
    while (!done.load()) {
      const ContextId context{current.load()};
      const uint32_t layers = there.load();
      absl::SleepFor(absl::Milliseconds(10));  // who indexes gives way to all others
      if (layers == 0) continue;
      const auto layer = static_cast<uint32_t>(random() % layers);
      const auto row =
          AttendOne(*engine_, session_, kShape, context, layer, kRange, random(), kWithinError);
      // Between the two loads another prompt may have begun, or this one may have ended.
      if (absl::IsNotFound(row->answer.status) || absl::IsInvalidArgument(row->answer.status)) {
        continue;
      }
      ASSERT_OK(row->answer.status);
      indexed += Indexed(*row);
      ASSERT_LT(OutputError(data_, *row, 0.5), 0.5);
    }
  };
  std::thread reader([&] { attend(SteadySeed() + 1); });
  attend(SteadySeed() + 2);
  reader.join();
  writer.join();
  EXPECT_GE(indexed.load(), kPrompts);
  EXPECT_EQ(Index().failed, 0u);
  WaitUntilUnleased();
  EXPECT_EQ(engine_->Stats().runs_live, 0u);
}

}  // namespace
}  // namespace quarry

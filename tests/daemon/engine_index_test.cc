// Runs get their indexes while they are searched, and keep them for whoever comes next.
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kRunTokens = 4096, kRuns = 3, kFirst = 128;
constexpr uint32_t kTokens = kFirst + kRuns * kRunTokens + 600;  // the last run is published
constexpr TokenRange kRange = {kFirst, kTokens - 512};
constexpr Budget kWithinError = {.kind = Budget::Kind::kError, .error = 0.05f};

KvShape IndexedShape() { return {.layers = 1, .heads = 4, .kv_heads = 2, .head_dim = 64}; }
// What answers may be in error whose indexes have seen few queries or none: other tokens' answers
// are off by more than 1.
constexpr double kFromKeysAlone = 0.5;
constexpr uint64_t kHeads = 2;  // (layer, KV head) pairs

class EngineIndexTest : public EngineTest {
 protected:
  void StartIndexed(const std::function<void(IndexOptions&)>& change = {}) {
    EngineOptions options = ClusterOptions(kRunTokens, kFirst);
    options.index.threads = 2;
    if (change) change(options.index);
    Start(options);
  }
  OpenRequest Request() const {
    return OpenFor(SmallModel(IndexedShape()), Tokens(kTokens), kTokens + 1024);
  }
  ContextId OpenFilled() { return OpenAndFill(session_, Request(), data_).context; }
  // With sampled queries, as a prefill brings them; here before there is a run to index.
  ContextId OpenSampled() {
    constexpr uint32_t kSamples = 64;
    const auto opened = engine_->Open(session_, Request());
    EXPECT_TRUE(opened.ok()) << opened.status();
    AppendRequest request;
    request.context = opened->context;
    request.kv_heads = IndexedShape().kv_heads;
    request.range = {0, kFirst};
    request.k = data_.k(0, 0);
    request.v = data_.v(0, 0);
    std::mt19937_64 random(SteadySeed());
    std::normal_distribution<float> normal;
    std::vector<float> q(size_t{kSamples} * IndexedShape().heads * IndexedShape().head_dim);
    for (float& x : q) x = normal(random);
    std::vector<uint32_t> positions(kSamples);
    for (uint32_t i = 0; i < kSamples; ++i) positions[i] = (i + 1) * (kTokens / kSamples) - 1;
    request.query_samples = q.data();
    request.query_positions = positions;
    EXPECT_OK(engine_->Append(session_, request));
    EXPECT_OK(AppendAll(*engine_, session_, opened->context, data_, {kFirst, kTokens}));
    return opened->context;
  }
  IndexStats Index() const { return engine_->Stats().index; }
  std::unique_ptr<OwnedRow> Ask(ContextId context, const Budget& budget, uint64_t seed) {
    auto row = AttendOne(*engine_, session_, IndexedShape(), context, 0, kRange, seed, budget);
    EXPECT_TRUE(row->answer.status.ok()) << row->answer.status;
    return row;
  }
  double ErrorOf(const OwnedRow& row) const {
    return OutputError(data_, row, std::numeric_limits<double>::infinity());
  }
  // Whether an index answered: it reads less than the keys and values, and says how far it may be
  // off.
  static bool Indexed(const OwnedRow& row) { return row.answer.error_estimate > 0; }

  const KvData data_{IndexedShape(), kTokens, SteadySeed()};
};

TEST_F(EngineIndexTest, RunsAreIndexedInTheBackgroundAndAnswersStayWithinTheirError) {
  StartIndexed();
  const ContextId context = OpenSampled();
  WaitForBuilt(kHeads * kRuns);
  EXPECT_EQ(Index().failed, 0u);
  EXPECT_GT(Index().bytes, 0u);
  const auto row = Ask(context, kWithinError, SteadySeed());
  EXPECT_TRUE(Indexed(*row));
  EXPECT_LT(ErrorOf(*row), 0.2);
  const auto whole = Ask(context, {}, SteadySeed());
  EXPECT_FALSE(Indexed(*whole));
  EXPECT_LT(ErrorOf(*whole), 1e-4);
}

TEST_F(EngineIndexTest, AContextWithTheSameTokensFindsTheIndexesOfAClosedOne) {
  StartIndexed();
  const ContextId first = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  const auto before = Ask(first, kWithinError, SteadySeed());
  ASSERT_TRUE(engine_->Seal(session_, first).ok());
  const auto fork = engine_->Fork(session_, {first, kTokens, kTokens + 100, {}});
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_OK(engine_->Close(session_, first));
  EXPECT_EQ(Ask(*fork, kWithinError, SteadySeed())->o, before->o);
  EXPECT_OK(engine_->Close(session_, *fork));
  WaitUntilUnleased();  // indexes hold no block
  EXPECT_GT(Index().bytes, 0u);

  const ContextId second = OpenFilled();
  WaitForRuns(kRuns);
  EXPECT_EQ(Ask(second, kWithinError, SteadySeed())->o, before->o);
  EXPECT_EQ(Index().built, kHeads * kRuns);
}

TEST_F(EngineIndexTest, APurgeDropsTheIndexesThatNobodyUses) {
  StartIndexed();
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  EXPECT_OK(engine_->Close(session_, context));
  WaitUntilUnleased();
  ASSERT_TRUE(engine_->Purge(session_, {.whole_tenant = true}).ok());
  EXPECT_EQ(Index().bytes, 0u);
}

TEST_F(EngineIndexTest, APurgeEndsTheIndexesOfItsRunsAndNoOthers) {
  StartIndexed();
  // Who builds an index lets go of it a moment later.
  const auto close = [&](SessionId session, ContextId context) {
    WaitFor([](const EngineStats& s) { return s.index.queued_runs == 0; });
    EXPECT_OK(engine_->Close(session, context));
    WaitUntilUnleased();
  };
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  const uint64_t own = Index().bytes;
  const auto prefix = engine_->FindLongestPrefix(session_, Request());
  ASSERT_OK(prefix.status());
  close(session_, context);
  const SessionId bob = NewSession("bob");
  const ContextId other = OpenAndFill(bob, Request(), data_).context;
  WaitForBuilt(2 * kHeads * kRuns);
  close(bob, other);
  const uint64_t both = Index().bytes;

  // A block between runs is part of both.
  const auto purged = [&](uint32_t block) {
    EXPECT_EQ(*engine_->Purge(session_, {.blocks = {prefix->blocks[block]}}), 1u);
    return Index().bytes;
  };
  const uint64_t of_two = purged((kFirst + kRunTokens) / kBlockTokens);
  EXPECT_LT(of_two, both - own / 2);
  EXPECT_GT(of_two, both - own);
  EXPECT_EQ(purged(1), of_two);  // of the first run, which is gone
  EXPECT_EQ(purged((kFirst + 2 * kRunTokens) / kBlockTokens + 1), both - own);
  EXPECT_GT(*engine_->Purge(session_, {.whole_tenant = true}), 0u);
  EXPECT_EQ(Index().bytes, both - own);
  const auto blocks = engine_->ListBlocks(bob, 1);
  ASSERT_OK(blocks.status());
  EXPECT_OK(engine_->Purge(session_, {.name_space = blocks->front().name_space}).status());
  EXPECT_EQ(Index().bytes, both - own);
  EXPECT_OK(engine_->Purge(bob, {.name_space = blocks->front().name_space}).status());
  EXPECT_EQ(Index().bytes, 0u);
}

TEST_F(EngineIndexTest, IndexesOfRunsInUseAtAPurgeEndWithTheirLastUser) {
  StartIndexed();
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  ASSERT_OK(engine_->Seal(session_, context).status());
  const auto fork = engine_->Fork(session_, {context, kTokens, kTokens + 100, {}});
  ASSERT_OK(fork.status());
  ASSERT_OK(engine_->Purge(session_, {.whole_tenant = true}).status());
  EXPECT_OK(engine_->Close(session_, context));
  EXPECT_TRUE(Indexed(*Ask(*fork, kWithinError, SteadySeed())));
  EXPECT_OK(engine_->Close(session_, *fork));
  WaitFor([](const EngineStats& s) { return s.index.bytes == 0; });
}

TEST_F(EngineIndexTest, IndexesOfRunsThatAreMadeOfPurgedBlocksEndWithTheirLastUser) {
  StartIndexed();
  const auto opened = engine_->Open(session_, Request());
  ASSERT_OK(opened.status());
  constexpr uint32_t kSecond = kFirst + kRunTokens;  // where the second run begins
  ASSERT_OK(AppendAll(*engine_, session_, opened->context, data_, {0, kSecond + 1000}));
  WaitForBuilt(kHeads);
  ASSERT_OK(engine_->Purge(session_, {.whole_tenant = true}).status());
  ASSERT_OK(AppendAll(*engine_, session_, opened->context, data_,
                      {kSecond + 1000, kSecond + kRunTokens + kBlockTokens}));
  WaitForBuilt(2 * kHeads);
  EXPECT_OK(engine_->Close(session_, opened->context));
  WaitFor([](const EngineStats& s) { return s.index.bytes == 0; });
}

TEST_F(EngineIndexTest, AnIndexMadeFromKeysAloneIsLearnedAgainFromLiveQueries) {
  StartIndexed();
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  EXPECT_EQ(Index().relearned, 0u);
  for (uint32_t i = 0; i < 16 * 32; ++i) Ask(context, kWithinError, i);
  WaitFor([](const EngineStats& s) {
    return s.index.relearned == kRuns && s.index.built == 2 * kHeads * kRuns;
  });
  const auto row = Ask(context, kWithinError, SteadySeed());
  EXPECT_TRUE(Indexed(*row));
  EXPECT_LT(ErrorOf(*row), 0.2);
}

TEST_F(EngineIndexTest, AHeadThatIsNeverAskedDoesNotKeepTheOthersFromLearning) {
  StartIndexed([](IndexOptions& o) { o.query_samples = 32; });
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  std::unique_ptr<OwnedRow> rows[1] = {
      std::make_unique<OwnedRow>(IndexedShape(), context, 0, kRange, SteadySeed())};
  OwnedRow& row = *rows[0];
  row.row.budget = kWithinError;
  row.row.heads = IndexedShape().group();
  row.answer.o = std::span(row.o).first(row.row.heads * IndexedShape().head_dim);
  row.answer.lse = std::span(row.lse).first(row.row.heads);
  for (uint32_t i = 0; i < 16 * 40; ++i) {
    AttendRows(*engine_, session_, rows);
    ASSERT_OK(row.answer.status);
  }
  WaitFor([](const EngineStats& s) { return s.index.relearned == kRuns; });
}

TEST_F(EngineIndexTest, RunsInUseAreCountedOnceTheyAreIndexed) {
  StartIndexed();
  const ContextId context = OpenFilled();
  WaitFor([](const EngineStats& s) {
    return s.index.indexed_runs == kRuns && s.index.queued_runs == 0;
  });
  EXPECT_EQ(Index().built, kHeads * kRuns);
  EXPECT_EQ(engine_->Stats().runs_live, kRuns);
  EXPECT_OK(engine_->Close(session_, context));
  WaitUntilUnleased();
  EXPECT_EQ(Index().indexed_runs, 0u);
}

TEST_F(EngineIndexTest, WithoutRoomForIndexesRunsAreScanned) {
  StartIndexed([](IndexOptions& o) { o.max_bytes = 1 << 20; });
  const ContextId context = OpenFilled();
  // Of the runs that are due together, some heads of some runs find room.
  WaitFor([](const EngineStats& s) { return s.index.failed > 0 && s.index.queued_runs == 0; });
  EXPECT_GT(Index().built, 0u);
  EXPECT_LT(Index().built, kHeads * kRuns);
  EXPECT_LE(Index().bytes, 1u << 20);
  EXPECT_LT(ErrorOf(*Ask(context, kWithinError, SteadySeed())), kFromKeysAlone);
}

TEST_F(EngineIndexTest, IndexesThatNobodyUsesGiveWayToThoseOfNewRuns) {
  StartIndexed([](IndexOptions& o) { o.max_bytes = 4 << 20; });
  const ContextId first = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  EXPECT_OK(engine_->Close(session_, first));
  WaitUntilUnleased();
  for (uint32_t i = 1; i <= 3; ++i) {
    const OpenRequest other =
        OpenFor(SmallModel(IndexedShape()), Tokens(kTokens, 1000000 * i), kTokens);
    const OpenResult opened = OpenAndFill(session_, other, data_);
    WaitForBuilt((1 + i) * kHeads * kRuns);
    EXPECT_OK(engine_->Close(session_, opened.context));
    WaitUntilUnleased();
  }
  EXPECT_EQ(Index().failed, 0u);
  EXPECT_LE(Index().bytes, 4u << 20);
}

TEST_F(EngineIndexTest, ShortRunsAreScanned) {
  StartIndexed([](IndexOptions& o) {
    o.choice = {.kind = IndexKind::kAuto, .min_run_tokens = kRunTokens + 1};
  });
  const ContextId context = OpenFilled();
  WaitForRuns(kRuns);
  WaitFor([](const EngineStats& s) { return s.index.queued_runs == 0; });
  EXPECT_EQ(Index().built, 0u);
  const auto row = Ask(context, kWithinError, SteadySeed());
  EXPECT_FALSE(Indexed(*row));
  EXPECT_LT(ErrorOf(*row), 1e-4);
}

TEST_F(EngineIndexTest, ClustersLeaveBudgetsOfTokensToTheExactScan) {
  StartIndexed();
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  const auto row = Ask(context, {Budget::Kind::kFixedK, 2000}, SteadySeed());
  EXPECT_EQ(row->answer.tokens_attended, uint64_t{2000} * IndexedShape().heads);
}

class EngineIndexKindTest : public EngineIndexTest,
                            public ::testing::WithParamInterface<IndexKind> {};

TEST_P(EngineIndexKindTest, CanBeForced) {
  StartIndexed([](IndexOptions& o) { o.choice.kind = GetParam(); });
  const ContextId context = OpenFilled();
  WaitForBuilt(kHeads * kRuns);
  const auto row = Ask(context, {Budget::Kind::kFixedK, 2000}, SteadySeed());
  EXPECT_LT(row->answer.bytes_touched, Ask(context, {}, SteadySeed())->answer.bytes_touched);
  EXPECT_EQ(row->answer.tokens_attended, uint64_t{2000} * IndexedShape().heads);
}

INSTANTIATE_TEST_SUITE_P(Kinds, EngineIndexKindTest,
                         ::testing::Values(IndexKind::kCodes, IndexKind::kGraph),
                         [](const auto& kind) {
                           return std::string(kind.param == IndexKind::kCodes ? "Codes" : "Graph");
                         });

// Contexts grow, are forked and closed while others attend; indexes come, are learned again and
// take each other's place meanwhile.
TEST_F(EngineIndexTest, AnswersStayRightWhileRunsGrowAndIndexesAreSwapped) {
  StartIndexed();
  const auto opened = engine_->Open(session_, Request());
  ASSERT_TRUE(opened.ok()) << opened.status();
  const ContextId context = opened->context;
  std::atomic<uint32_t> stored{0};
  std::thread writer([&] {
    std::mt19937_64 random(SteadySeed());
    std::normal_distribution<float> normal;
    std::vector<float> q(IndexedShape().heads * IndexedShape().head_dim);
    for (uint32_t t = 0; t < kTokens;) {
      const uint32_t next = std::min<uint32_t>(kTokens, t + 1 + random() % 400);
      for (float& x : q) x = normal(random);
      const uint32_t position = next - 1;
      AppendRequest request;
      request.context = context;
      request.kv_heads = IndexedShape().kv_heads;
      request.range = {t, next};
      request.k = data_.k(0, t);
      request.v = data_.v(0, t);
      if (t > kTokens / 2) {  // the first runs are indexed before
        request.query_samples = q.data();
        request.query_positions = {&position, 1};
      }
      ASSERT_OK(engine_->Append(session_, request));
      t = next;
      stored.store(t, std::memory_order_release);
    }
  });
  std::atomic<uint32_t> answers{0};
  const auto attend = [&](uint64_t seed) {
    std::mt19937_64 random(seed);
    const absl::Time end = absl::Now() + testing::kPatience;
    while (stored.load() < kTokens || (Index().relearned == 0 && absl::Now() < end)) {
      const uint32_t tokens = stored.load(std::memory_order_acquire);
      if (tokens < 2000) continue;
      ContextId asked = context;
      if (random() % 4 == 0) {
        const auto fork = engine_->Fork(
            session_, {context, static_cast<uint32_t>(tokens - random() % 500), kTokens, {}});
        ASSERT_TRUE(fork.ok()) << fork.status();
        asked = *fork;
      }
      const auto row = AttendOne(*engine_, session_, IndexedShape(), asked, 0,
                                 {kFirst, tokens - 500}, random(), kWithinError);
      ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
      if (answers.fetch_add(1) % 8 == 0) {
        ASSERT_LT(ErrorOf(*row), kFromKeysAlone);
      }
      if (asked != context) EXPECT_OK(engine_->Close(session_, asked));
    }
  };
  std::thread reader([&] { attend(SteadySeed() + 1); });
  attend(SteadySeed() + 2);
  reader.join();
  writer.join();
  WaitFor([](const EngineStats& s) {  // what was learned again counts too
    return s.index.built >= kHeads * kRuns && s.index.queued_runs == 0;
  });
  EXPECT_EQ(Index().failed, 0u);
  EXPECT_EQ(engine_->Stats().attend_failures, 0u);
}

TEST_F(EngineIndexTest, ClosingWhileIndexesAreBuiltHoldsNothingUp) {
  StartIndexed();
  for (int i = 0; i < 5; ++i) {
    const ContextId context = OpenFilled();
    absl::SleepFor(absl::Milliseconds(5 * i));
    EXPECT_OK(engine_->Close(session_, context));
  }
  WaitUntilUnleased();
}

}  // namespace
}  // namespace quarry

// Runs of a context are learned from together, and later ones share what was learned.
#include "daemon/run_indexer.h"

#include <gtest/gtest.h>

#include <deque>
#include <functional>
#include <memory>
#include <set>
#include <vector>

#include "cpu_index/cluster_index.h"
#include "tests/daemon/held_tokens.h"
#include "tests/support/eventually.h"

namespace quarry {
namespace {

constexpr KvShape kShape = HeldTokens::kShape;
constexpr uint32_t kRunTokens = 512, kRuns = 10;

class RunIndexerTest : public ::testing::Test {
 protected:
  RunIndexerTest() {
    for (uint32_t r = 0; r < kRuns; ++r) {
      const TokenRange tokens{128 + r * kRunTokens, 128 + (r + 1) * kRunTokens};
      uses_.push_back({held_.RunOf(tokens), tokens});
    }
    options_.choice.kind = IndexKind::kClusters;
    options_.threads = 1;
    samples_ = std::make_shared<QuerySamples>(kShape, 128, std::make_shared<SampleMemory>(1 << 30));
  }
  void Start() { indexer_ = std::make_unique<RunIndexer>(options_, &registry_, nullptr); }
  void Sample(uint32_t positions) {
    for (uint32_t i = 0; i < positions; ++i) {
      samples_->Add(0, 0, kShape.kv_heads, held_.Queries(1).data());
    }
  }
  // Another context's runs, with samples of its own.
  struct Other {
    std::vector<RunUse> uses;
    std::shared_ptr<QuerySamples> samples =
        std::make_shared<QuerySamples>(kShape, 128, std::make_shared<SampleMemory>(1 << 30));
  };
  Other MakeOther(TokenRange tokens) const { return {{{held_.RunOf(tokens), tokens}}}; }
  void Consider(const Other& other) { indexer_->Consider(0, other.uses, kShape, other.samples); }
  // After a drift.
  void Renew() {
    while (!samples_->NoteFit(0, 0, IndexFit::kPoor)) {
    }
    for (uint64_t before = samples_->renewal(); samples_->renewal() == before;) Sample(1);
  }
  void Consider(size_t runs) {
    indexer_->Consider(0, std::span(uses_).first(runs), kShape, samples_);
  }
  // Until the background has come that far.
  void WaitFor(const std::function<bool(const IndexStats&)>& reached) {
    ASSERT_TRUE(testing::Eventually([&] { return reached(indexer_->stats()); }))
        << indexer_->stats().built << " built";
  }
  // Runs are used when they are set, and done with only a moment later.
  void WaitForLearned(size_t run, uint32_t tokens, uint32_t samples) {
    const RunIndexes& indexes = *uses_[run].run->indexes();
    const auto there = [&] {
      const auto learned = indexes.learned(0);
      return learned.has_value() && learned->tokens == tokens && learned->samples == samples;
    };
    ASSERT_TRUE(testing::Eventually(there)) << "run " << run;
  }
  std::shared_ptr<const ClusterModel> ModelOf(size_t run) const {
    const auto index = uses_[run].run->indexes()->Get(0, 0);
    const auto* const clusters = dynamic_cast<const ClusterIndex*>(index.get());
    return clusters == nullptr ? nullptr : clusters->model();
  }

  HeldTokens held_{128 + kRuns * kRunTokens};
  RunRegistry registry_{RunGridOptions{}};
  IndexOptions options_;
  std::shared_ptr<QuerySamples> samples_;
  std::vector<RunUse> uses_;
  std::unique_ptr<RunIndexer> indexer_;  // ends first
};

TEST_F(RunIndexerTest, RunsThatAreDueTogetherHaveOneModel) {
  Start();
  Sample(10);
  Consider(3);
  for (size_t r = 0; r < 3; ++r) WaitForLearned(r, 3 * kRunTokens, 10);
  ASSERT_NE(ModelOf(0), nullptr);
  EXPECT_EQ(ModelOf(1), ModelOf(0));
  EXPECT_EQ(ModelOf(2), ModelOf(0));
  EXPECT_EQ(ModelOf(0)->learned_tokens, 3 * kRunTokens);
  EXPECT_EQ(ModelOf(0)->learned_queries, 10 * kShape.group());
  EXPECT_EQ(indexer_->stats().built, 3u);
  EXPECT_EQ(indexer_->stats().relearned, 0u);
  EXPECT_GT(indexer_->stats().bytes, 0u);
  EXPECT_EQ(ModelOf(3), nullptr);
}

TEST_F(RunIndexerTest, ALaterRunGetsTheModelOfItsNeighbours) {
  Start();
  Consider(1);
  WaitForLearned(0, kRunTokens, 0);
  const auto model = ModelOf(0);
  Consider(3);
  for (size_t r = 1; r < 3; ++r) WaitForLearned(r, kRunTokens, 0);  // as much as the neighbour
  for (size_t r = 0; r < 3; ++r) EXPECT_EQ(ModelOf(r), model) << r;
  EXPECT_EQ(indexer_->stats().built, 3u);
  EXPECT_EQ(indexer_->stats().relearned, 0u);
}

TEST_F(RunIndexerTest, RunsThatBecomeDueFasterThanTheyAreIndexedAreLearnedFromTogether) {
  Start();
  Sample(10);
  for (size_t runs = 1; runs <= kRuns; ++runs) Consider(runs);
  WaitFor([](const IndexStats& stats) { return stats.queued_runs == 0; });
  // The first may have begun alone, and what came while others were built has their model; not one
  // each.
  std::set<const ClusterModel*> models;
  for (size_t r = 0; r < kRuns; ++r) models.insert(ModelOf(r).get());
  EXPECT_EQ(models.count(nullptr), 0u);
  EXPECT_LE(models.size(), 3u);
  for (size_t r = 1; r < kRuns; ++r) EXPECT_TRUE(uses_[r].run->indexes()->learned(0).has_value());
}

TEST_F(RunIndexerTest, FourTimesTheTokensAreLearnedFromAnewByAll) {
  Start();
  Consider(1);
  WaitForLearned(0, kRunTokens, 0);
  const auto model = ModelOf(0);
  Consider(3);
  WaitForLearned(2, kRunTokens, 0);
  Consider(3);  // not due
  Consider(4);  // all four are, the last one for the first time
  for (size_t r = 0; r < 4; ++r) WaitForLearned(r, 4 * kRunTokens, 0);
  EXPECT_NE(ModelOf(0), model);
  for (size_t r = 1; r < 4; ++r) EXPECT_EQ(ModelOf(r), ModelOf(0)) << r;
  EXPECT_EQ(ModelOf(0)->learned_tokens, 4 * kRunTokens);
  EXPECT_EQ(indexer_->stats().built, 7u);
  EXPECT_EQ(indexer_->stats().relearned, 3u);
}

TEST_F(RunIndexerTest, EnoughMoreSamplesAreLearnedFromAnew) {
  Start();
  Consider(2);
  WaitForLearned(1, 2 * kRunTokens, 0);
  WaitForLearned(0, 2 * kRunTokens, 0);
  Sample(31);
  Consider(2);  // too few
  EXPECT_EQ(indexer_->stats().queued_runs, 0u);
  Sample(1);
  Consider(3);
  for (size_t r = 0; r < 3; ++r) WaitForLearned(r, 3 * kRunTokens, 32);
  for (size_t r = 0; r < 3; ++r) EXPECT_EQ(ModelOf(r), ModelOf(0)) << r;
  EXPECT_EQ(ModelOf(0)->learned_queries, 32 * kShape.group());
  EXPECT_EQ(indexer_->stats().relearned, 2u);
}

TEST_F(RunIndexerTest, RenewedSamplesAreLearnedFromAnewByTheRunsOfEveryFork) {
  Start();
  Sample(10);
  Consider(4);
  for (size_t r = 0; r < 4; ++r) WaitForLearned(r, 4 * kRunTokens, 10);
  const auto model = ModelOf(0);
  Renew();
  // One fork has the first two runs and one that is new, another all but that one.
  std::vector<RunUse> one = {uses_[0], uses_[1], uses_[4]};
  indexer_->Consider(0, one, kShape, samples_);
  WaitFor([](const IndexStats& stats) { return stats.queued_runs == 0; });
  EXPECT_EQ(indexer_->stats().relearned, 2u);
  EXPECT_EQ(ModelOf(2), model);
  Consider(4);
  WaitFor([](const IndexStats& stats) { return stats.queued_runs == 0; });
  EXPECT_EQ(indexer_->stats().relearned, 4u);
  EXPECT_NE(ModelOf(0), model);
  for (size_t r = 1; r < 5; ++r) EXPECT_EQ(ModelOf(r), ModelOf(0)) << r;
  EXPECT_EQ(uses_[3].run->indexes()->learned(0)->renewal, samples_->renewal());
  Consider(5);  // once
  EXPECT_EQ(indexer_->stats().queued_runs, 0u);
}

TEST_F(RunIndexerTest, RunsThatAreLostMeanwhileAreLeftOut) {
  options_.threads = 0;  // whoever considers does not wait
  Start();
  Consider(3);
  EXPECT_EQ(indexer_->stats().queued_runs, 3u);
  const std::shared_ptr<RunIndexes> lost = uses_[1].run->indexes();
  uses_[1].run = nullptr;
  indexer_ = nullptr;  // given up: as if nobody had asked
  EXPECT_FALSE(lost->learned(0).has_value());
  RunCounts counts;
  EXPECT_EQ(uses_[0].run->indexes()->Begin(0, {}, &counts), RunIndexes::Due::kFirst);
  uses_[0].run->indexes()->End(0, {}, false, &counts);

  // One job keeps the only thread, the next one's second run is gone when its turn comes.
  options_.threads = 1;
  Start();
  Consider(1);
  std::vector<RunUse> next = {uses_[2], uses_[3], uses_[4]};
  indexer_->Consider(0, next, kShape, samples_);
  next[1].run = nullptr;
  uses_[3].run = nullptr;
  WaitForLearned(2, 3 * kRunTokens, 0);
  WaitForLearned(4, 3 * kRunTokens, 0);
  EXPECT_NE(ModelOf(2), nullptr);
  EXPECT_EQ(ModelOf(4), ModelOf(2));
  EXPECT_EQ(indexer_->stats().failed, 0u);
}

TEST_F(RunIndexerTest, AJobWithoutRoomFailsAndScansWhatItHasNoIndexFor) {
  options_.max_bytes = 1 << 17;
  Start();
  Consider(kRuns);
  WaitFor([](const IndexStats& s) { return s.failed > 0; });
  EXPECT_EQ(indexer_->stats().failed, 1u);
  EXPECT_LE(indexer_->stats().bytes, options_.max_bytes);
  EXPECT_LT(indexer_->stats().built, kRuns);
  EXPECT_EQ(ModelOf(kRuns - 1), nullptr);
}

TEST_F(RunIndexerTest, WhatHadNoRoomIsMadeLikeTheRestAsSoonAsThereIs) {
  Start();
  Sample(10);
  Consider(kRuns);
  for (size_t r = 0; r < kRuns; ++r) WaitForLearned(r, kRuns * kRunTokens, 10);
  options_.max_bytes = indexer_->stats().bytes * 2 / 3;
  for (RunUse& use : uses_) use.run = held_.RunOf(use.tokens);

  Start();
  Consider(kRuns);
  WaitFor([](const IndexStats& s) { return s.failed > 0 && s.queued_runs == 0; });
  size_t there = 0;
  while (ModelOf(there) != nullptr) ++there;
  ASSERT_GE(there, kRuns / 2);
  ASSERT_LT(there, kRuns);
  const auto model = ModelOf(0);
  Sample(10);
  // A fork with one of the runs looks while there is no room; afterwards nobody asks again.
  indexer_->Consider(0, std::span(uses_).last(1), kShape, samples_);
  for (size_t r = 0; r + 1 < there; ++r) uses_[r].run = nullptr;
  for (size_t r = there - 1; r < kRuns; ++r) {
    WaitForLearned(r, kRuns * kRunTokens, 10);  // as the one that had its index before
    EXPECT_EQ(ModelOf(r), model) << r;
  }
  EXPECT_EQ(indexer_->stats().built, kRuns);
}

TEST_F(RunIndexerTest, AnIndexThatIsTooLargeKeepsOthersNotOutAndIsMadeOnce) {
  Start();
  Consider(1);
  WaitForLearned(0, kRunTokens, 0);
  options_.max_bytes = indexer_->stats().bytes * 5 / 2;  // for two
  uses_[0].run = held_.RunOf(uses_[0].tokens);
  Start();
  const Other large = MakeOther({128, 128 + kRuns * kRunTokens});
  Consider(large);
  WaitFor([](const IndexStats& s) { return s.failed == 1 && s.queued_runs == 0; });
  Consider(1);
  WaitForLearned(0, kRunTokens, 0);
  // It is looked at again and again meanwhile, also by its context.
  for (int looks = 0; looks < 10; ++looks) {
    Consider(large);
    absl::SleepFor(absl::Milliseconds(50));
  }
  EXPECT_EQ(indexer_->stats().failed, 1u);
  // Going by the first one, a third has no room: it is not even tried, until the first is gone.
  const Other second = MakeOther(uses_[1].tokens), third = MakeOther(uses_[2].tokens);
  Consider(second);
  WaitFor([](const IndexStats& s) { return s.built == 2; });
  Consider(third);
  WaitFor([](const IndexStats& s) { return s.queued_runs == 0; });
  EXPECT_EQ(indexer_->stats().failed, 1u);
  uses_[0].run = nullptr;
  WaitFor([](const IndexStats& s) { return s.built == 3; });
  EXPECT_NE(third.uses[0].run->indexes()->Get(0, 0), nullptr);
}

TEST_F(RunIndexerTest, NoMoreRunsAreMadeThanThereIsRoomFor) {
  options_.max_bytes = 3 << 16;
  Start();
  const Other before = MakeOther(uses_[kRuns - 1].tokens);
  Consider(before);
  WaitFor([](const IndexStats& s) { return s.built == 1 && s.queued_runs == 0; });
  Consider(kRuns);
  WaitFor([](const IndexStats& s) { return s.waiting_layers == 1 && s.queued_runs == 0; });
  const auto there = static_cast<uint32_t>(indexer_->stats().built - 1);
  EXPECT_GT(there, 1u);
  EXPECT_LT(there, kRuns - 1);
  for (size_t r = 0; r < kRuns; ++r) EXPECT_EQ(ModelOf(r) != nullptr, r < there) << r;
  EXPECT_EQ(ModelOf(0)->learned_tokens, there * kRunTokens);
  EXPECT_EQ(indexer_->stats().failed, 1u);
  // As long as nothing changes they are not tried again, though one's own bytes would find room.
  absl::SleepFor(absl::Milliseconds(500));
  EXPECT_EQ(indexer_->stats().failed, 1u);
  EXPECT_EQ(indexer_->stats().built, there + 1);
  // Room for one of them is enough to go on.
  uses_[0].run = nullptr;
  WaitFor([&](const IndexStats& s) { return s.built == there + 2; });
  EXPECT_NE(ModelOf(there), nullptr);
}

// A first index needs room for the model, too, whichever run it is of.
TEST_F(RunIndexerTest, RunsThatHaveNoRoomForTheirFirstIndexAreNotTriedAgain) {
  options_.max_bytes = 1 << 16;  // for one, with what it shares
  Start();
  const Other before = MakeOther(uses_[kRuns - 1].tokens);
  Consider(before);
  WaitFor([](const IndexStats& s) { return s.built == 1 && s.queued_runs == 0; });
  Consider(4);
  absl::SleepFor(absl::Milliseconds(700));
  EXPECT_EQ(indexer_->stats().built, 1u);
  EXPECT_LE(indexer_->stats().failed, 1u);
  EXPECT_EQ(indexer_->stats().waiting_layers, 1u);
}

// What short runs take, with what they share, says little of long ones.
TEST_F(RunIndexerTest, InEmptyMemoryAnIndexIsMadeThatWasGuessedToBeLarger) {
  const Other large = MakeOther({128, 128 + 8 * kRunTokens});
  Start();
  Consider(large);
  WaitFor([](const IndexStats& s) { return s.built == 1; });
  options_.max_bytes = indexer_->stats().bytes + 100;
  Other again = MakeOther(large.uses[0].tokens);
  Start();
  Other tiny = MakeOther({128, 128 + 64});  // many bytes a token
  Consider(tiny);
  WaitFor([](const IndexStats& s) { return s.built == 1 && s.queued_runs == 0; });
  tiny.uses.clear();
  Consider(again);
  WaitFor([](const IndexStats& s) { return s.built == 2; });
}

TEST_F(RunIndexerTest, NoMemoryIsNoIndex) {
  options_.max_bytes = 0;
  Start();
  EXPECT_FALSE(indexer_->enabled());
  Consider(2);
  EXPECT_EQ(indexer_->stats().queued_runs, 0u);
  EXPECT_EQ(indexer_->stats().waiting_layers, 0u);
}

TEST_F(RunIndexerTest, WhatWaitsForRoomIsMadeAlthoughOthersKeepComing) {
  Start();
  Consider(1);
  WaitForLearned(0, kRunTokens, 0);
  options_.max_bytes = indexer_->stats().bytes * 3;
  uses_[0].run = held_.RunOf(uses_[0].tokens);
  Start();
  const Other large = MakeOther({128, 128 + 2 * kRunTokens});
  Consider(2);
  for (size_t r = 0; r < 2; ++r) WaitForLearned(r, 2 * kRunTokens, 0);
  Consider(large);
  WaitFor([](const IndexStats& s) { return s.waiting_layers == 1; });
  for (size_t r = 0; r < 2; ++r) uses_[r].run = nullptr;
  const auto made = [&] { return large.uses[0].run->indexes()->Get(0, 0) != nullptr; };
  // Each is gone as soon as it is made.
  std::deque<Other> others;
  EXPECT_TRUE(testing::Eventually([&] {
    while (others.size() < 4) Consider(others.emplace_back(MakeOther(uses_[3].tokens)));
    while (!others.empty() && others.front().uses[0].run->indexes()->learned(0).has_value())
      others.pop_front();
    return made();
  }));
}

}  // namespace
}  // namespace quarry

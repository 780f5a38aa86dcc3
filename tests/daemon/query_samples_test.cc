#include "daemon/query_samples.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "daemon/run_indexes.h"
#include "gtest/gtest.h"

namespace quarry {
namespace {

constexpr KvShape kShape = {.layers = 2, .heads = 4, .kv_heads = 2, .head_dim = 16};
constexpr float kScale = 0.25f;  // 1 / sqrt(16)

std::shared_ptr<SampleMemory> Room(uint64_t bytes = 1 << 20) {
  return std::make_shared<SampleMemory>(bytes);
}

// Every number of the position's queries is `value`.
bool Add(QuerySamples& samples, uint32_t layer, float value) {
  const std::vector<float> q(size_t{kShape.heads} * kShape.head_dim, value);
  return samples.Add(layer, 0, kShape.kv_heads, q.data());
}

TEST(QuerySamplesTest, KeepsWhatComesOfEachHeadUntilItIsFull) {
  QuerySamples samples(kShape, 100, Room());
  for (int i = 0; i < 10; ++i) Add(samples, 0, static_cast<float>(i));
  EXPECT_EQ(samples.LeastKept(0), 10u);  // whatever layer 1 has
  EXPECT_EQ(samples.LeastKept(1), 0u);
  const std::vector<float> q = samples.Scaled(0, 1);
  ASSERT_EQ(q.size(), size_t{10} * kShape.group() * kShape.head_dim);
  EXPECT_EQ(q.front(), 0.0f);
  EXPECT_EQ(q.back(), 9 * kScale);
  EXPECT_TRUE(samples.Scaled(1, 0).empty());
}

TEST(QuerySamplesTest, WhereThereIsNoRoomForMoreLaterOnesTakeThePlacesOfTheFirst) {
  const uint64_t position_bytes =
      uint64_t{2} * kShape.group() * kShape.head_dim;  // bytes of one KV head's
  constexpr uint32_t kCapacity = 64;
  const auto room = Room(3 * 8 * position_bytes);  // for 8 positions of the first three heads
  {
    QuerySamples samples(kShape, kCapacity, room);
    for (uint32_t i = 0; i < 100; ++i) {
      Add(samples, 0, static_cast<float>(i));
      Add(samples, 1, static_cast<float>(i));
    }
    EXPECT_EQ(room->used(), 3 * 8 * position_bytes);
    EXPECT_EQ(samples.LeastKept(0), 8u);
    EXPECT_EQ(samples.LeastKept(1), 0u);
    const std::vector<float> q = samples.Scaled(0, 0);
    ASSERT_EQ(q.size(), 8 * position_bytes / 2);
    EXPECT_GT(*std::max_element(q.begin(), q.end()), 8 * kScale);
    QuerySamples other(kShape, kCapacity, room);
    Add(other, 0, 1.0f);
    EXPECT_EQ(other.LeastKept(0), 0u);
  }
  EXPECT_EQ(room->used(), 0u);
  QuerySamples later(kShape, kCapacity, room);
  Add(later, 0, 1.0f);
  EXPECT_EQ(later.LeastKept(0), 1u);
}

TEST(QuerySamplesTest, AFullOneKeepsAnEvenChoiceOfAllThatCame) {
  constexpr uint32_t kCapacity = 64, kPositions = 6400;
  QuerySamples samples(kShape, kCapacity, Room()), again(kShape, kCapacity, Room());
  for (uint32_t i = 0; i < kPositions; ++i) {
    Add(samples, 0, i < kPositions / 2 ? 1.0f : 2.0f);
    Add(again, 0, i < kPositions / 2 ? 1.0f : 2.0f);
  }
  const std::vector<float> q = samples.Scaled(0, 0);
  const size_t stride = size_t{kShape.group()} * kShape.head_dim;
  ASSERT_EQ(q.size(), kCapacity * stride);
  uint32_t early = 0;
  for (uint32_t i = 0; i < kCapacity; ++i) early += q[i * stride] == kScale;
  EXPECT_NEAR(early, kCapacity / 2, kCapacity / 4);
  EXPECT_EQ(q, again.Scaled(0, 0));
}

TEST(QuerySamplesTest, SaysWhenThereAreEnoughToLookAgain) {
  QuerySamples samples(kShape, 128, Room());
  std::vector<uint32_t> worth;
  for (uint32_t i = 1; i <= 300; ++i) {
    if (Add(samples, 0, 1.0f)) worth.push_back(i);
  }
  EXPECT_EQ(worth, (std::vector<uint32_t>{32, 64, 128, 129}));  // now nobody is waited for
}

TEST(QuerySamplesTest, AHeadThatIsNotAskedIsWaitedForUntilAnotherHasMoreThanAreKept) {
  constexpr uint32_t kCapacity = 64;
  QuerySamples samples(kShape, kCapacity, Room());
  const std::vector<float> q(size_t{kShape.group()} * kShape.head_dim, 1.0f);
  const auto add = [&](uint32_t kv_head) { return samples.Add(0, kv_head, 1, q.data()); };
  for (uint32_t i = 0; i < kCapacity; ++i) add(0);
  EXPECT_EQ(samples.LeastKept(0), 0u);  // as a writer of some heads leaves it before the next one
  EXPECT_TRUE(add(0));
  EXPECT_EQ(samples.LeastKept(0), kCapacity);
  for (int i = 0; i < 32; ++i) add(1);
  EXPECT_EQ(samples.LeastKept(0), kCapacity);  // less than half of 65
  add(1);
  EXPECT_EQ(samples.LeastKept(0), 33u);
  for (int i = 0; i < 2; ++i) add(0);
  EXPECT_EQ(samples.LeastKept(0), kCapacity);  // it falls behind again
}

TEST(QuerySamplesTest, OfALayerThatIsAskedLessThanOthersWhatItHasCounts) {
  constexpr uint32_t kCapacity = 64;
  QuerySamples samples(kShape, kCapacity, Room());
  for (int i = 0; i < 10; ++i) Add(samples, 1, 1.0f);
  for (uint32_t i = 0; i < 2 * kCapacity; ++i) Add(samples, 0, 1.0f);
  EXPECT_EQ(samples.LeastKept(1), 10u);
}

TEST(QuerySamplesTest, AfterADriftNewQueriesTakeThePlacesOfTheOld) {
  constexpr uint32_t kCapacity = 64;
  QuerySamples samples(kShape, kCapacity, Room());
  const auto add = [&](uint32_t layer, float value) { return Add(samples, layer, value); };
  for (int i = 0; i < 6400; ++i) {
    add(0, 1.0f);
    add(1, 1.0f);
  }
  for (int i = 0; i < 15; ++i) EXPECT_FALSE(samples.NoteFit(1, 0, IndexFit::kPoor));
  EXPECT_TRUE(samples.NoteFit(1, 0, IndexFit::kPoor));
  // Nothing more is found while they are renewed.
  for (int i = 0; i < 100; ++i) EXPECT_FALSE(samples.NoteFit(1, 0, IndexFit::kPoor));
  for (uint32_t i = 1; i <= kCapacity / 2; ++i) add(0, 2.0f);
  for (uint32_t i = 1; i <= kCapacity / 2; ++i) {
    EXPECT_EQ(samples.renewal(), 0u);  // this layer is behind
    EXPECT_EQ(add(1, 2.0f), i >= kCapacity / 2);
  }
  const uint64_t renewal = samples.renewal();
  EXPECT_GT(renewal, 0u);
  EXPECT_EQ(samples.LeastKept(0), kCapacity);
  const std::vector<float> q = samples.Scaled(0, 0);
  EXPECT_EQ(std::count(q.begin(), q.end(), 2 * kScale), static_cast<ptrdiff_t>(q.size() / 2));
  for (uint32_t i = 0; i < kCapacity / 2; ++i) add(0, 2.0f);
  EXPECT_EQ(samples.renewal(), renewal);
  const std::vector<float> all = samples.Scaled(0, 0);
  EXPECT_EQ(std::count(all.begin(), all.end(), 2 * kScale), static_cast<ptrdiff_t>(all.size()));
}

TEST(QuerySamplesTest, AfterADriftAHeadThatIsNotAskedAnyMoreIsNotWaitedForLong) {
  constexpr uint32_t kCapacity = 64;
  QuerySamples samples(kShape, kCapacity, Room());
  for (uint32_t i = 0; i < kCapacity; ++i) {
    Add(samples, 0, 1.0f);
    Add(samples, 1, 1.0f);  // never again
  }
  uint64_t last = 0;
  for (uint32_t window : {16u, 32u}) {  // the second time takes twice as many audits
    for (uint32_t i = 1; i < window; ++i) EXPECT_FALSE(samples.NoteFit(0, 0, IndexFit::kPoor));
    EXPECT_TRUE(samples.NoteFit(0, 0, IndexFit::kPoor));
    for (uint32_t i = 0; i < kCapacity; ++i) Add(samples, 0, 2.0f);
    EXPECT_EQ(samples.renewal(), last);
    EXPECT_TRUE(Add(samples, 0, 2.0f));
    EXPECT_GT(samples.renewal(), last);
    last = samples.renewal();
    EXPECT_EQ(samples.LeastKept(0), kCapacity);
  }
}

TEST(RunIndexesTest, AreLearnedAgainOnceFromRenewedSamplesHoweverFew) {
  using Due = RunIndexes::Due;
  RunIndexes indexes(kShape);
  RunCounts counts;
  EXPECT_EQ(indexes.Begin(0, {100, 1000, 3}, &counts), Due::kFirst);
  indexes.End(0, RunIndexes::Learning{100, 1000, 3}, true, &counts);
  EXPECT_EQ(indexes.Begin(0, {40, 1000, 3}, &counts), Due::kNo);
  EXPECT_EQ(indexes.Begin(0, {40, 1000, 5}, &counts), Due::kAgain);
  EXPECT_EQ(indexes.Begin(0, {40, 1000, 5}, &counts), Due::kNo);  // somebody is at it
  indexes.End(0, {}, false, &counts);
  EXPECT_EQ(indexes.Begin(0, {40, 1000, 5}, &counts), Due::kAgain);  // it was given up
  indexes.End(0, RunIndexes::Learning{40, 1000, 5}, true, &counts);
  EXPECT_EQ(indexes.Begin(0, {40, 1000, 5}, &counts), Due::kNo);  // a fork
  EXPECT_EQ(indexes.Begin(0, {40, 1000, 4}, &counts),
            Due::kNo);  // another context's, renewed before
  EXPECT_EQ(indexes.Begin(0, {170, 1000, 0}, &counts),
            Due::kNo);  // not undone by the old ones of another
  EXPECT_EQ(indexes.Begin(0, {400, 1000, 0}, &counts), Due::kAgain);
  indexes.End(0, RunIndexes::Learning{400, 1000, 0}, true, &counts);
  EXPECT_EQ(indexes.Begin(0, {400, 1000, 5}, &counts), Due::kNo);
}

TEST(RunIndexesTest, AreLearnedOnceAndAgainWithTwiceTheSamples) {
  using Due = RunIndexes::Due;
  RunIndexes indexes(kShape);
  RunCounts counts;
  EXPECT_EQ(indexes.Begin(0, {3, 1000}, &counts), Due::kFirst);
  EXPECT_EQ(indexes.Begin(0, {100, 1000}, &counts), Due::kNo);  // somebody is at it
  indexes.End(0, {}, false, &counts);
  EXPECT_FALSE(indexes.learned(0).has_value());
  EXPECT_EQ(indexes.Begin(0, {10, 1000}, &counts), Due::kFirst);  // it was given up
  indexes.End(0, RunIndexes::Learning{10, 1000}, true, &counts);
  EXPECT_EQ(indexes.learned(0)->samples, 10u);
  EXPECT_EQ(indexes.Begin(0, {31, 1000}, &counts), Due::kNo);  // too few
  EXPECT_EQ(indexes.Begin(0, {32, 1000}, &counts), Due::kAgain);
  indexes.End(0, RunIndexes::Learning{32, 1000}, true, &counts);
  EXPECT_EQ(indexes.Begin(0, {63, 1000}, &counts), Due::kNo);  // less than twice as many
  EXPECT_EQ(indexes.Begin(0, {64, 1000}, &counts), Due::kAgain);
}

TEST(RunIndexesTest, AreLearnedAgainFromFourTimesTheTokensUnlessTheSamplesAreFewer) {
  using Due = RunIndexes::Due;
  RunIndexes indexes(kShape);
  RunCounts counts;
  EXPECT_EQ(indexes.Begin(0, {10, 1000}, &counts), Due::kFirst);
  indexes.End(0, RunIndexes::Learning{10, 1000}, true, &counts);
  EXPECT_EQ(indexes.Begin(0, {10, 3999}, &counts), Due::kNo);
  EXPECT_EQ(indexes.Begin(0, {9, 4000}, &counts), Due::kNo);
  EXPECT_EQ(indexes.Begin(0, {10, 4000}, &counts), Due::kAgain);
  indexes.End(0, {}, false, &counts);  // what was learned before still stands
  EXPECT_EQ(indexes.learned(0)->tokens, 1000u);
  EXPECT_EQ(indexes.Begin(0, {10, 4000}, &counts), Due::kAgain);
  indexes.End(0, RunIndexes::Learning{10, 4000}, true, &counts);
  EXPECT_EQ(indexes.learned(0)->tokens, 4000u);
  EXPECT_EQ(indexes.Begin(0, {10, 15999}, &counts), Due::kNo);
}

TEST(RunIndexesTest, ALayerIsLearnedFromAsLittleAsAnyOfItsHeads) {
  static_assert(kShape.kv_heads > 1);
  RunIndexes indexes(kShape);
  RunCounts counts;
  EXPECT_EQ(indexes.Begin(0, {40, 1000}, &counts), RunIndexes::Due::kFirst);
  indexes.Set(0, 0, nullptr, 0, RunIndexes::Learning{40, 1000});
  EXPECT_EQ(indexes.learned(0, 0)->samples, 40u);
  EXPECT_FALSE(indexes.learned(0, 1).has_value());
  indexes.SetRefusedBytes(0, 100);
  indexes.End(0, {40, 1000}, false, &counts);  // there was no room for the other heads
  EXPECT_EQ(indexes.Begin(0, {70, 1000}, &counts), RunIndexes::Due::kFirst);
  indexes.End(0, {70, 1000}, true, &counts);
  EXPECT_EQ(indexes.learned(0)->samples, 40u);
  EXPECT_EQ(indexes.refused_bytes(0), 0u);
  EXPECT_EQ(indexes.Begin(0, {80, 1000}, &counts), RunIndexes::Due::kAgain);
}

TEST(RunIndexesTest, EachLayerIsLearnedByItselfAndARunCountsOnce) {
  using Due = RunIndexes::Due;
  RunIndexes indexes(kShape);
  RunCounts counts;
  EXPECT_EQ(indexes.Begin(0, {10, 1000}, &counts), Due::kFirst);
  EXPECT_EQ(indexes.Begin(1, {10, 1000}, &counts), Due::kFirst);
  EXPECT_EQ(counts.busy, 1u);
  indexes.End(0, RunIndexes::Learning{10, 1000}, true, &counts);
  EXPECT_EQ(counts.busy, 1u);
  EXPECT_FALSE(indexes.all_learned());
  EXPECT_FALSE(indexes.learned(1).has_value());
  indexes.End(1, RunIndexes::Learning{10, 1000}, true, &counts);
  EXPECT_EQ(counts.busy, 0u);
  EXPECT_TRUE(indexes.all_learned());
  for (uint32_t layer : {0, 1}) {
    EXPECT_EQ(indexes.Begin(layer, {40, 1000}, &counts), Due::kAgain);
    indexes.End(layer, RunIndexes::Learning{40, 1000}, true, &counts);
  }
  EXPECT_EQ(counts.relearned, 1u);
  EXPECT_EQ(indexes.Begin(1, {80, 1000}, &counts), Due::kAgain);
  indexes.End(1, {}, false, &counts);  // it was given up
  EXPECT_EQ(counts.relearned, 1u);
  EXPECT_EQ(indexes.Begin(1, {80, 1000}, &counts), Due::kAgain);
  indexes.End(1, RunIndexes::Learning{80, 1000}, true, &counts);
  EXPECT_EQ(counts.relearned, 2u);
}

}  // namespace
}  // namespace quarry

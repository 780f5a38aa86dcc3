#include "daemon/query_samples.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "daemon/run_indexes.h"
#include "gtest/gtest.h"

namespace quarry {
namespace {

constexpr KvShape kShape = {.layers = 2, .heads = 4, .kv_heads = 2, .head_dim = 16};
constexpr float kScale = 0.25f;  // 1 / sqrt(16)

// Every number of the position's queries is `value`.
bool Add(QuerySamples& samples, uint32_t layer, float value) {
  const std::vector<float> q(size_t{kShape.heads} * kShape.head_dim, value);
  return samples.Add(layer, 0, kShape.kv_heads, q.data());
}

TEST(QuerySamplesTest, KeepsWhatComesOfEachHeadUntilItIsFull) {
  QuerySamples samples(kShape, 100);
  for (int i = 0; i < 10; ++i) Add(samples, 0, static_cast<float>(i));
  EXPECT_EQ(samples.LeastKept(), 0u);  // layer 1 has none
  const std::vector<float> q = samples.Scaled(0, 1);
  ASSERT_EQ(q.size(), size_t{10} * kShape.group() * kShape.head_dim);
  EXPECT_EQ(q.front(), 0.0f);
  EXPECT_EQ(q.back(), 9 * kScale);
  EXPECT_TRUE(samples.Scaled(1, 0).empty());
}

TEST(QuerySamplesTest, AFullOneKeepsAnEvenChoiceOfAllThatCame) {
  constexpr uint32_t kCapacity = 64, kPositions = 6400;
  QuerySamples samples(kShape, kCapacity), again(kShape, kCapacity);
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
  QuerySamples samples(kShape, 128);
  std::vector<uint32_t> worth;
  for (uint32_t i = 1; i <= 300; ++i) {
    if (Add(samples, 0, 1.0f)) worth.push_back(i);
  }
  EXPECT_EQ(worth, (std::vector<uint32_t>{32, 64, 128, 129}));  // now nobody is waited for
}

TEST(QuerySamplesTest, AHeadThatIsNotAskedIsWaitedForUntilAnotherHasMoreThanAreKept) {
  constexpr uint32_t kCapacity = 64;
  QuerySamples samples(kShape, kCapacity);
  for (uint32_t i = 0; i < kCapacity; ++i) Add(samples, 0, 1.0f);
  EXPECT_EQ(samples.LeastKept(), 0u);  // as a prefill leaves it behind the first layer
  EXPECT_TRUE(Add(samples, 0, 1.0f));
  EXPECT_EQ(samples.LeastKept(), kCapacity);
  for (int i = 0; i < 32; ++i) Add(samples, 1, 1.0f);
  EXPECT_EQ(samples.LeastKept(), kCapacity);  // less than half of 65
  Add(samples, 1, 1.0f);
  EXPECT_EQ(samples.LeastKept(), 33u);
  for (int i = 0; i < 2; ++i) Add(samples, 0, 1.0f);
  EXPECT_EQ(samples.LeastKept(), kCapacity);  // it falls behind again
}

TEST(QuerySamplesTest, AfterADriftNewQueriesTakeThePlacesOfTheOld) {
  constexpr uint32_t kCapacity = 64;
  QuerySamples samples(kShape, kCapacity);
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
  EXPECT_EQ(samples.LeastKept(), kCapacity);
  const std::vector<float> q = samples.Scaled(0, 0);
  EXPECT_EQ(std::count(q.begin(), q.end(), 2 * kScale), static_cast<ptrdiff_t>(q.size() / 2));
  for (uint32_t i = 0; i < kCapacity / 2; ++i) add(0, 2.0f);
  EXPECT_EQ(samples.renewal(), renewal);
  const std::vector<float> all = samples.Scaled(0, 0);
  EXPECT_EQ(std::count(all.begin(), all.end(), 2 * kScale), static_cast<ptrdiff_t>(all.size()));
}

TEST(QuerySamplesTest, AfterADriftAHeadThatIsNotAskedAnyMoreIsNotWaitedForLong) {
  constexpr uint32_t kCapacity = 64;
  QuerySamples samples(kShape, kCapacity);
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
    EXPECT_EQ(samples.LeastKept(), kCapacity);
  }
}

TEST(RunIndexesTest, AreLearnedAgainOnceFromRenewedSamplesHoweverFew) {
  using Due = RunIndexes::Due;
  RunIndexes indexes(kShape);
  EXPECT_EQ(indexes.Begin({100, 1000, 3}), Due::kFirst);
  indexes.End(RunIndexes::Learning{100, 1000, 3});
  EXPECT_EQ(indexes.Begin({40, 1000, 3}), Due::kNo);
  EXPECT_EQ(indexes.Begin({40, 1000, 5}), Due::kAgain);
  EXPECT_EQ(indexes.Begin({40, 1000, 5}), Due::kNo);  // somebody is at it
  indexes.End(std::nullopt);
  EXPECT_EQ(indexes.Begin({40, 1000, 5}), Due::kAgain);  // it was given up
  indexes.End(RunIndexes::Learning{40, 1000, 5});
  EXPECT_EQ(indexes.Begin({40, 1000, 5}), Due::kNo);   // a fork
  EXPECT_EQ(indexes.Begin({40, 1000, 4}), Due::kNo);   // another context's, renewed before
  EXPECT_EQ(indexes.Begin({170, 1000, 0}), Due::kNo);  // not undone by the old ones of another
  EXPECT_EQ(indexes.Begin({400, 1000, 0}), Due::kAgain);
  indexes.End(RunIndexes::Learning{400, 1000, 0});
  EXPECT_EQ(indexes.Begin({400, 1000, 5}), Due::kNo);
}

TEST(RunIndexesTest, AreLearnedOnceAndAgainWithTwiceTheSamples) {
  using Due = RunIndexes::Due;
  RunIndexes indexes(kShape);
  EXPECT_EQ(indexes.Begin({3, 1000}), Due::kFirst);
  EXPECT_EQ(indexes.Begin({100, 1000}), Due::kNo);  // somebody is at it
  indexes.End(std::nullopt);
  EXPECT_FALSE(indexes.learned().has_value());
  EXPECT_EQ(indexes.Begin({10, 1000}), Due::kFirst);  // it was given up
  indexes.End(RunIndexes::Learning{10, 1000});
  EXPECT_EQ(indexes.learned()->samples, 10u);
  EXPECT_EQ(indexes.Begin({31, 1000}), Due::kNo);  // too few
  EXPECT_EQ(indexes.Begin({32, 1000}), Due::kAgain);
  indexes.End(RunIndexes::Learning{32, 1000});
  EXPECT_EQ(indexes.Begin({63, 1000}), Due::kNo);  // less than twice as many
  EXPECT_EQ(indexes.Begin({64, 1000}), Due::kAgain);
}

TEST(RunIndexesTest, AreLearnedAgainFromFourTimesTheTokensUnlessTheSamplesAreFewer) {
  using Due = RunIndexes::Due;
  RunIndexes indexes(kShape);
  EXPECT_EQ(indexes.Begin({10, 1000}), Due::kFirst);
  indexes.End(RunIndexes::Learning{10, 1000});
  EXPECT_EQ(indexes.Begin({10, 3999}), Due::kNo);
  EXPECT_EQ(indexes.Begin({9, 4000}), Due::kNo);
  EXPECT_EQ(indexes.Begin({10, 4000}), Due::kAgain);
  indexes.End(std::nullopt);  // what was learned before still stands
  EXPECT_EQ(indexes.learned()->tokens, 1000u);
  EXPECT_EQ(indexes.Begin({10, 4000}), Due::kAgain);
  indexes.End(RunIndexes::Learning{10, 4000});
  EXPECT_EQ(indexes.learned()->tokens, 4000u);
  EXPECT_EQ(indexes.Begin({10, 15999}), Due::kNo);
}

}  // namespace
}  // namespace quarry

// Several runs of one head: what one has learned serves all, and all are searched as one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "tests/cpu_index/cluster_case.h"

namespace quarry {
namespace {

using testing::ClusterAnswer;
using testing::ClusterErrors;
using testing::ClusterHead;
using testing::ClusterRuns;
using testing::ErrorOf;
using testing::ErrorsOf;
using testing::Exactly;
using testing::Median;
using testing::Search;
using testing::Within;

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr uint32_t kFirst = ClusterHead::kFirst;

// Of rows [][d], one after the other.
std::vector<float> Orthonormal(std::vector<float> rows, uint32_t d) {
  for (size_t at = 0; at < rows.size(); at += d) {
    const auto dot = [&](size_t a, size_t b) {
      return std::inner_product(&rows[a], &rows[a] + d, &rows[b], 0.0f);
    };
    for (size_t before = 0; before < at; before += d) {
      const float along = dot(at, before);
      for (uint32_t c = 0; c < d; ++c) rows[at + c] -= along * rows[before + c];
    }
    const float length = std::sqrt(dot(at, at));
    for (uint32_t c = 0; c < d; ++c) rows[at + c] /= length;
  }
  return rows;
}

TEST(ClusterRunsTest, TheSameTokensInFewOrManyRunsGiveTheSameAnswerWithinTheError) {
  for (const uint32_t head_dim : {64u, 96u}) {
    const ClusterHead head(16384 + 40, head_dim, 2);
    for (const uint32_t count : {1u, 4u, 16u}) {
      constexpr uint32_t kGroup = 8;
      ClusterRuns runs(head, ClusterRuns::Even(head, count));
      runs.Learn(head.sampled, count, kGroup);
      for (const float tolerated : {0.02f, 0.08f}) {
        const ClusterErrors found = ErrorsOf(head, runs, Within(tolerated), kGroup);
        EXPECT_LT(found.mean(), 2 * tolerated) << count << " runs";
        EXPECT_LT(Median(found.predicted), 1.5 * tolerated) << count << " runs";
        EXPECT_LT(found.bytes, ClusterHead::kAsked / 8 * 2 * head.keys.size()) << count << " runs";
      }
    }
  }
}

TEST(ClusterRunsTest, PartsThatThreadsShareAnswerLikeOneSearch) {
  const ClusterHead head(9000, 64, 2);
  ClusterRuns runs(head, {100, 1800, 3000, 5200, 8100, 9000});
  runs.Learn(head.sampled, runs.views.size(), 4);
  const std::vector<TokenRange> all(4, head.all());
  std::vector<TokenRange> some = all;
  some[1] = {kFirst + 2000, kFirst + 7000};
  some[3] = {kFirst + 8500, kFirst + 9000};
  const std::vector<float> elsewhere(4, 2.0f);
  for (const bool open_all : {false, true}) {
    runs.OpenAll(open_all);
    for (const std::vector<TokenRange>& ranges : {all, some}) {
      for (const float tolerated : {0.0f, 0.01f, 0.1f}) {
        ClusterLimits limits = Within(tolerated);
        limits.other_length = elsewhere;
        const ClusterAnswer one = Search(runs, head.Queries(0, 4), ranges, limits);
        for (const uint32_t parts : {2u, 3u, 6u}) {
          SCOPED_TRACE(::testing::Message() << parts << " parts, tolerated " << tolerated
                                            << (open_all ? ", every code" : ""));
          const ClusterAnswer cut = Search(runs, head.Queries(0, 4), ranges, limits, parts);
          EXPECT_NEAR(cut.bytes, one.bytes, 0.01 * one.bytes);
          EXPECT_NEAR(cut.refined.size(), one.refined.size(), 1 + 0.01 * one.refined.size());
          for (uint32_t i = 0; i < 4; ++i) {
            EXPECT_LT(ErrorOf(cut.o[i], one.o[i]), 1e-4 + 0.02 * tolerated);
            EXPECT_NEAR(cut.lse[i], one.lse[i], 1e-4 + 0.02 * tolerated);
            EXPECT_NEAR(cut.predicted[i], one.predicted[i], 0.02 * one.predicted[i]);
          }
        }
      }
    }
  }
}

TEST(ClusterRunsTest, EverythingRefinedIsExactOverRunsOfAnyLength) {
  const ClusterHead head(3000, 64, 2);
  ClusterRuns runs(head, {1, 17, 33, 33 + 256, 800, 801, 2500, 3000});
  runs.Learn();
  const std::vector<TokenRange> ranges(4, head.all());
  const ClusterAnswer exact = Exactly(runs, head.Queries(0, 4), ranges);
  const ClusterAnswer all = Search(runs, head.Queries(0, 4), ranges, Within(0));
  ASSERT_EQ(all.refined.size(), head.tokens);
  for (uint32_t t = 0; t < head.tokens; ++t) ASSERT_EQ(all.refined[t], kFirst + t);
  EXPECT_THAT(all.tokens, ::testing::Each(uint64_t{head.tokens}));
  for (uint32_t i = 0; i < 4; ++i) {
    EXPECT_LT(ErrorOf(all.o[i], exact.o[i]), 1e-3);
    EXPECT_NEAR(all.lse[i], exact.lse[i], 1e-3);
  }
  EXPECT_LT(ErrorsOf(head, runs, Within(0.05f), 4).mean(), 0.1);
}

TEST(ClusterRunsTest, ALaterRunWithAnEarlierOnesModelIsAnsweredAboutAsWell) {
  const ClusterHead head(16384, 64, 2);
  for (const size_t from : {1u, 2u}) {
    ClusterRuns runs(head, ClusterRuns::Even(head, 8));
    runs.Learn(head.sampled, from);
    for (const auto& index : runs.indexes) EXPECT_EQ(index->model(), runs.model);
    for (const float tolerated : {0.02f, 0.1f}) {
      const ClusterErrors found = ErrorsOf(head, runs, Within(tolerated), 4);
      // Not as well as where all runs have been learned from.
      EXPECT_LT(found.mean(), 3 * tolerated) << from << " learned";
    }
  }
}

TEST(ClusterRunsTest, RunsThatQueriesSeePartlyOrNotAtAllHaveThatPartOnly) {
  const ClusterHead head(6000, 64, 2);
  ClusterRuns runs(head, ClusterRuns::Even(head, 6));
  runs.Learn();
  const std::vector<TokenRange> ranges = {{kFirst, kFirst + 2500},         // ends within a run
                                          {kFirst + 2999, kFirst + 3001},  // of two runs
                                          {kFirst + 1000, kFirst + 2000},  // one run
                                          head.all(),
                                          {kFirst + 5990, kFirst + 7000},
                                          {0, kFirst}};
  for (const bool open_all : {false, true}) {
    runs.OpenAll(open_all);
    for (const float tolerated : {0.0f, 0.03f}) {
      SCOPED_TRACE(::testing::Message() << "tolerated " << tolerated);
      double errors = 0;
      uint32_t answers = 0, far = 0;
      const auto ask = [&](uint32_t first, uint32_t count) {
        const std::span<const TokenRange> some = std::span(ranges).subspan(first, count);
        const ClusterAnswer exact = Exactly(runs, head.Queries(first, count), some);
        const ClusterAnswer found = Search(runs, head.Queries(first, count), some,
                                           Within(tolerated));
        for (uint32_t i = 0; i < count; ++i) {
          SCOPED_TRACE(::testing::Message() << "query " << first + i << " of " << count);
          EXPECT_LE(found.tokens[i], Intersect(some[i], head.all()).size());
          if (exact.lse[i] == kNone) {
            EXPECT_EQ(found.lse[i], kNone);
            EXPECT_THAT(found.o[i], ::testing::Each(0.0f));
            continue;
          }
          const double error = ErrorOf(found.o[i], exact.o[i]);
          const double off = std::abs(found.lse[i] - exact.lse[i]);
          if (tolerated == 0) {
            EXPECT_LT(std::max(error, off), 1e-3);
          }
          errors += error;
          ++answers;
          far += std::max(error, off) > 4 * tolerated ? 1 : 0;
        }
      };
      for (uint32_t i = 0; i < ranges.size(); ++i) ask(i, 1);
      ask(0, static_cast<uint32_t>(ranges.size()));
      if (tolerated == 0) continue;
      EXPECT_LT(errors, 2 * tolerated * answers);
      EXPECT_LE(far, 1u) << "of " << answers;  // what should not be seen weighs as much as the rest
    }
  }
}

// Most tokens of the last run weigh much more than all others, but are not to be seen. If they
// counted, nothing else would be good enough and all would be attended exactly.
TEST(ClusterRunsTest, WhatAQueryDoesNotSeeMakesNoErrorMatterLessOrMore) {
  constexpr uint32_t kSeen = 4200, kHeads = 10;
  constexpr float kTolerated = 0.02f;
  const std::vector<TokenRange> ranges{{kFirst, kFirst + kSeen}};
  for (const bool open_all : {false, true}) {
    uint32_t scanned_alone = 0, scanned_beside = 0, far = 0;
    double errors = 0, errors_alone = 0, predicted_alone = 0, predicted_beside = 0;
    for (uint32_t h = 0; h < kHeads; ++h) {
      ClusterHead head(6144 + h, 64, 2);
      const std::span<const float> q = head.Asked(0);
      float length = 0;
      for (const float x : q) length += x * x;
      for (uint32_t t = kSeen; t < head.tokens; ++t) {
        std::vector<float> k(64);
        const float score = 14 + static_cast<float>(t % 16) / 16;
        for (uint32_t c = 0; c < 64; ++c) k[c] = q[c] * score / (length * head.scale);
        head.SetKey(t, k);
      }
      ClusterRuns runs(head, ClusterRuns::Even(head, 3)), seen(head, {2048, 4096, kSeen});
      runs.Learn();
      runs.OpenAll(open_all);
      seen.Rebuild(runs.model);
      const ClusterAnswer exact = Exactly(runs, head.Queries(0, 1), ranges);
      const ClusterAnswer alone = Search(seen, head.Queries(0, 1), ranges, Within(kTolerated));
      const ClusterAnswer beside = Search(runs, head.Queries(0, 1), ranges, Within(kTolerated));
      scanned_alone += alone.tokens[0] == kSeen;
      scanned_beside += beside.tokens[0] == kSeen;
      const double error = ErrorOf(beside.o[0], exact.o[0]);
      const double error_alone = ErrorOf(alone.o[0], exact.o[0]);
      errors += error;
      errors_alone += error_alone;
      far += error > 0.04 + std::max(0.04, 2 * error_alone) ? 1 : 0;
      predicted_alone += alone.predicted[0];
      predicted_beside += beside.predicted[0];
    }
    EXPECT_LE(scanned_beside,
              scanned_alone + kHeads / 2);  // of all heads, if hidden tokens counted
    // Hidden tokens lie in groups with others, whose codes are the worse for it.
    EXPECT_LT(errors, 1.5 * errors_alone + 0.01 * kHeads);
    EXPECT_LE(far, 1u);
    EXPECT_LT(predicted_beside, 1.5 * predicted_alone + 0.01 * kHeads);
  }
}

// One token in 60 lies far from all that it can be grouped with, and queries seek one of these as
// no sampled query did: codes miss its score by several nats, and more than a usual token's.
TEST(ClusterRunsTest, TokensFarFromTheirGroupsAreFoundByWhatTheirCodesMayMiss) {
  constexpr uint32_t kEvery = 60, kDim = 128, kTokens = 32768;
  ClusterHead head(kTokens, kDim, 2);
  std::normal_distribution<float> normal;
  std::vector<float> key(kDim), difference(kDim);
  const std::vector<float> across = Orthonormal(head.directions, kDim);
  for (uint32_t t = 0; t < head.tokens; t += kEvery) {
    for (float& x : key) x = 1.2f * normal(head.random);
    // Across the directions of all others, which have the codes' bits.
    for (size_t at = 0; at < across.size(); at += kDim) {
      float along = 0;
      for (uint32_t c = 0; c < kDim; ++c) along += key[c] * across[at + c];
      for (uint32_t c = 0; c < kDim; ++c) key[c] -= along * across[at + c];
    }
    for (float& x : key) x += 0.5f;
    head.SetKey(t, key);
  }
  for (uint32_t i = 0; i < ClusterHead::kAsked; ++i) {
    const uint32_t t = (7 + 4 * i) * kEvery;
    float length = 0;
    for (uint32_t c = 0; c < kDim; ++c) {
      difference[c] = LoadAsFloat(head.keys.data(), size_t{t} * kDim + c, head.dtype) - 0.5f;
      length += difference[c] * difference[c];
    }
    // Beside what it asks anyway: the token weighs about as much as all others.
    const float more = 9.0f / (length * head.scale);
    for (uint32_t c = 0; c < kDim; ++c) {
      float& x = head.asked[size_t{i} * kDim + c];
      x = Bf16ToFloat(FloatToBf16(x + more * difference[c]));
    }
  }
  ClusterRuns runs(head, ClusterRuns::Even(head, 2));
  runs.Learn();
  runs.OpenAll(true);
  const ClusterErrors found = ErrorsOf(head, runs, Within(0.02f), 4);
  const auto lost = std::count_if(found.errors.begin(), found.errors.end(),
                                  [](double error) { return error > 0.25; });
  EXPECT_LE(lost, 1);
  EXPECT_LT(found.mean(), 0.02);
}

// One token in eight lies three times as far from its group as the others do: codes miss its score
// by as much more, and were its weight taken for what its code says, most queries would find too
// little mass.
TEST(ClusterRunsTest, TokensFarFromTheirGroupsWeighMoreThanTheirCodesSay) {
  constexpr uint32_t kEvery = 8, kDim = 64;
  ClusterHead head(16384, kDim, 2);
  std::normal_distribution<float> normal;
  std::vector<float> key(kDim);
  for (uint32_t t = 0; t < head.tokens; ++t) {
    const float away = t % kEvery == 0 ? 0.6f : 0.2f;
    for (uint32_t c = 0; c < kDim; ++c) {
      key[c] = LoadAsFloat(head.keys.data(), size_t{t} * kDim + c, head.dtype) +
               away * normal(head.random);
    }
    head.SetKey(t, key);
  }
  ClusterRuns runs(head, ClusterRuns::Even(head, 2));
  runs.Learn();
  ClusterLimits limits;
  limits.depth = ClusterLimits::Depth::kCodes;
  const std::vector<TokenRange> ranges(1, head.all());
  double missed = 0;
  for (uint32_t i = 0; i < ClusterHead::kAsked; ++i) {
    const QueryBlock query = head.Queries(i, 1);
    const double lse = Exactly(runs, query, ranges).lse[0];
    missed += (Search(runs, query, ranges, limits).lse[0] - lse) / ClusterHead::kAsked;
  }
  EXPECT_GT(missed, -0.2);  // -0.3 by their codes alone
  EXPECT_LT(missed, 0.4);
}

TEST(ClusterRunsTest, ManyThreadsAnswerAsOneDoes) {
  const ClusterHead head(6000, 64, 2);
  ClusterRuns runs(head, ClusterRuns::Even(head, 3));
  runs.Learn();
  // Of several sizes, so that memory that a thread uses again has held other things.
  const auto ask = [&](uint32_t n) {
    const uint32_t group = n % 3 == 0 ? 1 : n % 3 == 1 ? 8 : 4;
    const std::vector<TokenRange> ranges(group, {kFirst, kFirst + 6000 - n % 2 * 500});
    return Search(runs, head.Queries(n, group), ranges, Within(n % 4 == 3 ? 0.1f : 0.02f));
  };
  std::vector<ClusterAnswer> wanted;
  for (uint32_t n = 0; n < 24; ++n) wanted.push_back(ask(n));
  std::vector<std::thread> threads;
  for (uint32_t thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (uint32_t i = 0; i < 48; ++i) {
        const uint32_t n = (i * (thread + 1) + thread) % 24;
        const ClusterAnswer mine = ask(n);
        ASSERT_EQ(mine.o, wanted[n].o) << n;
        ASSERT_EQ(mine.bytes, wanted[n].bytes) << n;
        ASSERT_EQ(mine.refined, wanted[n].refined) << n;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(ClusterRunsTest, WhatAModelLearnedFromIsKnown) {
  const ClusterHead head(3000, 64, 2);
  ClusterRuns runs(head, {1000, 3000});
  runs.Learn();
  EXPECT_EQ(runs.model->learned_tokens, 3000u);
  EXPECT_EQ(runs.model->learned_queries, ClusterHead::kSampled);
  EXPECT_EQ(runs.model->head_dim(), 64u);
  EXPECT_TRUE(runs.indexes[0]->Fits(runs.views[0]));
  EXPECT_FALSE(runs.indexes[0]->Fits(runs.views[1]));
}

TEST(ClusterRunsTest, WhatCannotBeIndexedIsRefused) {
  const ClusterHead head(500, 64, 2), narrow(500, 32, 2);
  ClusterRuns runs(head, {500, 500}), others(narrow, {500});  // the second run is empty
  const auto code = [](const auto& made) { return made.status().code(); };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code(LearnClusters({}, {})), kInvalid);
  EXPECT_EQ(code(LearnClusters(std::span(runs.views).last(1), head.sampled)), kInvalid);
  EXPECT_EQ(code(LearnClusters(runs.views, head.sampled)), kInvalid);
  EXPECT_EQ(code(LearnClusters(std::span(runs.views).first(1),
                               std::span(head.sampled).first(100))),
            kInvalid);
  KvView odd = runs.views[0];
  odd.head_dim = 24;
  EXPECT_EQ(code(LearnClusters({&odd, 1}, {})), kInvalid);
  for (const uint32_t group : {0u, 7u}) {
    const auto first = std::span(runs.views).first(1);
    EXPECT_EQ(code(LearnClusters(first, head.sampled, {.group = group})), kInvalid);
  }
  auto learned = LearnClusters(std::span(runs.views).first(1), head.sampled);
  ASSERT_TRUE(learned.ok()) << learned.status();
  EXPECT_EQ(code(ClusterIndex::Build(runs.views[1], learned->model)), kInvalid);
  EXPECT_EQ(code(ClusterIndex::Build(others.views[0], learned->model)), kInvalid);
}

}  // namespace
}  // namespace quarry

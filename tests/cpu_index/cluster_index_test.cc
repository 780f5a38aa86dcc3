// One run's clusters: what is read is exact, and what is estimated is as near as is tolerated.
#include "cpu_index/cluster_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <set>
#include <vector>

#include "cpu_index/kernels.h"
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

TEST(ClusterIndexTest, EverythingRefinedIsExactAndEachTokenCountsOnce) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const uint32_t n : {1u, 5u, 16u, 17u, 255u, 256u, 257u, 1500u}) {
      SCOPED_TRACE(::testing::Message() << n << " tokens of type " << static_cast<int>(dtype));
      const ClusterHead head(n, 64, 2, dtype);
      ClusterRuns run(head, {n});
      run.Learn();
      const std::vector<TokenRange> ranges(4, head.all());
      const ClusterAnswer exact = Exactly(run, head.Queries(0, 4), ranges);
      const ClusterAnswer all = Search(run, head.Queries(0, 4), ranges, Within(0));
      std::vector<uint32_t> wanted(n);
      std::iota(wanted.begin(), wanted.end(), kFirst);
      EXPECT_EQ(all.refined, wanted);
      EXPECT_THAT(all.tokens, ::testing::Each(uint64_t{n}));
      EXPECT_THAT(all.predicted, ::testing::Each(0.0));
      for (uint32_t i = 0; i < 4; ++i) {
        EXPECT_LT(ErrorOf(all.o[i], exact.o[i]), 1e-3);
        EXPECT_NEAR(all.lse[i], exact.lse[i], 1e-3);
      }
    }
  }
}

TEST(ClusterIndexTest, TheLongestHeadsCanBeLearnedAndSearched) {
  const ClusterHead head(700, kMaxHeadDim, 2);
  ClusterRuns run(head, {400, 700});
  run.Learn();
  const std::vector<TokenRange> ranges(4, head.all());
  const ClusterAnswer exact = Exactly(run, head.Queries(0, 4), ranges);
  for (const float tolerated : {0.0f, 0.1f}) {
    const ClusterAnswer found = Search(run, head.Queries(0, 4), ranges, Within(tolerated));
    for (uint32_t i = 0; i < 4; ++i) {
      EXPECT_LT(ErrorOf(found.o[i], exact.o[i]), 1e-3 + 3 * tolerated);
    }
  }
}

TEST(ClusterIndexTest, ErrorsStayNearWhatIsToleratedAndLessIsReadForMoreOfIt) {
  for (const float spread : {1.0f, 2.5f}) {
    const ClusterHead head(16384, 64, spread);
    ClusterRuns run(head, {head.tokens});
    run.Learn();
    uint64_t before = std::numeric_limits<uint64_t>::max();
    for (const float tolerated : {0.02f, 0.05f, 0.15f}) {
      SCOPED_TRACE(::testing::Message() << "spread " << spread << ", tolerated " << tolerated);
      const ClusterErrors found = ErrorsOf(head, run, Within(tolerated), 4);
      EXPECT_LT(found.mean(), 2 * tolerated);
      EXPECT_LE(found.bytes, before);
      before = found.bytes;
    }
    EXPECT_LT(before, ClusterHead::kAsked / 4 * 2 * head.keys.size() / 4);
  }
}

TEST(ClusterIndexTest, PredictedErrorsAreAboutTheTrueOnes) {
  for (const float spread : {1.0f, 2.5f}) {
    for (const uint32_t head_dim : {64u, 128u}) {
      const ClusterHead head(12000, head_dim, spread);
      ClusterRuns run(head, {head.tokens});
      run.Learn();
      for (const float tolerated : {0.02f, 0.05f, 0.15f}) {
        SCOPED_TRACE(::testing::Message() << "spread " << spread << ", head_dim " << head_dim
                                          << ", tolerated " << tolerated);
        ClusterErrors found = ErrorsOf(head, run, Within(tolerated), 1);
        EXPECT_LE(Median(found.predicted), 1.5 * tolerated);
        for (size_t i = 0; i < found.errors.size(); ++i) found.errors[i] /= found.predicted[i];
        // Where nothing stands out, codes are doubted more than they err.
        EXPECT_GT(Median(found.errors), 0.15);
        EXPECT_LT(Median(found.errors), 2);
      }
    }
  }
}

TEST(ClusterIndexTest, EveryHeadDimTypeAndGroupIsAnsweredWithinTheError) {
  for (const uint32_t head_dim : {16u, 64u, 96u, 128u}) {
    for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
      const ClusterHead head(4000, head_dim, 2, dtype);
      ClusterRuns run(head, {head.tokens});
      run.Learn();
      for (const uint32_t group : {1u, 4u, 8u, 33u}) {
        EXPECT_LT(ErrorsOf(head, run, Within(0.05f), group).mean(), 0.1)
            << "head_dim " << head_dim << ", type " << static_cast<int>(dtype) << ", group "
            << group;
      }
    }
  }
}

TEST(ClusterIndexTest, TokensOutsideAQuerysRangeHaveNoPart) {
  const ClusterHead head(2000, 64, 2);
  ClusterRuns run(head, {head.tokens});
  run.Learn();
  const std::vector<TokenRange> ranges = {{kFirst + 100, kFirst + 1900},
                                          {0, kFirst + 1},
                                          {kFirst + 1999, kFirst + 5000},
                                          {kFirst, kFirst + 2000},
                                          {kFirst + 7, kFirst + 7},
                                          {kFirst + 31, kFirst + 48}};
  const QueryBlock queries = head.Queries(0, 6);
  const ClusterAnswer exact = Exactly(run, queries, ranges);
  for (const float tolerated : {0.0f, 0.02f}) {
    const ClusterAnswer found = Search(run, queries, ranges, Within(tolerated));
    for (uint32_t i = 0; i < 6; ++i) {
      SCOPED_TRACE(::testing::Message() << "query " << i << ", tolerated " << tolerated);
      EXPECT_LE(found.tokens[i], Intersect(ranges[i], head.all()).size());
      if (i == 4) continue;
      EXPECT_LT(ErrorOf(found.o[i], exact.o[i]), tolerated == 0 ? 1e-3 : 0.1);
      EXPECT_NEAR(found.lse[i], exact.lse[i], tolerated == 0 ? 1e-3 : 0.1);
    }
    EXPECT_EQ(found.lse[4], kNone);
    EXPECT_THAT(found.o[4], ::testing::Each(0.0f));
    EXPECT_EQ(found.predicted[4], 0);
  }
  const std::vector<TokenRange> none(2, TokenRange{0, kFirst});
  const ClusterAnswer empty = Search(run, head.Queries(0, 2), none, Within(0.02f));
  EXPECT_EQ(empty.lse[0], kNone);
  EXPECT_THAT(empty.o[0], ::testing::Each(0.0f));
  EXPECT_TRUE(empty.refined.empty());
}

// For each query a token of its own, in the middle of others, with most of the mass.
void HideNeedles(ClusterHead* head) {
  const uint32_t d = head->head_dim, apart = head->tokens / ClusterHead::kAsked;
  for (uint32_t i = 0; i < ClusterHead::kAsked; ++i) {
    // Where the query points, of the directions that keys have.
    std::vector<float> k(d);
    for (size_t s = 0; s < head->directions.size(); s += d) {
      const std::span<const float> direction = std::span(head->directions).subspan(s, d);
      const auto q = head->Asked(i);
      const float along = std::inner_product(q.begin(), q.end(), direction.begin(), 0.0f);
      for (uint32_t c = 0; c < d; ++c) k[c] += along * direction[c];
    }
    const auto q = head->Asked(i);
    const float score = std::inner_product(q.begin(), q.end(), k.begin(), 0.0f) * head->scale;
    for (float& x : k) x *= 20 / score;
    head->SetKey(i * apart + static_cast<uint32_t>(head->random() % apart), k);
  }
}

TEST(ClusterIndexTest, NoSingleTokenThatHoldsTheMassIsMissedWhenEveryCodeIsRead) {
  ClusterHead head(8192, 64, 1.5f);
  HideNeedles(&head);
  ClusterRuns run(head, {head.tokens});
  run.Learn();
  run.OpenAll(true);
  const std::vector<TokenRange> ranges(4, head.all());
  for (uint32_t first = 0; first < ClusterHead::kAsked; first += 4) {
    QueryBlock queries = head.Queries(first, 4);
    const ClusterAnswer exact = Exactly(run, queries, ranges);
    const ClusterAnswer found = Search(run, queries, ranges, Within(0.05f));
    queries.ranges = ranges;
    CoarseScores scores;
    ExactScan().Score(run.views[0], queries, &scores);
    for (uint32_t i = 0; i < 4; ++i) {
      const auto row = scores.Row(i);
      const auto best = std::max_element(row.begin(), row.end()) - row.begin();
      EXPECT_THAT(found.refined, ::testing::Contains(kFirst + static_cast<uint32_t>(best)));
      // Without the needle the error would be near 1.
      EXPECT_LT(ErrorOf(found.o[i], exact.o[i]), 0.3) << first + i;
    }
  }
}

TEST(ClusterIndexTest, EstimatesAreDoubtedMoreBesideWhatLiesElsewhere) {
  const ClusterHead head(8192, 64, 2);
  ClusterRuns run(head, {head.tokens});
  run.Learn();
  const std::vector<TokenRange> ranges(4, head.all());
  ClusterLimits limits = Within(1000);  // nothing is read
  const ClusterAnswer alone = Search(run, head.Queries(0, 4), ranges, limits);
  const std::vector<float> other(4, 1e3f);  // counts as much as what is found here
  limits.other_length = other;
  const ClusterAnswer beside = Search(run, head.Queries(0, 4), ranges, limits);
  for (uint32_t i = 0; i < 4; ++i) {
    ASSERT_GT(alone.predicted[i], 0);
    EXPECT_NEAR(std::log(beside.predicted[i] / alone.predicted[i]), 0.2 / 2, 0.002);
  }
}

TEST(ClusterIndexTest, WhatIsMergedWithMakesErrorsMatterLess) {
  const ClusterHead head(8192, 64, 2);
  ClusterRuns run(head, {head.tokens});
  run.Learn();
  run.OpenAll(false);
  const std::vector<TokenRange> ranges(4, head.all());
  std::vector<double> errors;
  for (uint32_t first = 0; first < ClusterHead::kAsked; first += 4) {
    const QueryBlock queries = head.Queries(first, 4);
    const ClusterAnswer exact = Exactly(run, queries, ranges);
    const ClusterAnswer alone = Search(run, queries, ranges, Within(0.02f));
    // As if tokens elsewhere had e^5 times the mass and values as long.
    std::vector<float> other;
    for (uint32_t i = 0; i < 4; ++i) {
      double square = 0;
      for (float x : exact.o[i]) square += double{x} * x;
      other.push_back(exact.lse[i] + 5 + static_cast<float>(0.5 * std::log(square)));
    }
    ClusterLimits limits = Within(0.02f);
    limits.other_length = other;
    const ClusterAnswer beside = Search(run, queries, ranges, limits);
    EXPECT_LT(beside.bytes, alone.bytes / 2);
    for (uint32_t i = 0; i < 4; ++i) {
      errors.push_back(std::hypot(ErrorOf(beside.o[i], exact.o[i]), beside.lse[i] - exact.lse[i]));
    }
    const std::vector<float> nothing(4, kNone);
    limits.other_length = nothing;
    EXPECT_EQ(Search(run, queries, ranges, limits).o, alone.o);
  }
  // However little they matter, they are answers of their own: at the median within about twice
  // the largest error that searches tolerate.
  std::nth_element(errors.begin(), errors.begin() + errors.size() / 2, errors.end());
  EXPECT_LT(errors[errors.size() / 2], 0.25);
}

TEST(ClusterIndexTest, CorrectionsLieBetweenThoseOfToleratedErrorsThatWereTried) {
  ClusterModel model;
  model.correction = {0.5f, -0.5f, 0.25f};
  EXPECT_FLOAT_EQ(model.CorrectionAt(1), std::exp(0.5f));
  EXPECT_FLOAT_EQ(model.CorrectionAt(0.1f), std::exp(0.5f));
  EXPECT_NEAR(model.CorrectionAt(std::sqrt(0.1f * 0.05f)), 1, 1e-5);
  EXPECT_FLOAT_EQ(model.CorrectionAt(0.05f), std::exp(-0.5f));
  EXPECT_FLOAT_EQ(model.CorrectionAt(0.02f), std::exp(0.25f));
  EXPECT_FLOAT_EQ(model.CorrectionAt(0.001f), std::exp(0.25f));
  EXPECT_FLOAT_EQ(model.CorrectionAt(std::nanf("")), std::exp(0.5f));
}

TEST(ClusterIndexTest, WhatDoubtsHidAtAToleratedErrorIsReadThere) {
  const ClusterHead head(8192, 64, 2);
  ClusterRuns run(head, {head.tokens});
  run.Learn();
  const std::vector<TokenRange> ranges(4, head.all());
  const QueryBlock queries = head.Queries(0, 4);
  const auto tokens = [&](float at_a_tenth, float at_a_fiftieth, float tolerance) {
    auto model = std::make_shared<ClusterModel>(*run.model);
    model->correction = {at_a_tenth, 0, at_a_fiftieth};
    run.Rebuild(model);
    return Search(run, queries, ranges, Within(tolerance)).refined.size();
  };
  const size_t at_a_tenth = tokens(0, 0, 0.1f), at_a_fiftieth = tokens(0, 0, 0.02f);
  EXPECT_GT(tokens(1, 0, 0.1f), at_a_tenth + at_a_tenth / 4);
  EXPECT_GT(tokens(0, 1, 0.02f), at_a_fiftieth + at_a_fiftieth / 4);
  EXPECT_EQ(tokens(1, 0, 0.02f), at_a_fiftieth);
  EXPECT_EQ(tokens(0, 1, 0.1f), at_a_tenth);
}

TEST(ClusterIndexTest, NoMoreTokensAreReadOneByOneThanTheCap) {
  const ClusterHead head(8192, 64, 2.5f);
  ClusterRuns run(head, {head.tokens});
  run.Learn();
  for (const bool open_all : {false, true}) {
    run.OpenAll(open_all);
    for (const uint32_t first : {0u, 1u, 2u, 3u}) {
      const std::vector<TokenRange> ranges(1, head.all());
      const ClusterAnswer free = Search(run, head.Queries(first, 1), ranges, Within(0.01f));
      ASSERT_GT(free.refined.size(), 50u);
      double before = std::numeric_limits<double>::infinity();
      for (const uint32_t most : {1u, 10u, 50u}) {
        ClusterLimits limits = Within(0.01f);
        limits.most_tokens = {&most, 1};
        const ClusterAnswer capped = Search(run, head.Queries(first, 1), ranges, limits);
        EXPECT_LE(capped.refined.size(), most);
        EXPECT_LE(capped.tokens[0], most);
        // It is no secret what that costs.
        EXPECT_GT(capped.predicted[0], free.predicted[0]);
        EXPECT_LE(capped.predicted[0], before);
        before = capped.predicted[0];
      }
    }
  }
}

TEST(ClusterIndexTest, WithoutSampledQueriesItAnswers) {
  const ClusterHead head(3000, 96, 1.5f);
  ClusterRuns run(head, {head.tokens});
  run.Learn({});
  EXPECT_EQ(run.model->learned_queries, 0u);
  EXPECT_LT(ErrorsOf(head, run, Within(0.05f), 4).mean(), 0.2);
}

TEST(ClusterIndexTest, EqualKeysWeighAlike) {
  for (const uint32_t n : {3u, 500u, 512u}) {
    ClusterHead same(n, 64, 2);
    for (uint32_t t = 0; t < n; ++t) same.SetKey(t, std::vector<float>(64, 0.25f));
    for (const bool sampled : {false, true}) {
      SCOPED_TRACE(::testing::Message() << n << (sampled ? " sampled" : ""));
      ClusterRuns run(same, {n});
      run.Learn(sampled ? std::span<const float>(same.sampled) : std::span<const float>());
      for (const float tolerated : {0.01f, 0.5f}) {
        const std::vector<TokenRange> all(4, same.all());
        const ClusterAnswer mean = Exactly(run, same.Queries(0, 4), all);
        const ClusterAnswer estimate = Search(run, same.Queries(0, 4), all, Within(tolerated));
        for (uint32_t i = 0; i < 4; ++i) {
          EXPECT_LT(ErrorOf(estimate.o[i], mean.o[i]), tolerated < 0.1f ? 0.03 : 0.25);
          EXPECT_NEAR(estimate.lse[i], mean.lse[i], 0.02);
        }
      }
    }
  }
}

TEST(ClusterIndexTest, QueriesOfNothingOrOfEverythingDoNoHarm) {
  const ClusterHead head(1000, 64, 2);
  ClusterRuns run(head, {head.tokens});
  run.Learn();
  std::vector<float> q(6 * 64, 0.0f);
  constexpr float kLarge[] = {0, 1e10f, 3e38f, std::numeric_limits<float>::infinity(),
                              std::numeric_limits<float>::quiet_NaN(), 1e-40f};
  for (uint32_t i = 0; i < 6 * 64; ++i) q[i] = (i % 3 == 0 ? -1 : 1) * kLarge[i / 64];
  const std::vector<TokenRange> ranges(6, head.all());
  for (const bool open_all : {false, true}) {
    run.OpenAll(open_all);
    for (const float tolerated : {0.0f, 0.05f}) {
      // Alone, and all together.
      for (const uint32_t count : {1u, 6u}) {
        for (uint32_t first = 0; first + count <= 6; ++first) {
          const QueryBlock queries{q.data() + first * 64, DType::kFp32, count, 64, 1.0f, {}};
          const ClusterAnswer found =
              Search(run, queries, std::span(ranges).first(count), Within(tolerated));
          for (const uint32_t token : found.refined) ASSERT_LT(token - kFirst, head.tokens);
        }
      }
      const ClusterAnswer zero = Search(run, {q.data(), DType::kFp32, 1, 64, 1.0f, {}},
                                        std::span(ranges).first(1), Within(tolerated));
      EXPECT_NEAR(zero.lse[0], std::log(1000.0f), 0.02);
    }
  }
}

TEST(ClusterIndexTest, TheSameRunAndQueriesGiveTheSameAnswers) {
  const ClusterHead head(5000, 128, 2);
  ClusterRuns a(head, {head.tokens}), b(head, {head.tokens});
  a.Learn();
  b.Learn();
  EXPECT_EQ(a.indexes[0]->Serialize(), b.indexes[0]->Serialize());
  const std::vector<TokenRange> ranges(4, head.all());
  const ClusterAnswer first = Search(a, head.Queries(0, 4), ranges, Within(0.05f));
  Search(b, head.Queries(4, 4), ranges, Within(0.01f));  // leaves nothing behind
  const ClusterAnswer second = Search(b, head.Queries(0, 4), ranges, Within(0.05f));
  EXPECT_EQ(first.o, second.o);
  EXPECT_EQ(first.lse, second.lse);
  EXPECT_EQ(first.bytes, second.bytes);
  EXPECT_EQ(first.refined, second.refined);
  EXPECT_GT(a.indexes[0]->memory_bytes(), 5000u * 24);
}

TEST(ClusterIndexTest, WhatIsMergedIntoStaysThere) {
  const ClusterHead head(3000, 64, 2);
  ClusterRuns cut(head, {1500, 3000}), whole(head, {3000});
  cut.Learn();
  const std::vector<TokenRange> ranges(2, head.all());
  QueryBlock queries = head.Queries(0, 2);
  queries.ranges = ranges;
  const ClusterAnswer exact = Exactly(whole, queries, ranges);
  std::vector<float> acc(2 * 64);
  std::vector<Partial> partials(2);
  for (uint32_t i = 0; i < 2; ++i) partials[i].acc = std::span(acc).subspan(i * 64, 64);
  ExactScan().AttendAll(cut.views[0], queries, partials);
  const ClusterRun second{cut.indexes[1].get(), &cut.views[1], ranges};
  SearchClusters({&second, 1}, queries, Within(0), partials);
  for (uint32_t i = 0; i < 2; ++i) {
    std::vector<float> o(64);
    EXPECT_NEAR(partials[i].Finish(o), exact.lse[i], 1e-3);
    EXPECT_LT(ErrorOf(o, exact.o[i]), 1e-3);
    EXPECT_EQ(partials[i].tokens, 3000u);
  }
}

}  // namespace
}  // namespace quarry

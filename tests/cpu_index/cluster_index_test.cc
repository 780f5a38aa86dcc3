#include "cpu_index/cluster_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "cpu_index/budget.h"
#include "proto/half.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr uint32_t kFirst = 300;  // token of the runs

// Keys of a few strong directions around a mean, values that go with them, in segments of odd
// lengths; `spread` is about the standard deviation of a query's scores.
struct Head {
  Head(uint32_t n, uint32_t d, float spread, DType dtype = DType::kBf16)
      : tokens(n), head_dim(d), type(dtype), random(Seed() + n) {
    std::normal_distribution<float> normal;
    const uint32_t strong = d / 4;
    directions.resize(strong * d);
    std::vector<float> to_value(strong * d);
    for (float& x : directions) x = normal(random) / std::sqrt(static_cast<float>(d));
    for (float& x : to_value) x = 0.3f * normal(random);
    keys.resize(n * d * DTypeBytes(dtype));
    values.resize(keys.size());
    for (uint32_t t = 0; t < n; ++t) {
      std::vector<float> at(strong), k(d, 0.5f), v(d);
      for (float& x : at) x = normal(random);
      for (uint32_t c = 0; c < d; ++c) {
        k[c] += 0.1f * normal(random);
        v[c] = normal(random) + 1.0f;
        for (uint32_t s = 0; s < strong; ++s) {
          k[c] += at[s] * directions[s * d + c];
          v[c] += at[s] * to_value[s * d + c];
        }
        StoreFromFloat(keys.data(), t * d + c, dtype, k[c]);
        StoreFromFloat(values.data(), t * d + c, dtype, v[c]);
      }
    }
    scale = spread / 0.5f / std::sqrt(static_cast<float>(d));
    for (uint32_t i = 0; i < 96 * d; ++i) {
      const float q = Bf16ToFloat(FloatToBf16(normal(random)));
      (i < 64 * d ? train : test).push_back(i < 64 * d ? q * scale : q);
    }
    for (uint32_t lo = 0; lo < n;) {
      const uint32_t hi = std::min(n, lo + 77);
      segments.push_back({keys.data() + lo * d * DTypeBytes(dtype),
                          values.data() + lo * d * DTypeBytes(dtype),
                          {kFirst + lo, kFirst + hi}});
      lo = hi;
    }
    view.segments = segments;
    view.head_dim = d;
    view.dtype = dtype;
  }
  Head(const Head&) = delete;

  void SetKey(uint32_t t, std::span<const float> k) {
    for (uint32_t c = 0; c < head_dim; ++c)
      StoreFromFloat(keys.data(), t * head_dim + c, type, k[c]);
  }
  std::unique_ptr<ClusterIndex> Build(bool with_queries = true) const {
    auto index = ClusterIndex::Build(
        view, with_queries ? std::span<const float>(train) : std::span<const float>());
    EXPECT_TRUE(index.ok()) << index.status();
    return *std::move(index);
  }
  QueryBlock Queries(uint32_t first, uint32_t count, std::span<const TokenRange> ranges,
                     float tolerance) const {
    return {test.data() + size_t{first} * head_dim,
            DType::kBf16,
            count,
            head_dim,
            scale,
            ranges,
            tolerance};
  }

  uint32_t tokens, head_dim;
  DType type;
  float scale = 1;
  std::mt19937 random;
  std::vector<std::byte> keys, values;
  std::vector<float> directions;  // [][head_dim] that keys lie in, but for noise
  std::vector<float> train, test;
  std::vector<KvSegment> segments;
  KvView view;
};

struct Answer {
  std::vector<std::vector<float>> o;
  std::vector<float> lse;
  uint64_t tokens = 0, bytes = 0;
  std::vector<double> predicted;
  std::vector<uint32_t> selected;  // of the first query
};

Answer Exact(const Head& head, const QueryBlock& queries) {
  Answer answer;
  std::vector<float> acc(size_t{queries.queries} * head.head_dim);
  std::vector<Partial> partials(queries.queries);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    partials[i].acc = std::span(acc).subspan(size_t{i} * head.head_dim, head.head_dim);
  }
  ExactScan().AttendAll(head.view, queries, partials);
  for (const Partial& partial : partials) {
    answer.o.emplace_back(head.head_dim);
    answer.lse.push_back(partial.Finish(answer.o.back()));
  }
  return answer;
}

Answer Approximate(const Head& head, const ClusterIndex& index, const QueryBlock& queries,
                   const Budget& budget, float other_length = kNone) {
  Answer answer;
  CoarseScores coarse;
  index.Score(head.view, queries, &coarse);
  RunAllotment allotment{std::vector<float>(queries.queries),
                         std::vector<uint32_t>(queries.queries),
                         std::vector<float>(queries.queries)};
  for (uint32_t i = 0; i < queries.queries; ++i) {
    const RunScores scores{&coarse, i};
    RunShare share;
    AllocateBudget(budget, {&scores, 1}, {&share, 1}, other_length);
    allotment.threshold[i] = share.threshold;
    allotment.ties[i] = share.ties;
    allotment.exact[i] = share.exact;
  }
  std::vector<float> acc(size_t{queries.queries} * head.head_dim);
  std::vector<Partial> partials(queries.queries);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    partials[i].acc = std::span(acc).subspan(size_t{i} * head.head_dim, head.head_dim);
  }
  index.Refine(head.view, queries, coarse, allotment, partials);
  for (const Partial& partial : partials) {
    answer.o.emplace_back(head.head_dim);
    answer.lse.push_back(partial.Finish(answer.o.back()));
    answer.predicted.push_back(partial.RelativeError());
    answer.tokens += partial.tokens;
    answer.bytes += partial.bytes;
  }
  index.Selected(coarse, allotment, 0, &answer.selected);
  return answer;
}

double Error(const std::vector<float>& a, const std::vector<float>& exact) {
  double difference = 0, length = 0;
  for (size_t d = 0; d < a.size(); ++d) {
    difference += (a[d] - exact[d]) * (a[d] - exact[d]);
    length += exact[d] * exact[d];
  }
  return std::sqrt(difference / length);
}

Budget ErrorBudget(float error) {
  Budget budget;
  budget.kind = Budget::Kind::kError;
  budget.error = error;
  return budget;
}

TEST(ClusterIndexTest, EverythingRefinedIsExactAndEachTokenCountsOnce) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const uint32_t n : {1u, 5u, 16u, 17u, 257u, 1500u}) {
      const Head head(n, 64, 2, dtype);
      const auto index = head.Build();
      const std::vector<TokenRange> ranges(4, head.view.tokens());
      const QueryBlock queries = head.Queries(0, 4, ranges, 0);
      const Answer exact = Exact(head, queries);
      const Answer all = Approximate(head, *index, queries, Budget{});
      EXPECT_EQ(all.tokens, uint64_t{n} * 4);
      EXPECT_EQ(std::set<uint32_t>(all.selected.begin(), all.selected.end()).size(), n);
      for (uint32_t i = 0; i < 4; ++i) {
        EXPECT_LT(Error(all.o[i], exact.o[i]), 1e-3) << n;
        EXPECT_NEAR(all.lse[i], exact.lse[i], 1e-3) << n;
      }
    }
  }
}

TEST(ClusterIndexTest, ErrorsStayNearWhatIsToleratedAndLessIsReadForMoreOfIt) {
  for (const float spread : {1.0f, 2.5f}) {
    const Head head(16384, 64, spread);
    const auto index = head.Build();
    const std::vector<TokenRange> ranges(4, head.view.tokens());
    uint64_t before = std::numeric_limits<uint64_t>::max();
    for (const float error : {0.02f, 0.05f, 0.15f}) {
      double sum = 0, predicted = 0;
      uint64_t bytes = 0;
      for (uint32_t first = 0; first < 32; first += 4) {
        const QueryBlock queries = head.Queries(first, 4, ranges, error);
        const Answer exact = Exact(head, queries);
        const Answer found = Approximate(head, *index, queries, ErrorBudget(error));
        for (uint32_t i = 0; i < 4; ++i) {
          sum += Error(found.o[i], exact.o[i]);
          predicted += found.predicted[i];
        }
        bytes += found.bytes;
      }
      EXPECT_LT(sum / 32, 2 * error) << "spread " << spread;
      EXPECT_LT(sum, 3 * predicted) << "spread " << spread << ", tolerated " << error;
      EXPECT_GT(3 * sum, predicted) << "spread " << spread << ", tolerated " << error;
      EXPECT_LE(bytes, before) << "spread " << spread << ", tolerated " << error;
      before = bytes;
    }
    EXPECT_LT(before, 8 * 2 * head.keys.size() / 4) << "spread " << spread;
  }
}

TEST(ClusterIndexTest, TokensOutsideAQuerysRangeHaveNoPart) {
  Head head(2000, 64, 2);
  const auto index = head.Build();
  const std::vector<TokenRange> ranges = {{kFirst + 100, kFirst + 1900},
                                          {0, kFirst + 1},
                                          {kFirst + 1999, kFirst + 5000},
                                          {kFirst, kFirst + 2000}};
  const QueryBlock queries = head.Queries(0, 4, ranges, 0.02f);
  const Answer exact = Exact(head, queries);
  const Answer found = Approximate(head, *index, queries, ErrorBudget(0.02f));
  for (uint32_t i = 0; i < 4; ++i) EXPECT_LT(Error(found.o[i], exact.o[i]), 0.1) << i;
  const std::vector<TokenRange> none(2, TokenRange{0, kFirst});
  const Answer empty =
      Approximate(head, *index, head.Queries(0, 2, none, 0.02f), ErrorBudget(0.02f));
  EXPECT_EQ(empty.lse[0], kNone);
  EXPECT_THAT(empty.o[0], ::testing::Each(0.0f));
}

TEST(ClusterIndexTest, NoSingleTokenThatHoldsTheMassIsMissedWhenEveryCodeIsRead) {
  Head head(8192, 64, 1.5f);
  // For each test query a token of its own, in the middle of others, with most of the mass.
  std::vector<uint32_t> needles;
  for (uint32_t i = 0; i < 32; ++i) {
    needles.push_back(static_cast<uint32_t>(head.random() % (8192 / 32)) + i * (8192 / 32));
    const std::span<const float> q = std::span(head.test).subspan(i * 64, 64);
    // Where the query points, of the directions that keys have.
    std::vector<float> k(64);
    for (size_t s = 0; s < head.directions.size(); s += 64) {
      const auto direction = head.directions.begin() + static_cast<ptrdiff_t>(s);
      const float along = std::inner_product(q.begin(), q.end(), direction, 0.0f);
      for (uint32_t c = 0; c < 64; ++c) k[c] += along * direction[c];
    }
    const float score = std::inner_product(q.begin(), q.end(), k.begin(), 0.0f) * head.scale;
    for (float& x : k) x *= 20 / score;
    head.SetKey(needles.back(), k);
  }
  const auto index = head.Build();
  index->set_open_all(true);
  const std::vector<TokenRange> ranges(4, head.view.tokens());
  for (uint32_t first = 0; first < 32; first += 4) {
    const QueryBlock queries = head.Queries(first, 4, ranges, 0.05f);
    const Answer exact = Exact(head, queries);
    const Answer found = Approximate(head, *index, queries, ErrorBudget(0.05f));
    CoarseScores scores;
    ExactScan().Score(head.view, queries, &scores);
    const auto row = scores.Row(0);
    const auto best = std::max_element(row.begin(), row.end()) - row.begin();
    EXPECT_THAT(found.selected, ::testing::Contains(static_cast<uint32_t>(best)));
    // Without the needle the error would be near 1.
    for (uint32_t i = 0; i < 4; ++i) EXPECT_LT(Error(found.o[i], exact.o[i]), 0.3) << first + i;
  }
}

TEST(ClusterIndexTest, WhatIsMergedWithMakesErrorsMatterLess) {
  const Head head(8192, 64, 2);
  const auto index = head.Build();
  index->set_open_all(false);
  const std::vector<TokenRange> ranges(4, head.view.tokens());
  QueryBlock queries = head.Queries(0, 4, ranges, 0.02f);
  const Answer exact = Exact(head, queries);
  const Answer alone = Approximate(head, *index, queries, ErrorBudget(0.02f));
  // As if tokens elsewhere had e^5 times the mass and values as long.
  const float longest = *std::max_element(exact.lse.begin(), exact.lse.end()) + 5 + 2;
  const std::vector<float> other(4, longest);
  queries.other_length = other;
  const Answer beside = Approximate(head, *index, queries, ErrorBudget(0.02f), longest);
  EXPECT_LT(beside.bytes, alone.bytes / 4);
}

TEST(ClusterIndexTest, WithoutSampledQueriesAndWithEqualKeysItAnswers) {
  const Head head(3000, 96, 1.5f);
  const auto unaware = head.Build(false);
  const std::vector<TokenRange> ranges(4, head.view.tokens());
  const QueryBlock queries = head.Queries(0, 4, ranges, 0.05f);
  const Answer exact = Exact(head, queries);
  const Answer found = Approximate(head, *unaware, queries, ErrorBudget(0.05f));
  for (uint32_t i = 0; i < 4; ++i) EXPECT_LT(Error(found.o[i], exact.o[i]), 0.2);

  Head same(500, 64, 2);
  for (uint32_t t = 0; t < 500; ++t) same.SetKey(t, std::vector<float>(64, 0.25f));
  const auto index = same.Build();
  const std::vector<TokenRange> all(4, same.view.tokens());
  const QueryBlock few = same.Queries(0, 4, all, 0.01f);
  const Answer mean = Exact(same, few);
  const Answer estimate = Approximate(same, *index, few, ErrorBudget(0.01f));
  for (uint32_t i = 0; i < 4; ++i) {
    EXPECT_LT(Error(estimate.o[i], mean.o[i]), 0.02);
    EXPECT_NEAR(estimate.lse[i], mean.lse[i], 0.01);
  }
}

TEST(ClusterIndexTest, TheSameRunAndQueriesGiveTheSameAnswers) {
  const Head head(5000, 128, 2);
  const auto a = head.Build(), b = head.Build();
  const std::vector<TokenRange> ranges(4, head.view.tokens());
  const QueryBlock queries = head.Queries(0, 4, ranges, 0.05f);
  const Answer first = Approximate(head, *a, queries, ErrorBudget(0.05f));
  const Answer second = Approximate(head, *b, queries, ErrorBudget(0.05f));
  EXPECT_EQ(first.o, second.o);
  EXPECT_EQ(first.lse, second.lse);
  EXPECT_EQ(first.bytes, second.bytes);
  EXPECT_GT(a->memory_bytes(), 5000u * 24);
}

}  // namespace
}  // namespace quarry

#include "cpu_index/baselines/baselines.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <span>
#include <vector>

#include "cpu_index/baselines/inner_product.h"
#include "cpu_index/simd.h"
#include "tests/cpu_index/score_threads.h"
#include "tests/support/kv_reference.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::KvData;

constexpr uint32_t kHeadDim = 64;
constexpr uint32_t kFirst = 128;  // the run's first token

// hnswlib takes its nodes' locks in any order while a graph is built: harmless on the one thread
// that we build with, but ThreadSanitizer reports it hundreds of times, as a lock-order inversion.
#ifdef __SANITIZE_THREAD__
constexpr bool kWithHnsw = false;
#else
constexpr bool kWithHnsw = true;
#endif
constexpr BaselineKind kAllKinds[] = {BaselineKind::kFaissFlat, BaselineKind::kFaissIvfFlat,
                                      BaselineKind::kFaissIvfPq, BaselineKind::kHnsw};
const std::span<const BaselineKind> kKinds = std::span(kAllKinds).first(kWithHnsw ? 4 : 3);

// A run in segments of 256 tokens, whose keys share a strong mean, and four queries.
struct Case {
  KvData data;
  std::vector<KvSegment> segments;
  KvView view;
  std::vector<float> q;
  std::vector<TokenRange> ranges;
  QueryBlock queries;

  explicit Case(uint32_t tokens, DType dtype = DType::kBf16)
      : data({.layers = 1, .heads = 4, .kv_heads = 1, .head_dim = kHeadDim, .dtype = dtype}, tokens,
             Seed()) {
    for (size_t i = 0; i < size_t{tokens} * kHeadDim; ++i) {
      char* const k = data.k[0].data();
      StoreFromFloat(k, i, dtype, LoadAsFloat(k, i, dtype) + 3.0f);
    }
    for (uint32_t lo = 0; lo < tokens; lo += 256) {
      segments.push_back({data.k[0].data() + data.offset(lo), data.v[0].data() + data.offset(lo),
                          {kFirst + lo, kFirst + std::min(tokens, lo + 256)}});
    }
    view = {segments, kHeadDim, dtype};
    std::mt19937 random(Seed() + 1);
    std::normal_distribution<float> normal(0, 1.5f);
    for (uint32_t i = 0; i < 4 * kHeadDim; ++i) {
      q.push_back(Bf16ToFloat(FloatToBf16(normal(random))));
    }
    ranges.assign(4, view.tokens());
    queries = {q.data(), DType::kBf16, 4, kHeadDim, 0.125f, ranges};
  }

  double Score(uint32_t query, uint32_t token) const {
    double dot = 0;
    for (uint32_t d = 0; d < kHeadDim; ++d) {
      dot += double{q[query * kHeadDim + d]} *
             LoadAsFloat(data.k[0].data() + data.offset(token - kFirst), d, data.shape.dtype);
    }
    return dot * queries.scale;
  }
  std::set<uint32_t> Best(uint32_t query, size_t k) const {
    std::vector<std::pair<double, uint32_t>> all;
    for (uint32_t t = ranges[query].lo; t < ranges[query].hi; ++t) {
      all.push_back({-Score(query, t), t});
    }
    std::sort(all.begin(), all.end());
    std::set<uint32_t> out;
    for (size_t i = 0; i < std::min(k, all.size()); ++i) out.insert(all[i].second);
    return out;
  }
};

std::unique_ptr<BaselineIndex> Build(BaselineKind kind, const Case& c,
                                     const BaselineOptions& options = {}) {
  absl::StatusOr<std::unique_ptr<BaselineIndex>> index = BuildBaseline(kind, c.view, options);
  if (!index.ok()) {
    ADD_FAILURE() << index.status();
    return nullptr;
  }
  return std::move(*index);
}

std::set<uint32_t> Found(const CoarseScores& lists, uint32_t query) {
  std::set<uint32_t> out;
  for (size_t i = 0; i < lists.Row(query).size(); ++i) {
    out.insert(lists.tokens.lo + lists.NodeOf(query, i));
  }
  return out;
}

// The share of each query's k best tokens that the lists hold.
double Recall(const Case& c, const CoarseScores& lists, size_t k) {
  double hits = 0, all = 0;
  for (uint32_t i = 0; i < c.queries.queries; ++i) {
    const std::set<uint32_t> found = Found(lists, i);
    for (uint32_t token : c.Best(i, k)) {
      hits += found.contains(token) ? 1 : 0;
      ++all;
    }
  }
  return hits / all;
}

TEST(BaselinesTest, ScoresAreExactWhateverFoundThem) {
  for (DType dtype : {DType::kBf16, DType::kFp32}) {
    const Case c(2000, dtype);
    for (BaselineKind kind : kKinds) {
      const auto index = Build(kind, c);
      ASSERT_NE(index, nullptr);
      EXPECT_EQ(index->kind(), BaselineName(kind));
      CoarseScores lists;
      index->Score(c.view, c.queries, &lists);
      for (uint32_t i = 0; i < 4; ++i) {
        EXPECT_EQ(lists.Row(i).size(), 128u) << BaselineName(kind);
        for (size_t j = 0; j < lists.Row(i).size(); ++j) {
          const uint32_t token = lists.tokens.lo + lists.NodeOf(i, j);
          ASSERT_NEAR(lists.Row(i)[j], c.Score(i, token), 1e-4) << BaselineName(kind);
        }
      }
    }
  }
}

TEST(BaselinesTest, FlatAndIvfOverAllClustersFindTheBestTokens) {
  const Case c(3000);
  for (BaselineKind kind : {BaselineKind::kFaissFlat, BaselineKind::kFaissIvfFlat}) {
    const auto index = Build(kind, c, {.nlist = 50});
    ASSERT_NE(index, nullptr);
    index->set_search({.candidates = 64, .nprobe = 50});
    CoarseScores lists;
    index->Score(c.view, c.queries, &lists);
    EXPECT_GE(Recall(c, lists, 64), 0.99) << BaselineName(kind);  // but for ties within rounding
  }
}

TEST(BaselinesTest, MoreEffortFindsMoreAndReadsMore) {
  const Case c(6000);
  for (BaselineKind kind : kKinds.subspan(1)) {
    const auto index = Build(kind, c, {.nlist = 64, .hnsw_m = 8});
    ASSERT_NE(index, nullptr);
    CoarseScores little, much;
    index->set_search({.candidates = 100, .nprobe = 2, .ef_search = 0});
    index->Score(c.view, c.queries, &little);
    index->set_search({.candidates = 400, .nprobe = 48, .ef_search = 600});
    index->Score(c.view, c.queries, &much);
    EXPECT_GE(Recall(c, much, 100), 0.85) << BaselineName(kind);
    EXPECT_GT(Recall(c, much, 100), Recall(c, little, 100)) << BaselineName(kind);
    EXPECT_GT(much.bytes, little.bytes) << BaselineName(kind);
  }
}

TEST(BaselinesTest, ARangeWithinTheRunGetsItsOwnCandidates) {
  Case c(3000);
  c.ranges[0] = {0, kFirst + 300};
  c.ranges[1] = {kFirst + 1000, kFirst + 9000};
  c.ranges[2] = {0, 50};  // before the run
  for (BaselineKind kind : kKinds) {
    const auto index = Build(kind, c, {.nlist = 20});
    ASSERT_NE(index, nullptr);
    index->set_search({.candidates = 100, .nprobe = 20, .ef_search = 1500});
    CoarseScores lists;
    index->Score(c.view, c.queries, &lists);
    EXPECT_TRUE(Found(lists, 2).empty());
    EXPECT_GE(Found(lists, 0).size(), 30u) << BaselineName(kind);
    for (uint32_t i : {0u, 1u}) {
      for (uint32_t token : Found(lists, i)) {
        EXPECT_GE(token, c.ranges[i].lo);
        EXPECT_LT(token, c.ranges[i].hi);
      }
    }
  }
}

TEST(BaselinesTest, EqualSeedsGiveEqualIndexes) {
  const Case c(2000);
  for (BaselineKind kind : kKinds) {
    const auto one = Build(kind, c, {.seed = 7}), two = Build(kind, c, {.seed = 7});
    ASSERT_NE(one, nullptr);
    ASSERT_NE(two, nullptr);
    CoarseScores a, b;
    one->Score(c.view, c.queries, &a);
    two->Score(c.view, c.queries, &b);
    EXPECT_EQ(a.score, b.score) << BaselineName(kind);
    EXPECT_EQ(a.node, b.node) << BaselineName(kind);
    EXPECT_EQ(a.bytes, b.bytes) << BaselineName(kind);
    EXPECT_EQ(one->memory_bytes(), two->memory_bytes());
  }
}

TEST(BaselinesTest, MemoryHoldsAtLeastTheCopyOfTheKeys) {
  const Case c(2000);
  const uint64_t copy = 2000 * kHeadDim * sizeof(float);
  EXPECT_EQ(Build(BaselineKind::kFaissFlat, c)->memory_bytes(), copy);
  EXPECT_EQ(Build(BaselineKind::kFaissIvfFlat, c, {.nlist = 10})->memory_bytes(),
            copy + 10 * kHeadDim * sizeof(float) + 2000 * sizeof(int64_t));
  if (kWithHnsw) {
    EXPECT_GT(Build(BaselineKind::kHnsw, c)->memory_bytes(), copy + 2000 * 64 * sizeof(uint32_t));
  }
  EXPECT_LT(Build(BaselineKind::kFaissIvfPq, c, {.nlist = 10})->memory_bytes(), copy / 4);
}

TEST(BaselinesTest, SearchesOfManyThreadsAgree) {
  const Case c(2000);
  for (BaselineKind kind : kKinds) {
    const auto index = Build(kind, c);
    ASSERT_NE(index, nullptr);
    testing::ExpectThreadsAgree(*index, c.view, c.queries);
  }
}

TEST(BaselinesTest, WhatCannotBeIndexedIsRefused) {
  const Case c(100), tiny(5);
  const KvView none;
  for (BaselineKind kind : kKinds) {
    EXPECT_EQ(BuildBaseline(kind, none, {}).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(BuildBaseline(BaselineKind::kFaissIvfPq, c.view, {.pq_m = 7}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(BuildBaseline(BaselineKind::kFaissIvfPq, tiny.view, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(BuildBaseline(BaselineKind::kHnsw, c.view, {.hnsw_m = 1}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(BuildBaseline(BaselineKind::kHnsw, tiny.view, {}).ok());
}

TEST(BaselinesTest, InnerProductsOfEveryLevelEqualDouble) {
  std::mt19937 random(Seed());
  std::normal_distribution<float> normal;
  for (size_t n : {16u, 32u, 48u, 96u, 128u, 256u}) {
    std::vector<float> a(n), b(n);
    double want = 0;
    for (size_t i = 0; i < n; ++i) want += double{a[i] = normal(random)} * (b[i] = normal(random));
    EXPECT_NEAR(baselines::InnerProductScalar(a.data(), b.data(), n), want, 1e-4);
    for (SimdLevel level : SupportedSimdLevels()) {
      if (level == SimdLevel::kAvx2) {
        EXPECT_NEAR(baselines::InnerProductAvx2(a.data(), b.data(), n), want, 1e-4);
      } else if (level == SimdLevel::kAvx512) {
        EXPECT_NEAR(baselines::InnerProductAvx512(a.data(), b.data(), n), want, 1e-4);
      }
    }
  }
}

}  // namespace
}  // namespace quarry

#include "cpu_index/graph_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "cpu_index/baselines/baselines.h"
#include "cpu_index/budget.h"
#include "cpu_index/graph_reach.h"
#include "cpu_index/graph_search.h"
#include "cpu_index/index_form.h"
#include "proto/byte_digest.h"
#include "tests/cpu_index/graph_case.h"
#include "tests/cpu_index/score_threads.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::GraphCase;

#ifdef __SANITIZE_THREAD__  // see baselines_test.cc
constexpr bool kWithHnsw = false;
#else
constexpr bool kWithHnsw = true;
#endif

// From `positions` sampled positions' queries.
std::unique_ptr<GraphIndex> Build(GraphCase* c, uint32_t positions,
                                  const GraphOptions& options = {}) {
  std::vector<float> queries;
  c->MakeQueries(positions, &queries);
  absl::StatusOr<std::unique_ptr<GraphIndex>> index =
      GraphIndex::Build(c->view, queries, options);
  if (!index.ok()) {
    ADD_FAILURE() << index.status();
    return nullptr;
  }
  return std::move(*index);
}

TEST(GraphIndexTest, FindsWithQueriesOfAnotherDistributionWhatAGraphOfKeysMisses) {
  GraphCase c(16384, Seed());
  const auto index = Build(&c, 1024);
  ASSERT_NE(index, nullptr);
  if (!kWithHnsw) return;
  const auto hnsw = BuildBaseline(BaselineKind::kHnsw, c.view, {.hnsw_m = 16});
  ASSERT_TRUE(hnsw.ok()) << hnsw.status();
  (*hnsw)->set_search({.candidates = 100, .ef_search = 100});
  double mine = 0, its = 0, share = 0, its_share = 0;
  constexpr int kRounds = 8;
  constexpr double kAll = 16384.0 * GraphCase::kHeadDim * sizeof(uint16_t);
  for (int round = 0; round < kRounds; ++round) {
    c.SetQueries();
    CoarseScores lists, found;
    (*hnsw)->Score(c.view, c.queries, &lists);
    its += c.Recall(lists, 100) / kRounds;
    const uint64_t bytes = lists.bytes / 2;  // its keys are fp32
    its_share += static_cast<double>(bytes) / kAll / kRounds;
    for (uint32_t queue = 16; queue < 1024; queue = queue * 9 / 8) {
      index->set_queue(queue);
      index->Score(c.view, c.queries, &found);
      if (found.bytes > bytes) break;
      lists = found;
    }
    mine += c.Recall(lists, 100) / kRounds;
    share += static_cast<double>(lists.bytes) / kAll / kRounds;
  }
  std::printf("recall@100: graph %.3f at %.1f%% of the keys' bytes, hnsw %.3f at %.1f%%\n", mine,
              100 * share, its, 100 * its_share);
  EXPECT_GT(mine, its);
  EXPECT_GE(mine, 0.9);
}

TEST(GraphIndexTest, MoreEffortFindsMoreAndReadsMore) {
  GraphCase c(8192, Seed());
  const auto index = Build(&c, 512);
  ASSERT_NE(index, nullptr);
  double little = 0, much = 0;
  for (int round = 0; round < 4; ++round) {
    c.SetQueries();
    CoarseScores lists;
    index->set_queue(16);
    index->Score(c.view, c.queries, &lists);
    little += c.Recall(lists, 100);
    const uint64_t bytes = lists.bytes;
    index->set_queue(400);
    index->Score(c.view, c.queries, &lists);
    much += c.Recall(lists, 100);
    EXPECT_GT(lists.bytes, bytes);
  }
  EXPECT_GT(much, little);
  EXPECT_GE(much / 4, 0.97);
}

TEST(GraphIndexTest, ScoresAreExactForEveryQueryOfEveryKeyThatWasRead) {
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    GraphCase c(3000, Seed(), dtype);
    const auto index = Build(&c, 100);
    ASSERT_NE(index, nullptr);
    EXPECT_EQ(index->kind(), "graph");
    index->set_queue(64);
    CoarseScores lists;
    index->Score(c.view, c.queries, &lists);
    EXPECT_EQ(lists.tokens, c.view.tokens());
    for (uint32_t i = 0; i < 4; ++i) {
      EXPECT_EQ(lists.Row(i).size(), lists.Row(0).size());
      for (size_t j = 0; j < lists.Row(i).size(); ++j) {
        ASSERT_NEAR(lists.Row(i)[j], c.Score(i, lists.tokens.lo + lists.NodeOf(i, j)), 2e-3);
        if (j > 0) {
          ASSERT_LT(lists.NodeOf(i, j - 1), lists.NodeOf(i, j));
        }
      }
    }
    // Each key once however many queries it is scored for, and at least a line of some keys' links.
    const uint64_t keys = lists.Row(0).size() * GraphCase::kHeadDim * DTypeBytes(dtype);
    EXPECT_GT(lists.bytes, keys + 64 * 64);
    EXPECT_LE(lists.bytes, keys + lists.Row(0).size() * 128);
  }
}

TEST(GraphIndexTest, EveryKeyCanBeReached) {
  for (uint32_t tokens : {1u, 2u, 17u, 300u, 5000u}) {
    for (uint32_t positions : {0u, 1u, 200u}) {  // 0: a graph of the keys alone
      for (uint32_t links : {4u, 31u}) {
        GraphCase c(tokens, Seed());
        const auto index = Build(&c, positions, {.links = links, .entries = 3});
        ASSERT_NE(index, nullptr);
        EXPECT_EQ(Reached(index->links()), std::vector<bool>(tokens, true));
      }
    }
  }
}

TEST(GraphIndexTest, KeysThatAreAllEqualCanBeReached) {
  std::vector<float> keys(3000 * 16, 1.0f), queries(64 * 16, 1.0f);
  const KvSegment segment{keys.data(), keys.data(), {0, 3000}};
  const KvView view{std::span(&segment, 1), 16, DType::kFp32};
  const auto index = GraphIndex::Build(view, queries, {});
  ASSERT_TRUE(index.ok()) << index.status();
  EXPECT_EQ(Reached((*index)->links()), std::vector<bool>(3000, true));
}

TEST(GraphIndexTest, AnyNumberOfThreadsBuildsTheSameBytes) {
  GraphCase c(5000, Seed());
  std::vector<float> queries;
  c.MakeQueries(300, &queries);
  const auto one = GraphIndex::Build(c.view, queries, {.threads = 1});
  const auto four = GraphIndex::Build(c.view, queries, {.threads = 4});
  ASSERT_TRUE(one.ok() && four.ok());
  EXPECT_EQ((*one)->Serialize(), (*four)->Serialize());
}

TEST(GraphIndexTest, AQueryGetsTokensOfItsRangeAlone) {
  GraphCase c(8192, Seed());
  const auto index = Build(&c, 512);
  ASSERT_NE(index, nullptr);
  const uint32_t first = GraphCase::kFirst;
  c.ranges[0] = {0, first + 200};
  c.ranges[1] = {first + 1000, first + 7000};
  c.ranges[2] = {0, 50};            // before the run
  c.ranges[3] = {first + 9000, first + 9100};  // after it
  index->set_queue(256);
  CoarseScores lists;
  index->Score(c.view, c.queries, &lists);
  for (uint32_t i = 0; i < 4; ++i) {
    for (size_t j = 0; j < lists.Row(i).size(); ++j) {
      const uint32_t token = lists.tokens.lo + lists.NodeOf(i, j);
      ASSERT_GE(token, c.ranges[i].lo);
      ASSERT_LT(token, c.ranges[i].hi);
    }
  }
  EXPECT_EQ(lists.Row(0).size(), 200u);  // short: read
  EXPECT_TRUE(lists.Row(2).empty());
  EXPECT_TRUE(lists.Row(3).empty());
  c.ranges[0] = c.ranges[2] = c.ranges[3] = c.ranges[1];
  index->Score(c.view, c.queries, &lists);
  EXPECT_GE(c.Recall(lists, 50), 0.9);
}

TEST(GraphIndexTest, ARunOfAFewQueuesIsRead) {
  GraphCase c(500, Seed());
  const auto index = Build(&c, 20);
  ASSERT_NE(index, nullptr);
  index->set_queue(125);
  CoarseScores lists;
  index->Score(c.view, c.queries, &lists);
  EXPECT_EQ(lists.Row(3).size(), 500u);
  EXPECT_EQ(lists.bytes, 500 * GraphCase::kHeadDim * sizeof(uint16_t));
}

TEST(GraphIndexTest, WhatIsRefinedIsAttendedExactly) {
  GraphCase c(400, Seed());
  const auto index = Build(&c, 20);
  ASSERT_NE(index, nullptr);
  index->set_queue(400);  // finds all
  CoarseScores lists;
  index->Score(c.view, c.queries, &lists);
  const RunAllotment all{std::vector<float>(4, -1e30f), std::vector<uint32_t>(4, 0), {}, {}};
  std::vector<float> sums(2 * 4 * GraphCase::kHeadDim);
  std::vector<Partial> some(4), exact(4);
  for (uint32_t i = 0; i < 4; ++i) {
    some[i].acc = std::span(sums).subspan(i * GraphCase::kHeadDim, GraphCase::kHeadDim);
    exact[i].acc = std::span(sums).subspan((4 + i) * GraphCase::kHeadDim, GraphCase::kHeadDim);
  }
  index->Refine(c.view, c.queries, lists, all, some);
  index->AttendAll(c.view, c.queries, exact);
  for (uint32_t i = 0; i < 4; ++i) {
    EXPECT_EQ(some[i].tokens, 400u);
    EXPECT_NEAR(some[i].max + std::log(some[i].sum), exact[i].max + std::log(exact[i].sum), 1e-3);
    for (uint32_t d = 0; d < GraphCase::kHeadDim; ++d) {
      EXPECT_NEAR(some[i].acc[d] / some[i].sum, exact[i].acc[d] / exact[i].sum, 1e-2);
    }
  }
}

TEST(GraphIndexTest, WhatWasSerialisedAnswersLikeTheOriginal) {
  GraphCase c(3000, Seed());
  const auto index = Build(&c, 100);
  ASSERT_NE(index, nullptr);
  const std::vector<std::byte> bytes = index->Serialize();
  const auto again = GraphIndex::Deserialize(bytes);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ((*again)->Serialize(), bytes);
  EXPECT_EQ((*again)->memory_bytes(), index->memory_bytes());
  CoarseScores a, b;
  index->Score(c.view, c.queries, &a);
  (*again)->Score(c.view, c.queries, &b);
  EXPECT_EQ(a.node, b.node);
  EXPECT_EQ(a.score, b.score);
  EXPECT_EQ(a.bytes, b.bytes);
}

// Gives altered bytes the checksum that they should have: what is then wrong must be seen too.
void Reseal(std::vector<std::byte>* bytes) {
  const size_t sealed = bytes->size() - kIndexFormDigestBytes;
  const uint64_t size = sealed - kIndexFormHeaderBytes;
  std::memcpy(bytes->data() + 32, &size, sizeof(size));
  const ByteDigest digest = DigestOf(std::span(*bytes).first(sealed));
  std::memcpy(bytes->data() + sealed, &digest, sizeof(digest));
}

TEST(GraphIndexTest, CorruptionIsFoundAndNeverHarms) {
  std::mt19937 random(Seed());
  GraphCase c(700, Seed());
  const auto index = Build(&c, 30, {.links = 8});
  ASSERT_NE(index, nullptr);
  const std::vector<std::byte> bytes = index->Serialize();
  for (int round = 0; round < 3000; ++round) {
    std::vector<std::byte> altered = bytes;
    if (random() % 4 == 0) altered.resize(random() % bytes.size());
    if (random() % 8 == 0) altered.resize(altered.size() + random() % 64);
    const uint32_t changes = altered.empty() ? 0 : 1 + random() % 4;
    for (uint32_t i = 0; i < changes; ++i) {
      // Half of them where sizes are.
      const size_t at = random() % (random() % 2 == 0 ? altered.size()
                                                      : std::min<size_t>(altered.size(), 80));
      altered[at] = static_cast<std::byte>(random());
    }
    const bool same = altered == bytes;
    EXPECT_EQ(GraphIndex::Deserialize(altered).ok(), same);
    if (altered.size() < kIndexFormHeaderBytes + kIndexFormDigestBytes) continue;
    Reseal(&altered);
    const auto loaded = GraphIndex::Deserialize(altered);
    if (!loaded.ok()) continue;
    // A graph, if perhaps another one: every link leads to a key.
    CoarseScores lists;
    const GraphLinks& links = (*loaded)->links();
    if (links.keys() == 700) SearchGraph(links, c.view, c.queries, 32, &lists);
  }
}

// A mebi of keys without links, each with room for 255: a gibibyte, if it were made.
TEST(GraphIndexTest, RoomForLinksThatNoKeyHasIsRefused) {
  constexpr uint32_t kKeys = 1 << 20;
  IndexWriter writer("graph", 2);
  for (const uint32_t size : {0u, kKeys, 64u, 255u, 1u, 0u}) writer.Put(size);
  writer.PutAll(std::span<const uint32_t>(std::vector<uint32_t>(1 + kKeys)));
  const absl::Status status = GraphIndex::Deserialize(std::move(writer).Finish()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_NE(status.message().find("at most 0 links, not 255"), std::string::npos) << status;
}

TEST(GraphIndexTest, SearchesOfManyThreadsAgree) {
  GraphCase c(3000, Seed());
  const auto index = Build(&c, 100);
  ASSERT_NE(index, nullptr);
  testing::ExpectThreadsAgree(*index, c.view, c.queries);
}

TEST(GraphIndexTest, WhatCannotBeIndexedIsRefused) {
  GraphCase c(100, 1);
  const auto code = [&](const KvView& run, std::span<const float> queries,
                        const GraphOptions& options) {
    return GraphIndex::Build(run, queries, options).status().code();
  };
  constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code({{}, 64, DType::kBf16}, {}, {}), kInvalid);
  EXPECT_EQ(code(c.view, std::vector<float>(63), {}), kInvalid);
  EXPECT_EQ(code(c.view, {}, {.query_keys = 0}), kInvalid);
  EXPECT_EQ(code(c.view, {}, {.links = 3}), kInvalid);
  EXPECT_EQ(code(c.view, {}, {.links = 256}), kInvalid);
  EXPECT_EQ(code(c.view, {}, {.entries = 0}), kInvalid);
  EXPECT_EQ(code(c.view, {}, {}), absl::StatusCode::kOk);
}

}  // namespace
}  // namespace quarry

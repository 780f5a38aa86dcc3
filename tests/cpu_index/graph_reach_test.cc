#include "cpu_index/graph_reach.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "tests/support/seed.h"

namespace quarry {
namespace {

void Link(uint32_t from, uint32_t to, GraphLinks* graph) {
  uint32_t* const row = graph->Row(from);
  row[1 + row[0]++] = to;
}

TEST(GraphReachTest, ReachedIsWhatLinksLeadToFromTheEntries) {
  GraphLinks graph(6, 3);
  graph.entries = {1};
  Link(1, 2, &graph);
  Link(2, 4, &graph);
  Link(4, 1, &graph);
  Link(5, 1, &graph);
  EXPECT_EQ(Reached(graph), (std::vector<bool>{false, true, true, false, true, false}));
}

TEST(GraphReachTest, AKeyIsLinkedFromOneThatItLinksTo) {
  GraphLinks graph(5, 4);
  graph.entries = {0};
  Link(0, 1, &graph);
  Link(1, 2, &graph);
  Link(4, 2, &graph);  // nothing leads to 3 and 4
  ReachAll(&graph);
  EXPECT_EQ(graph.Of(2).size(), 1u);
  EXPECT_EQ(graph.Of(2)[0], 4u);
  EXPECT_EQ(Reached(graph), std::vector<bool>(5, true));
}

// Graphs as full as they may be: every key has one place left.
TEST(GraphReachTest, EveryKeyOfAnyGraphIsReachedAndNoLinkIsLost) {
  std::mt19937 random(Seed());
  for (int round = 0; round < 200; ++round) {
    const auto keys = static_cast<uint32_t>(1 + random() % 300);
    const uint32_t links = 2 + random() % 3;
    const uint32_t near = 1 + random() % keys;  // links stay within so many keys: islands
    GraphLinks graph(keys, links);
    graph.entries = {static_cast<uint32_t>(random() % keys)};
    for (uint32_t key = 0; key < keys; ++key) {
      for (uint32_t j = 0; j + 1 < links; ++j) {
        const auto other = static_cast<uint32_t>(key / near * near + random() % near);
        if (random() % 8 != 0) Link(key, std::min(keys - 1, other), &graph);
      }
    }
    const GraphLinks before = graph;
    ReachAll(&graph);
    ASSERT_EQ(Reached(graph), std::vector<bool>(keys, true));
    for (uint32_t key = 0; key < keys; ++key) {
      ASSERT_LE(graph.Of(key).size(), links);
      ASSERT_TRUE(std::equal(before.Of(key).begin(), before.Of(key).end(), graph.Of(key).begin()));
    }
  }
}

}  // namespace
}  // namespace quarry

// An index that many threads score at once.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <thread>
#include <vector>

#include "cpu_index/key_index.h"

namespace quarry::testing {

// Expects the same from each of four threads that score the run again and again, all at once, as
// from this one alone.
inline void ExpectThreadsAgree(const TokenIndex& index, const KvView& run,
                               const QueryBlock& queries) {
  CoarseScores wanted;
  index.Score(run, queries, &wanted);
  ASSERT_FALSE(wanted.node.empty());
  std::array<CoarseScores, 4> lists;
  std::vector<std::thread> threads;
  for (CoarseScores& mine : lists) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10; ++i) index.Score(run, queries, &mine);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const CoarseScores& mine : lists) {
    EXPECT_EQ(mine.node, wanted.node);
    EXPECT_EQ(mine.score, wanted.score);
  }
}

}  // namespace quarry::testing

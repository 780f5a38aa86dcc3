#include "cpu_index/run_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "cpu_index/token_set.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

TEST(RunRowsTest, FindsEveryTokenInAnyOrderHoweverTheRunIsCut) {
  constexpr uint32_t kTokens = 1000, kFirst = 300;
  std::mt19937 random(Seed());
  std::vector<float> keys(kTokens * 2), values(kTokens * 2);
  std::iota(keys.begin(), keys.end(), 1.0f);
  std::iota(values.begin(), values.end(), 5000.0f);
  std::vector<uint32_t> order(kTokens);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (const uint32_t most : {1u, 7u, 64u, 300u, kTokens}) {
    std::vector<KvSegment> segments;
    for (uint32_t lo = 0; lo < kTokens;) {
      const uint32_t hi = std::min<uint32_t>(kTokens, lo + 1 + random() % most);
      segments.push_back({&keys[lo * 2], &values[lo * 2], {kFirst + lo, kFirst + hi}});
      lo = hi;
    }
    const KvView run{segments, 2, DType::kFp32};
    const RunRows k(run, KvPart::kKey), v(run, KvPart::kValue);
    EXPECT_EQ(k.row_bytes(), 8u);
    for (const uint32_t token : order) {
      float row[2];
      k.Widen(token, row);
      ASSERT_EQ(row[1], keys[token * 2 + 1]) << token << ", segments of up to " << most;
      v.Widen(token, row);
      ASSERT_EQ(row[0], values[token * 2]) << token << ", segments of up to " << most;
      const TokenRange tokens = k.SegmentOf(token).tokens;
      ASSERT_TRUE(tokens.lo <= kFirst + token && kFirst + token < tokens.hi);
    }
  }
}

TEST(TokenSetTest, HasWhatWasAdded) {
  TokenSet set(130);
  for (const uint32_t token : {0u, 63u, 64u, 129u}) {
    EXPECT_FALSE(set.Contains(token));
    EXPECT_TRUE(set.Add(token));
    EXPECT_FALSE(set.Add(token));
    EXPECT_TRUE(set.Contains(token));
  }
  EXPECT_FALSE(set.Contains(1));
  EXPECT_EQ(set.size(), 4u);
  EXPECT_EQ(set.words().size(), 3u);
}

}  // namespace
}  // namespace quarry

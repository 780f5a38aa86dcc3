#include "gpu/sparse/sparse_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

#include "tests/support/seed.h"

namespace quarry {
namespace {

std::vector<uint32_t> RandomRising(std::mt19937_64* random, uint32_t most, uint32_t below) {
  std::set<uint32_t> out;
  const auto n = static_cast<uint32_t>((*random)() % (most + 1));
  // Some close together, some anywhere.
  while (out.size() < std::min(n, below / 2)) {
    const auto at = static_cast<uint32_t>((*random)() % below);
    for (uint32_t i = 0; i < 1 + (*random)() % 5 && at + i < below; ++i) out.insert(at + i);
  }
  return {out.begin(), out.end()};
}

TEST(SparseIndexTest, RangesHoldTheirSlashesAndNoMoreThanTheirTiles) {
  std::mt19937_64 random(Seed());
  for (int round = 0; round < 200; ++round) {
    const std::vector<uint32_t> slashes =
        RandomRising(&random, 60, 1 + static_cast<uint32_t>(random() % 5000));
    const std::vector<RelativeRange> ranges = RangesOfSlashes(slashes);
    ASSERT_FALSE(ranges.empty());
    EXPECT_EQ(ranges.back().hi, 128);
    std::set<int64_t> wanted;  // keys relative to i0
    for (uint32_t i = 0; i < 128; ++i) wanted.insert(i);
    for (const uint32_t s : slashes) {
      for (uint32_t i = 0; i < 128; ++i) wanted.insert(int64_t{i} - s);
    }
    size_t keys = 0, runs = 0;
    for (size_t r = 0; r < ranges.size(); ++r) {
      EXPECT_LT(ranges[r].lo, ranges[r].hi);
      EXPECT_EQ((ranges[r].hi - ranges[r].lo) % 64, 0);
      if (r > 0) {
        EXPECT_GT(ranges[r].lo, ranges[r - 1].hi);
      }
      keys += static_cast<size_t>(ranges[r].hi - ranges[r].lo);
      // A range's first tile and its last key are wanted by some slash.
      EXPECT_TRUE(wanted.contains(ranges[r].hi - 1));
      bool begun = false;
      for (int64_t j = ranges[r].lo; j < ranges[r].lo + 64; ++j) begun |= wanted.contains(j);
      EXPECT_TRUE(begun);
    }
    for (const int64_t j : wanted) {
      const bool in = std::any_of(ranges.begin(), ranges.end(),
                                  [j](const RelativeRange& r) { return j >= r.lo && j < r.hi; });
      ASSERT_TRUE(in) << j;
      runs += !wanted.contains(j - 1);
    }
    // Merging costs nothing: each run by itself would take as many tiles.
    size_t apart = 0, length = 0;
    for (const int64_t j : wanted) {
      ++length;
      if (!wanted.contains(j + 1)) {
        apart += (length + 63) / 64;
        length = 0;
      }
    }
    EXPECT_LE(keys / 64, apart);
    EXPECT_LE(ranges.size(), runs);
  }
}

TEST(SparseIndexTest, CountsOfAllRowTilesAreThoseOfEach) {
  std::mt19937_64 random(Seed());
  for (int round = 0; round < 300; ++round) {
    const auto first = static_cast<uint32_t>(random() % 3 == 0 ? 0 : random() % 3000);
    const TokenRange rows{first, first + 1 + static_cast<uint32_t>(random() % 4000)};
    const std::vector<RelativeRange> ranges = RangesOfSlashes(RandomRising(&random, 40, rows.hi));
    const std::vector<uint32_t> columns = RandomRising(&random, 300, rows.hi);
    const RowTileCounts counts = CountRowTiles(ranges, columns, rows);
    const uint32_t tiles = (rows.size() + 127) / 128;
    ASSERT_EQ(counts.range_tiles.size(), tiles);
    ASSERT_EQ(counts.columns_seen.size(), tiles);
    for (uint32_t t = 0; t < tiles; ++t) {
      const int64_t i0 = int64_t{first} + 128 * int64_t{t};
      const int64_t i1 = std::min<int64_t>(i0 + 128, rows.hi);
      uint32_t want = 0;
      for (const RelativeRange& r : ranges) {
        const int64_t lo = std::max<int64_t>(0, i0 + r.lo), hi = std::min(i1, i0 + r.hi);
        for (int64_t at = lo; at < hi; at += 64) ++want;
      }
      ASSERT_EQ(counts.range_tiles[t], want) << t;
      // Columns that are not seen lie in the last range, or behind the row tile.
      for (uint32_t c = 0; c < columns.size(); ++c) {
        const bool seen = c < counts.columns_seen[t];
        ASSERT_EQ(seen, columns[c] < i0 + ranges.back().lo) << t << " " << c;
      }
    }
  }
}

TEST(SparseIndexTest, ColumnsOutsideRangesCountOnce) {
  std::mt19937_64 random(Seed());
  std::vector<TokenRange> parts{{7, 9}};
  for (int round = 0; round < 300; ++round) {
    const auto below = 2 + static_cast<uint32_t>(random() % 2000);
    const std::vector<uint32_t> columns = RandomRising(&random, 200, below);
    const std::vector<uint32_t> ends = RandomRising(&random, 12, below);
    std::vector<TokenRange> ranges;
    for (size_t i = 0; i + 1 < ends.size(); i += 2) ranges.push_back({ends[i], ends[i + 1]});
    const auto seen = static_cast<uint32_t>(random() % (columns.size() + 1));
    ColumnsOutside(columns, seen, ranges, &parts);
    std::vector<uint32_t> got, want;
    for (const TokenRange& part : parts) {
      EXPECT_FALSE(part.empty());
      for (uint32_t c = part.lo; c < part.hi; ++c) got.push_back(c);
    }
    for (uint32_t c = 0; c < seen; ++c) {
      const bool inside = std::any_of(ranges.begin(), ranges.end(), [&](TokenRange r) {
        return columns[c] >= r.lo && columns[c] < r.hi;
      });
      if (!inside) want.push_back(c);
    }
    ASSERT_EQ(got, want);
  }
}

}  // namespace
}  // namespace quarry

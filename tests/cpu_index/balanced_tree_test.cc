#include "cpu_index/balanced_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kWidth = 48;

// Points around `centres` of them.
std::vector<float> Points(uint32_t n, uint32_t centres, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<float> middle(centres * kWidth), out;
  for (float& x : middle) x = 5 * normal(*random);
  for (uint32_t i = 0; i < n; ++i) {
    const uint32_t c = (*random)() % centres;
    for (uint32_t d = 0; d < kWidth; ++d) out.push_back(middle[c * kWidth + d] + normal(*random));
  }
  return out;
}

// Mean square distance of rows from the mean of their `group` neighbours.
double Within(const std::vector<float>& rows, uint32_t group) {
  const size_t n = rows.size() / kWidth;
  double sum = 0;
  for (size_t lo = 0; lo < n; lo += group) {
    const size_t hi = std::min(n, lo + group);
    for (uint32_t d = 0; d < kWidth; ++d) {
      double mean = 0;
      for (size_t i = lo; i < hi; ++i) mean += rows[i * kWidth + d] / static_cast<double>(hi - lo);
      for (size_t i = lo; i < hi; ++i)
        sum += (rows[i * kWidth + d] - mean) * (rows[i * kWidth + d] - mean);
    }
  }
  return sum / static_cast<double>(n);
}

TEST(BalancedTreeTest, TheOrderIsAPermutationAndRowsMoveWithIt) {
  std::mt19937 random(Seed());
  for (const uint32_t n : {0u, 1u, 15u, 16u, 17u, 255u, 256u, 257u, 1000u, 4111u}) {
    const std::vector<float> before = Points(n, 10, &random);
    std::vector<float> rows = before;
    const std::vector<uint32_t> order = BisectRows(rows, kWidth);
    ASSERT_EQ(order.size(), n);
    std::vector<uint32_t> sorted = order;
    std::sort(sorted.begin(), sorted.end());
    for (uint32_t i = 0; i < n; ++i) {
      ASSERT_EQ(sorted[i], i);
      ASSERT_TRUE(std::equal(rows.begin() + i * kWidth, rows.begin() + (i + 1) * kWidth,
                             before.begin() + order[i] * kWidth))
          << i;
    }
  }
}

TEST(BalancedTreeTest, NeighboursAreCloseAtBothSizes) {
  std::mt19937 random(SteadySeed());
  std::vector<float> rows = Points(4096, 64, &random);
  const double apart = Within(rows, kSuperRows);
  BisectRows(rows, kWidth);
  // Of 64 clusters of variance kWidth each, 25 times as far apart, 16 neighbours are mostly of one.
  EXPECT_LT(Within(rows, kLeafRows), 3.0 * kWidth);
  EXPECT_LT(Within(rows, kSuperRows), 0.8 * apart);
}

TEST(BalancedTreeTest, EqualRowsAreCutByTheirOrderAndTheResultRepeats) {
  std::mt19937 random(Seed());
  std::vector<float> same(1000 * kWidth, 2.5f);
  const std::vector<uint32_t> order = BisectRows(same, kWidth);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
  const std::vector<float> points = Points(3000, 7, &random);
  std::vector<float> a = points, b = points;
  EXPECT_EQ(BisectRows(a, kWidth), BisectRows(b, kWidth));
}

}  // namespace
}  // namespace quarry

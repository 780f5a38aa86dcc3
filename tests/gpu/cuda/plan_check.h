// Plans of a card's kernels against the host's. Sums are rounded differently: what is chosen last
// may be something else, or a tile of columns more or less where a mass is asked for.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "gpu/sparse/build_index.h"
#include "gpu/sparse/head_cost.h"

namespace quarry::testing {

// How many of either the other lacks, at most; both rising.
inline size_t Different(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  std::vector<uint32_t> both;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return std::max(a.size(), b.size()) - both.size();
}

inline void ExpectPlan(const HeadPlan& got, const HeadPlan& want, const Pattern& pattern,
                       TokenRange prefill) {
  SCOPED_TRACE(::testing::Message() << "pattern of kind " << pattern.index());
  ASSERT_EQ(got.kind, want.kind);
  EXPECT_EQ(got.pattern, want.pattern);
  if (want.kind != HeadKind::kRanges) return;
  // As they have to be, whatever was chosen.
  ASSERT_FALSE(got.ranges.empty());
  EXPECT_EQ(got.ranges.back().hi, static_cast<int32_t>(kRowTile));
  for (size_t i = 0; i < got.ranges.size(); ++i) {
    EXPECT_LT(got.ranges[i].lo, got.ranges[i].hi);
    if (i > 0) {
      EXPECT_GT(got.ranges[i].lo, got.ranges[i - 1].hi);
    }
  }
  for (size_t i = 0; i < got.columns.size(); ++i) {
    EXPECT_LT(got.columns[i], i + 1 < got.columns.size() ? got.columns[i + 1] : prefill.hi);
  }

  const auto cost_of = [&](const HeadPlan& plan) {
    return static_cast<double>(
        CostOf(plan.ranges, plan.columns, prefill, DenseFallback::kWhereCheaper).tiles);
  };
  if (const auto* p = std::get_if<VerticalSlashMassPattern>(&pattern)) {
    EXPECT_GE(got.captured, p->mass - 1e-4);
    const double row_tiles = (prefill.size() + kRowTile - 1) / kRowTile;
    EXPECT_NEAR(cost_of(got), cost_of(want), row_tiles + 0.01 * cost_of(want));
    return;
  }
  EXPECT_NEAR(got.captured, want.captured, 1e-3);
  EXPECT_EQ(got.columns.size(), want.columns.size());
  EXPECT_LE(Different(got.columns, want.columns), 1 + want.columns.size() / 1000);
  EXPECT_NEAR(cost_of(got), cost_of(want), 0.005 * cost_of(want));
}

}  // namespace quarry::testing

#include "daemon/latency_percentiles.h"

#include <gtest/gtest.h>

namespace quarry {
namespace {

using std::chrono::nanoseconds;

TEST(LatencyPercentilesTest, PercentilesAreAtMostAnEighthAboveTheTruth) {
  LatencyPercentiles p;
  EXPECT_EQ(p.PercentileNs(0.5), 0u);
  for (uint64_t i = 1; i <= 100000; ++i) p.Add(nanoseconds(i * 10));
  EXPECT_EQ(p.Count(), 100000u);
  EXPECT_EQ(p.MaxNs(), 1000000u);
  for (const double share : {0.001, 0.01, 0.5, 0.9, 0.99, 0.999}) {
    const double truth = share * 1e6;
    EXPECT_GE(static_cast<double>(p.PercentileNs(share)), truth - 10) << share;
    EXPECT_LE(static_cast<double>(p.PercentileNs(share)), truth * 1.125 + 10) << share;
  }
  EXPECT_EQ(p.PercentileNs(1.0), 1000000u);
}

TEST(LatencyPercentilesTest, TheSmallestAndTheLargestDurationsHaveBuckets) {
  LatencyPercentiles p;
  p.Add(nanoseconds(0));
  p.Add(nanoseconds(-5));
  EXPECT_EQ(p.PercentileNs(1.0), 0u);
  p.Add(nanoseconds::max());
  EXPECT_EQ(p.PercentileNs(1.0), static_cast<uint64_t>(nanoseconds::max().count()));
}

}  // namespace
}  // namespace quarry

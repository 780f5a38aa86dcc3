#include "cpu_index/key_metric.h"

#include <gtest/gtest.h>

#include <numeric>

#include "tests/cpu_index/graph_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::GraphCase;

// Keys at chosen points of a plane.
KeyMetric Plane(const std::vector<std::pair<float, float>>& points) {
  std::vector<float> keys(points.size() * 16);
  for (size_t i = 0; i < points.size(); ++i) {
    keys[i * 16] = points[i].first;
    keys[i * 16 + 1] = points[i].second;
  }
  const KvSegment segment{keys.data(), keys.data(), {0, static_cast<uint32_t>(points.size())}};
  return *KeyMetric::Fit({std::span(&segment, 1), 16, DType::kFp32}, {});
}

TEST(KeyMetricTest, DistancesAreThoseOfScoresForATypicalQuery) {
  GraphCase c(1000, Seed());
  std::vector<float> queries;
  c.MakeQueries(5000, &queries);  // with fewer, directions that they hardly see count for more
  const absl::StatusOr<KeyMetric> metric = KeyMetric::Fit(c.view, queries);
  ASSERT_TRUE(metric.ok()) << metric.status();
  KeyDistances distances(*metric);
  const std::vector<uint32_t> others = {1, 17, 400, 999};
  const std::span<const float> from = distances.From(5, others);
  for (size_t j = 0; j < others.size(); ++j) {
    double sum = 0;
    for (size_t i = 0; i < queries.size(); i += 64) {
      double difference = 0;
      for (uint32_t d = 0; d < 64; ++d) {
        const auto* const k = static_cast<const uint16_t*>(c.view.segments[0].k);
        const auto* const o =
            static_cast<const uint16_t*>(c.view.segments[others[j] / 256].k) +
            others[j] % 256 * 64;
        difference += queries[i + d] * (Bf16ToFloat(k[5 * 64 + d]) - Bf16ToFloat(o[d]));
      }
      sum += difference * difference;
    }
    const double want = sum / static_cast<double>(queries.size() / 64);
    EXPECT_NEAR(from[j], want, 0.05 * want);
  }
}

TEST(KeyMetricTest, HiddenNeighboursMakeWayForOthers) {
  // From the origin: two keys close together on the right, a farther one on the left.
  const KeyMetric metric = Plane({{0, 0}, {1, 0}, {1.2f, 0}, {-2, 0}, {0, 5}, {0.2f, 5.2f}});
  KeyDistances distances(metric);
  std::vector<uint32_t> chosen = {5, 4, 3, 2, 1, 0, 3};
  distances.Choose(0, 3, &chosen);
  EXPECT_EQ(chosen, (std::vector<uint32_t>{1, 3, 4}));
  chosen = {5, 4, 3, 2, 1};
  distances.Choose(0, 4, &chosen);  // a place left goes to the nearest of the hidden
  EXPECT_EQ(chosen, (std::vector<uint32_t>{1, 2, 3, 4}));
  chosen = {2, 0};
  distances.Choose(0, 4, &chosen);
  EXPECT_EQ(chosen, (std::vector<uint32_t>{2}));
  chosen.clear();
  distances.Choose(0, 4, &chosen);
  EXPECT_TRUE(chosen.empty());
}

TEST(KeyMetricTest, KeysThatAreNoNumbersAreFarFromAll) {
  std::vector<float> keys(40 * 16, 1.0f);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<float>(i % 7);
  const float bad[] = {NAN, INFINITY, -INFINITY};
  for (uint32_t i = 0; i < 3; ++i) keys[(10 + i) * 16] = bad[i];
  const KvSegment segment{keys.data(), keys.data(), {0, 40}};
  const absl::StatusOr<KeyMetric> metric =
      KeyMetric::Fit({std::span(&segment, 1), 16, DType::kFp32}, {});
  ASSERT_TRUE(metric.ok());
  KeyDistances distances(*metric);
  std::vector<uint32_t> all(40);
  std::iota(all.begin(), all.end(), 0);
  for (float d : distances.Among(all)) EXPECT_TRUE(std::isfinite(d) && d >= 0);
  distances.Choose(11, 5, &all);
  EXPECT_EQ(all.size(), 5u);
  EXPECT_EQ(metric->Bisect().size(), 40u);
}

}  // namespace
}  // namespace quarry

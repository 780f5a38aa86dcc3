// Where estimates of clusters are worth nothing, every key and value is read, or nothing is
// indexed.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/cpu_index/cluster_case.h"

namespace quarry {
namespace {

using testing::ClusterAnswer;
using testing::ClusterHead;
using testing::ClusterRuns;
using testing::Exactly;
using testing::Search;
using testing::Within;

constexpr uint32_t kTokens = 4096;

double Distance(std::span<const float> a, std::span<const float> b) {
  double difference = 0, length = 0;
  for (size_t c = 0; c < a.size(); ++c) {
    difference += (double{a[c]} - b[c]) * (double{a[c]} - b[c]);
    length += double{b[c]} * b[c];
  }
  return std::sqrt(difference / length);
}

class ClusterTrustTest : public ::testing::Test {
 protected:
  ClusterTrustTest() : head_(kTokens, 128, 2), runs_(head_, ClusterRuns::Even(head_, 4)) {}

  // How far answers to asked queries, `longer` times as long, are off, and what they promise.
  struct Worst {
    double error = 0, promised = 0;
    bool finite = true, exact = true;
  };
  Worst Ask(float longer, float tolerance, uint32_t parts = 1) {
    Worst worst;
    for (uint32_t first = 0; first < ClusterHead::kAsked; first += 4) {
      QueryBlock queries = head_.Queries(first, 4);
      // The second is as usual.
      std::vector<float> q(queries.q, queries.q + size_t{4} * head_.head_dim);
      for (size_t at = 0; at < q.size(); ++at) {
        q[at] *= at / head_.head_dim == 1 ? 1 : longer;
      }
      queries.q = q.data();
      queries.q_dtype = DType::kFp32;
      const std::vector<TokenRange> ranges(4, head_.all());
      const ClusterAnswer want = Exactly(runs_, queries, ranges);
      const ClusterAnswer found = Search(runs_, queries, ranges, Within(tolerance), parts);
      for (uint32_t i = 0; i < 4; ++i) {
        worst.finite &= std::isfinite(found.lse[i]);
        for (const float x : found.o[i]) worst.finite &= std::isfinite(x);
        const double error = Distance(found.o[i], want.o[i]);
        if (i == 1) {
          EXPECT_LT(error, 6 * tolerance);
          EXPECT_LT(found.tokens[i], kTokens);
          continue;
        }
        worst.error = std::max(worst.error, error);
        worst.promised = std::max(worst.promised, found.predicted[i]);
        worst.exact &= found.tokens[i] == kTokens;
      }
    }
    return worst;
  }

  ClusterHead head_;
  ClusterRuns runs_;
};

TEST_F(ClusterTrustTest, QueriesFarBeyondAllSampledOnesAreAttendedExactly) {
  runs_.Learn();
  for (const float longer : {10.0f, 1e3f, 1e6f, 1e12f, 1e30f}) {
    for (const uint32_t parts : {1u, 3u}) {
      SCOPED_TRACE(longer);
      const Worst worst = Ask(longer, 0.05f, parts);
      EXPECT_TRUE(worst.finite && worst.exact);
      EXPECT_LT(worst.error, 1e-5);
      EXPECT_EQ(worst.promised, 0);
    }
  }
  EXPECT_FALSE(Ask(1, 0.05f).exact);
}

TEST_F(ClusterTrustTest, ASampledQueryFarBeyondTheOthersTeachesNothing) {
  for (const float longer : {1e3f, 1e10f, 1e19f, 1e30f}) {
    SCOPED_TRACE(longer);
    std::vector<float> sampled = head_.sampled;
    for (uint32_t c = 0; c < head_.head_dim; ++c) sampled[c] *= longer;
    runs_.Learn(sampled);
    const Worst worst = Ask(1, 0.05f);
    EXPECT_TRUE(worst.finite);
    EXPECT_FALSE(worst.exact);
    EXPECT_LT(worst.error, 0.3);
  }
}

// What keys and values of a head are multiplied by, all of them or one token's.
struct Large {
  std::string what;
  float keys, values;
  bool all;
};

class LargeKvTest : public ::testing::TestWithParam<Large> {};

TEST_P(LargeKvTest, IsNotIndexedOrAnsweredAsExactly) {
  const Large& large = GetParam();
  ClusterHead head(kTokens, 64, 2, DType::kFp32);
  auto* const keys = reinterpret_cast<float*>(head.keys.data());
  auto* const values = reinterpret_cast<float*>(head.values.data());
  const size_t lo = large.all ? 0 : 1000 * 64, hi = large.all ? kTokens * 64 : lo + 64;
  for (size_t at = lo; at < hi; ++at) {
    keys[at] *= large.keys;
    values[at] *= large.values;
  }
  // Scores are as large as ever.
  if (large.all) {
    head.scale /= large.keys;
    for (float& x : head.sampled) x /= large.keys;
  }
  ClusterRuns runs(head, ClusterRuns::Even(head, 2));
  auto learned = LearnClusters(runs.views, head.sampled, {.scan_if_faster = false});
  if (!learned.ok()) return;
  runs.indexes = std::move(learned->indexes);
  uint32_t far = 0;  // one of some thousands is, whatever the sizes
  for (uint32_t i = 0; i < ClusterHead::kAsked; ++i) {
    const std::vector<TokenRange> ranges(1, head.all());
    const QueryBlock query = head.Queries(i, 1);
    const ClusterAnswer want = Exactly(runs, query, ranges);
    const ClusterAnswer found = Search(runs, query, ranges, Within(0.05f));
    const double off = Distance(found.o[0], want.o[0]);
    far += !(off < std::max(0.5, 4 * found.predicted[0]));
    EXPECT_TRUE(std::isfinite(off) && std::isfinite(found.lse[0]));
  }
  EXPECT_LE(far, 1u);
}

INSTANTIATE_TEST_SUITE_P(
    Sizes, LargeKvTest,
    ::testing::Values(
        Large{"OneKeyBy20", 20, 1, false}, Large{"OneKeyBy1e3", 1e3f, 1, false},
        Large{"OneKeyBy1e6", 1e6f, 1, false}, Large{"OneKeyBy1e9", 1e9f, 1, false},
        Large{"OneKeyBy1e25", 1e25f, 1, false}, Large{"AllKeysBy1e15", 1e15f, 1, true},
        Large{"AllKeysBy1e30", 1e30f, 1, true}, Large{"AllKeysBy1em12", 1e-12f, 1, true},
        Large{"AllKeysBy1em20", 1e-20f, 1, true}, Large{"OneValueBy20", 1, 20, false},
        Large{"OneValueBy1e4", 1, 1e4f, false}, Large{"OneValueBy1e30", 1, 1e30f, false},
        Large{"AllValuesBy1e12", 1, 1e12f, true}, Large{"AllValuesBy1e20", 1, 1e20f, true}),
    [](const auto& parameters) { return parameters.param.what; });

}  // namespace
}  // namespace quarry

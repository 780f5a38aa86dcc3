#include "cpu_index/key_codes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cpu_index/code_scan.h"
#include "proto/half.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using ::testing::HasSubstr;

// Keys whose dimensions differ in strength, cut into segments of odd lengths.
struct Head {
  Head(uint32_t n, uint32_t d) : head_dim(d), values(n * d), keys(n * d), queries(64 * d) {
    std::mt19937 random(Seed());
    std::normal_distribution<float> normal;
    for (uint32_t i = 0; i < n * d; ++i) {
      keys[i] = FloatToBf16(0.5f + normal(random) * std::exp(-2.0f * static_cast<float>(i % d) /
                                                             static_cast<float>(d)));
      values[i] = FloatToBf16(normal(random));
    }
    for (float& q : queries) q = Bf16ToFloat(FloatToBf16(normal(random)));
    for (uint32_t lo = 0; lo < n;) {
      const uint32_t hi = std::min(n, lo + 77);
      segments.push_back({keys.data() + lo * d, values.data() + lo * d, {300 + lo, 300 + hi}});
      lo = hi;
    }
    view.segments = segments;
    view.head_dim = d;
    scale = 1.0f / std::sqrt(static_cast<float>(d));
    for (const float q : queries) scaled.push_back(q * scale);
  }
  double Score(uint32_t query, uint32_t key) const {
    double sum = 0;
    for (uint32_t d = 0; d < head_dim; ++d) {
      sum += double{scaled[query * head_dim + d]} * Bf16ToFloat(keys[key * head_dim + d]);
    }
    return sum;
  }
  std::span<const float> Query(uint32_t i) const {
    return std::span(scaled).subspan(size_t{i} * head_dim, head_dim);
  }

  uint32_t head_dim;
  float scale = 1;
  std::vector<uint16_t> values, keys;
  std::vector<float> queries, scaled;
  std::vector<KvSegment> segments;
  KvView view;
};

KeyCodes CodesOf(const Head& head) {
  auto basis = FitQueryBasis(head.view, head.scaled, std::min(head.head_dim, 48u));
  EXPECT_TRUE(basis.ok()) << basis.status();
  auto codes = KeyCodes::Encode(head.view, *std::move(basis));
  EXPECT_TRUE(codes.ok()) << codes.status();
  return *std::move(codes);
}

KeyCodes::Query PrepareQuery(const KeyCodes& codes, std::span<const float> query) {
  std::vector<float> coordinates(codes.basis().rank);
  codes.basis().EncodeQuery(query, coordinates);
  float mean_score = 0;
  for (size_t d = 0; d < query.size(); ++d) mean_score += query[d] * codes.basis().mean[d];
  return codes.Prepare(coordinates, mean_score);
}

TEST(KeyCodesTest, ScoresMissTheExactOnesByLessThanHalfOfTheirSpread) {
  for (const uint32_t head_dim : {16u, 64u, 96u, 128u}) {
    const Head head(1003, head_dim);
    const KeyCodes codes = CodesOf(head);
    double spread = 0, error = 0;
    for (uint32_t i = 0; i < 64; i += 7) {
      const KeyCodes::Query query = PrepareQuery(codes, head.Query(i));
      std::vector<int32_t> sums(codes.keys_padded());
      codes.Sum({&query, 1}, sums);
      double mean = 0;
      for (uint32_t t = 0; t < 1003; ++t) mean += head.Score(i, t) / 1003;
      for (uint32_t t = 0; t < 1003; ++t) {
        spread += std::pow(head.Score(i, t) - mean, 2);
        error += std::pow(head.Score(i, t) - query.scale * sums[t] - query.offset, 2);
      }
    }
    // Queries that weigh all directions alike: 48 coordinates of 128 leave more than of 64.
    EXPECT_LT(error, head_dim > 96 ? spread / 5 : spread / 8) << head_dim;
    EXPECT_GT(error, 0);
  }
}

TEST(KeyCodesTest, ABasisThatDoesNotFitIsNamed) {
  const Head head(100, 64);
  const auto basis = FitQueryBasis(head.view, {}, 64);
  ASSERT_TRUE(basis.ok());
  const auto codes = KeyCodes::Encode(head.view, *basis);
  EXPECT_THAT(std::string(codes.status().message()), HasSubstr("64 coordinates"));
}

TEST(CodeScanTest, ItsCandidatesHoldTheBestKeysWithExactScores) {
  const Head head(3000, 128);
  auto index = CodeScan::Build(head.view, head.scaled);
  ASSERT_TRUE(index.ok()) << index.status();
  (*index)->set_candidates(300);
  constexpr uint32_t kQueries = 4;
  const std::vector<TokenRange> ranges = {{300, 3300}, {300, 3300}, {1000, 1500}, {3300, 3300}};
  QueryBlock block;
  block.q = head.queries.data();
  block.q_dtype = DType::kBf16;
  block.queries = kQueries;
  block.head_dim = 128;
  block.scale = head.scale;
  block.ranges = ranges;
  CoarseScores scores;
  (*index)->Score(head.view, block, &scores);
  ASSERT_FALSE(scores.dense());
  for (uint32_t i = 0; i < kQueries; ++i) {
    const std::span<const float> row = scores.Row(i);
    EXPECT_GE(row.size(), std::min<size_t>(300, ranges[i].size()));
    EXPECT_LE(row.size(), std::min<size_t>(330, ranges[i].size()));
    std::vector<std::pair<double, uint32_t>> best;
    for (uint32_t t = ranges[i].lo; t < ranges[i].hi; ++t) {
      best.emplace_back(-head.Score(i, t - 300), t - 300);
    }
    std::sort(best.begin(), best.end());
    uint32_t missed = 0;
    for (uint32_t b = 0; b < std::min<size_t>(30, best.size()); ++b) {
      bool there = false;
      for (size_t n = 0; n < row.size(); ++n) there |= scores.NodeOf(i, n) == best[b].second;
      missed += !there;
    }
    EXPECT_LE(missed, 3u) << "query " << i;
    for (size_t n = 0; n < row.size(); ++n) {
      ASSERT_NEAR(row[n], head.Score(i, scores.NodeOf(i, n)), 1e-4);
    }
  }
  EXPECT_GE(scores.bytes, 3008u * 16);
}

}  // namespace
}  // namespace quarry

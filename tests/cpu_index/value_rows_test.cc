#include "cpu_index/value_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "tests/support/seed.h"

namespace quarry {
namespace {

TEST(ValueRowsTest, WeightedSumsMissLittleOfTheStoredValuesLongOnesIncluded) {
  std::mt19937 random(Seed());
  std::normal_distribution<float> normal;
  for (const uint32_t head_dim : {16u, 64u, 80u, 128u}) {
    constexpr uint32_t kRows = 1003, kQueries = 5;
    std::vector<float> deviation(head_dim), values(kRows * head_dim), decoded(head_dim);
    for (uint32_t d = 0; d < head_dim; ++d) deviation[d] = d == 3 ? 0 : 0.1f + 0.01f * d;
    ValueRows rows(kRows, deviation);
    for (uint32_t r = 0; r < kRows; ++r) {
      const float length = r % 10 == 0 ? 8.0f : 1.0f;  // some are much longer
      for (uint32_t d = 0; d < head_dim; ++d) {
        values[r * head_dim + d] = length * deviation[d] * normal(random);
      }
    }
    rows.Store(100, std::span(values).subspan(100 * head_dim));
    rows.Store(0, std::span(values).first(100 * head_dim));
    double error = 0, all = 0;
    for (uint32_t r = 0; r < kRows; ++r) {
      rows.Decode(r, decoded);
      for (uint32_t d = 0; d < head_dim; ++d) {
        const double value = values[r * head_dim + d];
        error += (decoded[d] - value) * (decoded[d] - value);
        all += value * value;
      }
    }
    EXPECT_LT(error, 0.015 * all) << head_dim;  // 4 bits of a normal distribution: 0.0115
    EXPECT_GT(error, 0);
    // Sums are those of what is stored.
    std::vector<uint32_t> which;
    for (uint32_t r = 0; r < kRows; r += 3) which.push_back(r);
    const size_t ld = which.size() + 5;
    std::vector<float> weights(kQueries * ld), sums(kQueries * head_dim, 1.0f);
    for (float& w : weights) w = std::exp(normal(random));
    std::vector<double> wanted(sums.size(), 1.0);
    for (size_t r = 0; r < which.size(); ++r) {
      rows.Decode(which[r], decoded);
      for (uint32_t i = 0; i < kQueries; ++i) {
        for (uint32_t d = 0; d < head_dim; ++d) {
          wanted[i * head_dim + d] += double{weights[i * ld + r]} * decoded[d];
        }
      }
    }
    rows.AddWeighted(which, weights.data(), ld, kQueries, sums);
    for (size_t at = 0; at < sums.size(); ++at) EXPECT_NEAR(sums[at], wanted[at], 1e-2) << head_dim;
  }
}

}  // namespace
}  // namespace quarry

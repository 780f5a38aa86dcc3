#include "cpu_index/value_codes.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace quarry {
namespace {

TEST(ValueCodesTest, WeightedSumsMissLittleOfTheStoredValuesLongOnesIncluded) {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (const uint32_t head_dim : {16u, 64u, 128u}) {
    constexpr uint32_t kTokens = 1003, kQueries = 3;
    std::vector<float> deviation(head_dim), values(kTokens * head_dim);
    for (uint32_t d = 0; d < head_dim; ++d) deviation[d] = d == 3 ? 0 : 0.1f + 0.01f * d;
    for (uint32_t t = 0; t < kTokens; ++t) {
      const float length = t % 10 == 0 ? 8.0f : 1.0f;  // some are much longer
      for (uint32_t d = 0; d < head_dim; ++d) {
        values[t * head_dim + d] = length * deviation[d] * normal(random);
      }
    }
    ValueCodes codes(kTokens, deviation);
    for (uint32_t t = 0; t < kTokens; ++t) {
      codes.Store(t, std::span(values).subspan(t * head_dim, head_dim));
    }
    // Every third block, with weights for each query; the last block is not full.
    std::vector<uint32_t> which;
    for (uint32_t b = 0; b * 16 < kTokens; b += 3) which.push_back(b);
    std::vector<float> weights(kQueries * which.size() * 16);
    std::vector<double> wanted(kQueries * head_dim), squares(kQueries * head_dim);
    for (uint32_t i = 0; i < kQueries; ++i) {
      for (size_t b = 0; b < which.size(); ++b) {
        for (uint32_t t = 0; t < 16; ++t) {
          const uint32_t token = which[b] * 16 + t;
          if (token >= kTokens) continue;
          const float w = std::exp(normal(random));
          weights[(i * which.size() + b) * 16 + t] = w;
          for (uint32_t d = 0; d < head_dim; ++d) {
            const double part = double{w} * values[token * head_dim + d];
            wanted[i * head_dim + d] += part;
            squares[i * head_dim + d] += part * part;
          }
        }
      }
    }
    std::vector<float> sums(kQueries * head_dim, 0.0f);
    codes.AddWeighted(which, weights, kQueries, sums);
    double error = 0, random_sum = 0;
    for (size_t at = 0; at < sums.size(); ++at) {
      ASSERT_TRUE(std::isfinite(sums[at]));
      error += (sums[at] - wanted[at]) * (sums[at] - wanted[at]);
      random_sum += squares[at];
    }
    // Independent errors of an eighth of each value's square, of two bits; rounded weights add
    // some.
    EXPECT_LT(error, 0.25 * random_sum) << head_dim;
    EXPECT_GT(error, 0);
  }
}

}  // namespace
}  // namespace quarry

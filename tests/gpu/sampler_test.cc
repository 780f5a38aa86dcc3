// How the next token is chosen.
#include "gpu/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace quarry {
namespace {

TEST(SamplerTest, GreedyTakesTheLowestIdOfTheLargestLogits) {
  Sampler sampler({});
  EXPECT_EQ(sampler.Next(std::vector<float>{0.0f, 5.0f, 4.9f, 5.0f}), 1u);
  EXPECT_EQ(sampler.Next(std::vector<float>{-7.0f, -8.0f}), 0u);
  EXPECT_EQ(sampler.Next(std::vector<float>{3.0f}), 0u);
}

TEST(SamplerTest, TopPKeepsTheFewestTokensThatReachIt) {
  const std::vector<float> logits = {0.0f, 5.0f, 4.9f, -3.0f};
  std::vector<int> counts(4);
  Sampler sampler({.temperature = 1.0, .top_p = 0.9, .seed = 3});
  for (int i = 0; i < 1000; ++i) ++counts[sampler.Next(logits)];
  EXPECT_GT(counts[1], 400);
  EXPECT_GT(counts[2], 350);
  EXPECT_EQ(counts[0] + counts[3], 0);
  Sampler narrow({.temperature = 1.0, .top_p = 1e-9, .seed = 3});
  for (int i = 0; i < 20; ++i) EXPECT_EQ(narrow.Next(logits), 1u);
}

TEST(SamplerTest, TemperatureFollowsTheSoftmax) {
  const std::vector<float> logits = {0.0f, 1.0f, 2.0f};
  for (const double temperature : {0.5, 1.0, 2.0}) {
    double total = 0;
    for (float z : logits) total += std::exp(z / temperature);
    std::vector<int> counts(3);
    Sampler sampler({.temperature = temperature, .top_p = 1, .seed = 17});
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) ++counts[sampler.Next(logits)];
    for (size_t id = 0; id < 3; ++id) {
      const double p = std::exp(logits[id] / temperature) / total;
      EXPECT_NEAR(counts[id], p * kDraws, 5 * std::sqrt(kDraws * p * (1 - p))) << temperature;
    }
  }
}

TEST(SamplerTest, SeedsRepeat) {
  const std::vector<float> logits = {0.0f, 0.1f, 0.2f, 0.3f};
  const auto draw = [&](uint64_t seed) {
    Sampler sampler({.temperature = 2.0, .top_p = 1, .seed = seed});
    std::vector<uint32_t> out;
    for (int i = 0; i < 50; ++i) out.push_back(sampler.Next(logits));
    return out;
  };
  EXPECT_EQ(draw(9), draw(9));
  EXPECT_NE(draw(9), draw(10));
}

}  // namespace
}  // namespace quarry

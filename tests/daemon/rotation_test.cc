#include "daemon/rotation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "gpu/rope.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kHeadDim = 96;

// What a model does: fp32 angles, cosines and sines scaled.
std::vector<float> Rotated(const RopeSpec& rope, std::vector<float> x, uint32_t position) {
  const size_t pairs = rope.inv_freq.size();
  for (size_t i = 0; i < pairs; ++i) {
    const float angle = static_cast<float>(position) * rope.inv_freq[i];
    const float cosine = std::cos(angle) * rope.attention_scale;
    const float sine = std::sin(angle) * rope.attention_scale;
    float& a = x[rope.interleaved ? 2 * i : i];
    float& b = x[rope.interleaved ? 2 * i + 1 : i + pairs];
    const float turned = a * cosine - b * sine;
    b = b * cosine + a * sine;
    a = turned;
  }
  return x;
}

struct Kind {
  std::string name;
  RopeSpec rope;
};

std::vector<Kind> Kinds() {
  RopeConfig plain, llama3, longrope, partial;
  llama3.type = RopeConfig::Type::kLlama3;
  llama3.theta = 500000;
  llama3.factor = 8;
  llama3.original_max_tokens = 8192;
  longrope.type = RopeConfig::Type::kLongRope;
  longrope.original_max_tokens = 4096;
  for (uint32_t i = 0; i < kHeadDim / 2; ++i) {
    longrope.short_factor.push_back(1.0 + 0.02 * i);
    longrope.long_factor.push_back(1.0 + 1.3 * i);
  }
  partial.partial_rotary_factor = 0.75;
  constexpr uint32_t kModelTokens = 131072;
  std::vector<Kind> kinds = {
      {"default", ComputeRope(plain, kHeadDim, kModelTokens, kModelTokens)},
      {"llama3", ComputeRope(llama3, kHeadDim, kModelTokens, kModelTokens)},
      {"longrope short", ComputeRope(longrope, kHeadDim, kModelTokens, 4096)},
      {"longrope long", ComputeRope(longrope, kHeadDim, kModelTokens, kModelTokens)},
      {"partial", ComputeRope(partial, kHeadDim, kModelTokens, kModelTokens)},
  };
  kinds.push_back({"interleaved", kinds.front().rope});
  kinds.back().rope.interleaved = true;
  kinds.push_back({"partial interleaved", kinds[4].rope});
  kinds.back().rope.interleaved = true;
  return kinds;
}

std::vector<float> RandomVector(std::mt19937_64* random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(kHeadDim);
  for (float& v : x) v = normal(*random);
  return x;
}

double Norm(const std::vector<float>& x) {
  double sum = 0;
  for (const float v : x) sum += double{v} * v;
  return std::sqrt(sum);
}

double Distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
  return std::sqrt(sum);
}

double Dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * b[i];
  return sum;
}

// The largest distance, by their lengths, between keys turned from `base` by `distance` and the
// model's own at the new position.
double WorstTurn(const RopeSpec& rope, uint32_t base, int32_t distance, std::mt19937_64* random) {
  double worst = 0;
  for (int i = 0; i < 20; ++i) {
    const std::vector<float> plain = RandomVector(random);
    std::vector<float> key = Rotated(rope, plain, base);
    Rotation(rope, distance).TurnKeys(key.data(), 1, kHeadDim);
    const std::vector<float> wanted = Rotated(rope, plain, base + distance);
    worst = std::max(worst, Distance(key, wanted) / Norm(wanted));
  }
  return worst;
}

TEST(RotationTest, TurnedKeysAreTheModelsOwnAtTheNewPosition) {
  std::mt19937_64 random(Seed());
  for (const Kind& kind : Kinds()) {
    for (const auto& [base, distance] :
         {std::pair<uint32_t, int32_t>{0, 256}, {256, 512}, {1024, -1024}, {3584, -256}}) {
      EXPECT_LT(WorstTurn(kind.rope, base, distance, &random), 2e-4)
          << kind.name << " from " << base << " by " << distance;
    }
  }
}

TEST(RotationTest, AQueryTurnedBackScoresStoredKeysAsItScoresTurnedOnes) {
  std::mt19937_64 random(Seed());
  for (const Kind& kind : Kinds()) {
    for (const int32_t distance : {-4096, -256, 0, 256, 100352, 1 << 20}) {
      const Rotation rotation(kind.rope, distance);
      const std::vector<float> query = RandomVector(&random);
      std::vector<float> key = RandomVector(&random), turned_query = query;
      const std::vector<float> stored = key;
      rotation.TurnKeys(key.data(), 1, kHeadDim);
      rotation.TurnQueries(turned_query.data(), 1, kHeadDim);
      EXPECT_NEAR(Dot(query, key), Dot(turned_query, stored), 1e-5 * Norm(query) * Norm(key))
          << kind.name << " by " << distance;
    }
  }
}

// The model's fp32 angles are rounded at each position: what turning misses is their rounding, and
// it grows with the position as that does. bf16 keys are rounded by 0.002 themselves.
TEST(RotationTest, ErrorsAreTheRoundingOfTheModelsOwnAngles) {
  std::mt19937_64 random(Seed());
  double at_128k = 0, at_1m = 0;
  for (const Kind& kind : Kinds()) {
    at_128k = std::max(at_128k, WorstTurn(kind.rope, 256, 131072 - 512, &random));
    at_1m = std::max(at_1m, WorstTurn(kind.rope, 256, (1 << 20) - 512, &random));
  }
  RecordProperty("worst_error_at_131072_tokens", std::to_string(at_128k));
  RecordProperty("worst_error_at_1048576_tokens", std::to_string(at_1m));
  std::printf("keys turned to position 131072: %.2e, to 1048576: %.2e of their length\n", at_128k,
              at_1m);
  EXPECT_LT(at_128k, 4e-3);  // half an ulp of an angle below 2^17
  EXPECT_LT(at_1m, 3.2e-2);  // below 2^20
}

TEST(RotationTest, OnlyRotatedDimensionsTurn) {
  const RopeSpec rope = Kinds()[4].rope;
  ASSERT_EQ(rope.rotary_dim, 72u);
  std::mt19937_64 random(Seed());
  const std::vector<float> before = RandomVector(&random);
  std::vector<float> after = before;
  Rotation(rope, 768).TurnKeys(after.data(), 1, kHeadDim);
  EXPECT_FALSE(std::equal(before.begin(), before.begin() + 72, after.begin()));
  EXPECT_TRUE(std::equal(before.begin() + 72, before.end(), after.begin() + 72));
}

// The attention factor is in the keys and in the query: it must not come in once more.
TEST(RotationTest, LengthsStay) {
  const RopeSpec rope = Kinds()[3].rope;
  ASSERT_GT(rope.attention_scale, 1.1f);
  std::mt19937_64 random(Seed());
  std::vector<float> vectors = RandomVector(&random);
  const std::vector<float> second = RandomVector(&random);
  vectors.insert(vectors.end(), second.begin(), second.end());
  const double before = Norm(vectors);
  Rotation(rope, -2048).TurnQueries(vectors.data(), 2, kHeadDim);
  EXPECT_NEAR(Norm(vectors), before, 1e-5 * before);
}

}  // namespace
}  // namespace quarry

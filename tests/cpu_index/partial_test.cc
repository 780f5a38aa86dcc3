#include "cpu_index/partial.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();
constexpr uint32_t kHeadDim = 48;

// Tokens with a score and a value each.
struct Tokens {
  std::vector<float> score;
  std::vector<float> value;  // [tokens][kHeadDim]

  Tokens(size_t n, float spread, std::mt19937* random) : score(n), value(n * kHeadDim) {
    std::normal_distribution<float> normal;
    for (float& s : score) s = spread * normal(*random);
    for (float& v : value) v = normal(*random);
  }
};

// A partial with its own accumulator.
struct Owned {
  std::vector<float> acc = std::vector<float>(kHeadDim, 0.0f);
  Partial partial;

  Owned() { partial.acc = acc; }
  Owned(const Owned& other) : acc(other.acc), partial(other.partial) { partial.acc = acc; }
  Owned& operator=(const Owned&) = delete;

  static Owned Of(const Tokens& tokens, std::span<const size_t> which) {
    Owned out;
    for (size_t t : which) out.partial.max = std::max(out.partial.max, tokens.score[t]);
    for (size_t t : which) {
      const float w = std::exp(tokens.score[t] - out.partial.max);
      out.partial.sum += w;
      for (uint32_t d = 0; d < kHeadDim; ++d) out.acc[d] += w * tokens.value[t * kHeadDim + d];
    }
    out.partial.tokens = which.size();
    out.partial.bytes = 2 * which.size() * kHeadDim;
    return out;
  }
};

struct Answer {
  std::vector<double> o = std::vector<double>(kHeadDim, 0.0);
  double lse = 0;
};

Answer Exact(const Tokens& tokens, std::span<const size_t> which) {
  Answer out;
  double largest = -1e300, sum = 0;
  for (size_t t : which) largest = std::max<double>(largest, tokens.score[t]);
  for (size_t t : which) {
    const double w = std::exp(tokens.score[t] - largest);
    sum += w;
    for (uint32_t d = 0; d < kHeadDim; ++d) out.o[d] += w * tokens.value[t * kHeadDim + d];
  }
  for (double& x : out.o) x /= sum;
  out.lse = largest + std::log(sum);
  return out;
}

double RelativeError(std::span<const float> got, std::span<const double> want) {
  double error = 0, size = 0;
  for (size_t d = 0; d < want.size(); ++d) {
    error += (got[d] - want[d]) * (got[d] - want[d]);
    size += want[d] * want[d];
  }
  return std::sqrt(error / size);
}

void ExpectIs(const Partial& partial, const Answer& want) {
  std::vector<float> o(kHeadDim, NAN);
  EXPECT_NEAR(partial.Finish(o), want.lse, 1e-5 + 2e-7 * std::abs(want.lse));
  EXPECT_LE(RelativeError(o, want.o), 2e-5);
}

// The tokens 0 .. n - 1 in random order, cut at random into `parts` sets; some may be empty.
std::vector<std::vector<size_t>> RandomSets(size_t n, size_t parts, std::mt19937* random) {
  std::vector<std::vector<size_t>> sets(parts);
  for (size_t t = 0; t < n; ++t) sets[(*random)() % parts].push_back(t);
  return sets;
}

std::vector<size_t> AllOf(size_t n) {
  std::vector<size_t> all(n);
  std::iota(all.begin(), all.end(), size_t{0});
  return all;
}

TEST(PartialTest, AnyCutAndAnyOrderGiveTheWhole) {
  std::mt19937 random(Seed());
  for (float spread : {0.1f, 1.0f, 10.0f, 40.0f}) {
    for (size_t parts : {1u, 2u, 16u, 128u}) {
      const Tokens tokens(300, spread, &random);
      const Answer want = Exact(tokens, AllOf(300));
      std::vector<std::vector<size_t>> sets = RandomSets(300, parts, &random);
      for (int round = 0; round < 3; ++round) {
        std::shuffle(sets.begin(), sets.end(), random);
        Owned total;
        for (const auto& set : sets) total.partial.Merge(Owned::Of(tokens, set).partial);
        ExpectIs(total.partial, want);
        EXPECT_EQ(total.partial.tokens, 300u);
        EXPECT_EQ(total.partial.bytes, 600u * kHeadDim);
      }
    }
  }
}

TEST(PartialTest, MergingIsAssociative) {
  std::mt19937 random(Seed() + 1);
  for (int round = 0; round < 50; ++round) {
    const Tokens tokens(60, 5.0f, &random);
    const auto sets = RandomSets(60, 3, &random);
    Owned left = Owned::Of(tokens, sets[0]);  // (a + b) + c
    left.partial.Merge(Owned::Of(tokens, sets[1]).partial);
    left.partial.Merge(Owned::Of(tokens, sets[2]).partial);
    Owned tail = Owned::Of(tokens, sets[1]);  // a + (b + c)
    tail.partial.Merge(Owned::Of(tokens, sets[2]).partial);
    Owned right = Owned::Of(tokens, sets[0]);
    right.partial.Merge(tail.partial);
    std::vector<float> a(kHeadDim), b(kHeadDim);
    EXPECT_NEAR(left.partial.Finish(a), right.partial.Finish(b), 1e-5);
    EXPECT_LE(RelativeError(a, std::vector<double>(b.begin(), b.end())), 1e-5);
  }
}

TEST(PartialTest, AnEmptySetChangesNothingOnEitherSide) {
  std::mt19937 random(Seed() + 2);
  const Tokens tokens(20, 3.0f, &random);
  const Owned some = Owned::Of(tokens, AllOf(20));
  Owned left = some;
  left.partial.Merge(Owned().partial);
  EXPECT_EQ(left.acc, some.acc);
  EXPECT_EQ(left.partial.max, some.partial.max);
  EXPECT_EQ(left.partial.sum, some.partial.sum);
  Owned right;
  right.partial.Merge(some.partial);
  EXPECT_EQ(right.acc, some.acc);
  EXPECT_EQ(right.partial.max, some.partial.max);
  EXPECT_EQ(right.partial.sum, some.partial.sum);
  EXPECT_EQ(right.partial.tokens, 20u);
}

TEST(PartialTest, TwoEmptySetsStayEmptyWithoutNan) {
  Owned a, b;
  a.partial.Merge(b.partial);
  std::vector<float> o(kHeadDim, NAN);
  EXPECT_EQ(a.partial.Finish(o), kEmpty);
  EXPECT_EQ(o, std::vector<float>(kHeadDim, 0.0f));
}

TEST(PartialTest, FarApartMaximaKeepTheLargerSideExactly) {
  for (float gap : {50.0f, 200.0f, 1e30f, 3e38f}) {
    Owned high, low;
    high.partial.max = gap;
    low.partial.max = -gap;
    for (Owned* p : {&high, &low}) p->partial.sum = 2;
    std::fill(high.acc.begin(), high.acc.end(), 6.0f);
    std::fill(low.acc.begin(), low.acc.end(), -1e6f);
    Owned total;
    total.partial.Merge(low.partial);
    total.partial.Merge(high.partial);
    std::vector<float> o(kHeadDim, NAN);
    EXPECT_FLOAT_EQ(total.partial.Finish(o), gap + std::log(2.0f));
    EXPECT_EQ(o, std::vector<float>(kHeadDim, 3.0f)) << "gap " << gap;
  }
}

TEST(MergeFinishedTest, EqualsMergingBeforeFinishing) {
  std::mt19937 random(Seed() + 3);
  for (float spread : {0.1f, 5.0f, 40.0f}) {
    for (size_t parts : {2u, 5u, 64u}) {
      const Tokens tokens(200, spread, &random);
      std::vector<float> o(kHeadDim, 0.0f);
      float lse = kEmpty;
      for (const auto& set : RandomSets(200, parts, &random)) {
        std::vector<float> part(kHeadDim);
        const float part_lse = Owned::Of(tokens, set).partial.Finish(part);
        MergeFinished(o, &lse, part, part_lse);
      }
      const Answer want = Exact(tokens, AllOf(200));
      EXPECT_NEAR(lse, want.lse, 1e-5 + 2e-7 * std::abs(want.lse));
      EXPECT_LE(RelativeError(o, want.o), 2e-5);
    }
  }
}

TEST(MergeFinishedTest, AnEmptySideLeavesTheOther) {
  std::vector<float> a(4, 0.0f);
  const std::vector<float> b = {1, -2, 3, 1e30f};
  float lse = kEmpty;
  MergeFinished(a, &lse, std::vector<float>(4, 7.0f), kEmpty);  // both empty: o is not looked at
  EXPECT_EQ(lse, kEmpty);
  EXPECT_EQ(a, std::vector<float>(4, 0.0f));
  MergeFinished(a, &lse, b, -3.0f);
  EXPECT_EQ(lse, -3.0f);
  EXPECT_EQ(a, b);
  MergeFinished(a, &lse, std::vector<float>(4, 7.0f), kEmpty);
  EXPECT_EQ(lse, -3.0f);
  EXPECT_EQ(a, b);
}

}  // namespace
}  // namespace quarry

#include "perf/retrieval/synthetic_trace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "perf/retrieval/head_class.h"
#include "perf/retrieval/mass_scale.h"
#include "perf/retrieval/truth.h"
#include "proto/half.h"
#include "tests/support/seed.h"

namespace quarry::perf {
namespace {

RandomTraceOptions Shape(uint32_t tokens, uint32_t queries, uint32_t kv_heads = 4) {
  return {.tokens = tokens,
          .kv_heads = kv_heads,
          .group = 2,
          .head_dim = 64,
          .train_queries = 32,
          .queries = queries,
          .seed = static_cast<uint32_t>(SteadySeed())};
}

Trace TraceOf(const std::string& family, const RandomTraceOptions& shape) {
  absl::StatusOr<Trace> trace = SyntheticTrace(family, shape);
  EXPECT_TRUE(trace.ok()) << trace.status();
  return *std::move(trace);
}

std::vector<float> Widen(std::span<const std::byte> data, DType dtype) {
  std::vector<float> out(data.size() / DTypeBytes(dtype));
  for (size_t i = 0; i < out.size(); ++i) out[i] = LoadAsFloat(data.data(), i, dtype);
  return out;
}

// z of a query over the tokens of the range, by plain sums.
std::vector<float> Scores(const Trace& t, std::span<const float> keys, std::span<const float> q,
                          TokenRange range) {
  std::vector<float> out;
  for (uint32_t i = range.lo; i < range.hi; ++i) {
    double sum = 0;
    for (uint32_t d = 0; d < t.head_dim; ++d)
      sum += double{q[d]} * keys[size_t{i} * t.head_dim + d];
    out.push_back(static_cast<float>(sum * t.scale));
  }
  return out;
}

// The median over test queries [0, queries) of the tokens that hold 90% of the mass beside the
// window.
double MedianTokens(const Trace& t, uint32_t kv_head, uint32_t queries) {
  const std::vector<float> keys = Widen(t.Keys(kv_head), t.dtype);
  std::vector<uint32_t> tokens;
  for (uint32_t i = 0; i < queries; ++i) {
    for (uint32_t g = 0; g < t.group(); ++g) {
      std::vector<float> z =
          Scores(t, keys, t.Queries(t.q, i, kv_head).subspan(g * t.head_dim, t.head_dim),
                 Window().Rest(t.q_pos[i] + 1));
      const float best = *std::max_element(z.begin(), z.end());
      for (float& f : z) f = std::exp(f - best);
      tokens.push_back(TokensForMass(z, 0.9));
    }
  }
  std::nth_element(tokens.begin(), tokens.begin() + tokens.size() / 2, tokens.end());
  return tokens[tokens.size() / 2];
}

float Length(std::span<const float> x) {
  double squares = 0;
  for (float f : x) squares += double{f} * f;
  return static_cast<float>(std::sqrt(squares));
}

float Dot(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * b[i];
  return static_cast<float>(sum);
}

std::vector<float> Mean(std::span<const float> rows, uint32_t dim) {
  std::vector<float> out(dim);
  for (size_t i = 0; i < rows.size(); ++i) out[i % dim] += rows[i];
  for (float& f : out) f /= static_cast<float>(rows.size() / dim);
  return out;
}

// One head's keys or values less their mean, and the mean.
struct Centred {
  std::vector<float> rows, mean;
  uint32_t dim;
  Centred(const Trace& t, std::span<const std::byte> data)
      : rows(Widen(data, t.dtype)), mean(Mean(rows, t.head_dim)), dim(t.head_dim) {
    for (size_t i = 0; i < rows.size(); ++i) rows[i] -= mean[i % dim];
  }
  std::span<const float> operator[](size_t i) const { return {rows.data() + i * dim, dim}; }
  double Spread() const { return Length(rows) / std::sqrt(static_cast<double>(rows.size() / dim)); }
};

// The share of the keys' spread outside the span of the first `rank` keys.
double OutsideSpan(const Centred& keys, uint32_t rank) {
  std::vector<std::vector<float>> basis;
  const auto outside = [&](size_t i) {
    std::vector<float> x(keys[i].begin(), keys[i].end());
    for (const std::vector<float>& b : basis) {
      const float along = Dot(x, b);
      for (size_t d = 0; d < x.size(); ++d) x[d] -= along * b[d];
    }
    return x;
  };
  for (uint32_t i = 0; i < rank; ++i) {
    std::vector<float> x = outside(i * 16);  // apart, of several topics
    const float length = Length(x);
    for (float& f : x) f /= length;
    basis.push_back(std::move(x));
  }
  double squares = 0, all = 0;
  for (size_t i = 1000; i < 1400; ++i) {
    squares += std::pow(Length(outside(i)), 2);
    all += std::pow(Length(keys[i]), 2);
  }
  return std::sqrt(squares / all);
}

// Of the similarities of pairs of keys with those of the same pairs of values.
double KeyValueCorrelation(const Trace& t) {
  const Centred k(t, t.Keys(0)), v(t, t.Values(0));
  double n = 0, sx = 0, sy = 0, sxx = 0, syy = 0, sxy = 0;
  for (size_t i = 0; i < 800; ++i) {
    for (size_t j = 0; j < i; ++j) {
      const double x = Dot(k[i], k[j]), y = Dot(v[i], v[j]);
      ++n, sx += x, sy += y, sxx += x * x, syy += y * y, sxy += x * y;
    }
  }
  return (sxy - sx * sy / n) / std::sqrt((sxx - sx * sx / n) * (syy - sy * sy / n));
}

// The cosine of the mean query of the first `count` test queries with that of the last ones, in the
// mean over the KV heads.
double QueriesStay(const Trace& t, uint32_t count) {
  double sum = 0;
  for (uint32_t h = 0; h < t.kv_heads; ++h) {
    std::vector<float> first, last;
    for (uint32_t i = 0; i < count; ++i) {
      const auto a = t.Queries(t.q, i, h);
      const auto b = t.Queries(t.q, static_cast<uint32_t>(t.q_pos.size()) - 1 - i, h);
      first.insert(first.end(), a.begin(), a.end());
      last.insert(last.end(), b.begin(), b.end());
    }
    const std::vector<float> a = Mean(first, t.head_dim), b = Mean(last, t.head_dim);
    sum += Dot(a, b) / (Length(a) * Length(b));
  }
  return sum / t.kv_heads;
}

TEST(SyntheticTraceTest, MassIsAsConcentratedAsAskedFor) {
  for (const char* family : {"mass-30", "mass-300", "mass-3000", "mass-30000"}) {
    const Trace t = TraceOf(family, Shape(16384, 64, 2));
    for (uint32_t h = 0; h < t.kv_heads; ++h) {
      const double wanted = SyntheticTarget(family, h, t.tokens);
      EXPECT_NEAR(MedianTokens(t, h, 64), wanted, 0.25 * wanted) << family << ", head " << h;
    }
  }
}

TEST(SyntheticTraceTest, EveryFamilyIsNearItsTargets) {
  for (const std::string family : {"needles", "rope", "mean-key", "low-rank"}) {
    const Trace t = TraceOf(family, Shape(8192, 256));
    for (uint32_t h = 0; h < t.kv_heads; ++h) {
      const double wanted = SyntheticTarget(family, h, t.tokens);
      const double got = MedianTokens(t, h, 256);
      EXPECT_LE(got, 2.5 * wanted) << family << ", head " << h;
      EXPECT_GE(got, wanted / 5) << family << ", head " << h;
    }
  }
}

TEST(SyntheticTraceTest, ClassesOfHeadsFollowFromTheMass) {
  const std::map<std::string, HeadClass> wanted = {{"mass-30", HeadClass::kSharp},
                                                   {"mass-300", HeadClass::kMedium},
                                                   {"mass-30000", HeadClass::kDiffuse}};
  for (const auto& [family, head_class] : wanted) {
    const Trace t = TraceOf(family, Shape(16384, 4, 2));
    for (uint32_t h = 0; h < t.kv_heads; ++h) {
      const KvSegment all{t.Keys(h).data(), t.Values(h).data(), {0, t.tokens}};
      EXPECT_EQ(Classify(t, h, {{&all, 1}, t.head_dim, t.dtype}, Window()), head_class)
          << family << ", head " << h;
    }
  }
}

TEST(SyntheticTraceTest, FamiliesHaveTheirStructure) {
  std::map<std::string, Trace> traces;
  for (const std::string& family : SyntheticFamilies()) {
    traces.emplace(family, TraceOf(family, Shape(4096, 128)));
  }
  for (const auto& [family, t] : traces) {
    SCOPED_TRACE(family);
    const Centred keys(t, t.Keys(0));
    // Rotation leaves of a mean what hardly turns.
    const double mean = Length(keys.mean) / keys.Spread();
    EXPECT_EQ(mean > 3, family == "mean-key") << mean;
    const double outside = OutsideSpan(keys, 20);
    EXPECT_EQ(outside < 0.1, family == "low-rank") << outside;
    const double stay = QueriesStay(t, 24);
    EXPECT_EQ(stay < 0.65, family == "drift") << stay;
    const double correlation = KeyValueCorrelation(t);
    EXPECT_GT(correlation, 0.02);
    EXPECT_LT(correlation, 0.8);
  }
  RandomTraceOptions shape = Shape(4096, 4);
  EXPECT_LT(std::abs(KeyValueCorrelation(RandomTrace(shape))), 0.02);
}

// How far the test queries, brought to the length of the keys' spread, lie from the keys' mean on
// the average, in standard deviations of the keys that way.
double QueriesFromKeys(const Trace& t, const Centred& keys) {
  std::vector<float> way(t.head_dim), q;
  const uint32_t count = static_cast<uint32_t>(t.q_pos.size());
  for (uint32_t i = 0; i < count; ++i) {
    const std::span<const float> x = t.Queries(t.q, i, 0).first(t.head_dim);
    for (uint32_t d = 0; d < t.head_dim; ++d) way[d] += x[d] / Length(x) / count;
  }
  const double mean = Length(way);  // along the way, of queries of length 1
  double squares = 0;
  for (size_t i = 0; i < t.tokens; ++i) squares += std::pow(Dot(keys[i], way) / mean, 2);
  return mean * keys.Spread() / std::sqrt(squares / t.tokens);
}

TEST(SyntheticTraceTest, NeighboursAreAlikeAndQueriesAreFarFromKeys) {
  const Trace t = TraceOf("rope", Shape(8192, 256)), random = RandomTrace(Shape(8192, 256));
  const Centred keys(t, t.Keys(0)), random_keys(random, random.Keys(0));
  double near = 0, far = 0;
  for (size_t i = 0; i < 2000; ++i) {
    near += Dot(keys[i], keys[i + 1]);
    far += Dot(keys[i], keys[i + 6000]);
  }
  EXPECT_GT(near, 2 * std::abs(far));
  EXPECT_GT(QueriesFromKeys(t, keys), 3);
  EXPECT_LT(QueriesFromKeys(random, random_keys), 0.8);
}

TEST(SyntheticTraceTest, ASeedGivesOneTraceAndAnotherSeedAnother) {
  RandomTraceOptions shape = Shape(2048, 4, 2);
  const Trace a = TraceOf("needles", shape), b = TraceOf("needles", shape);
  shape.seed += 1;
  const Trace c = TraceOf("needles", shape);
  EXPECT_EQ(a.k, b.k);
  EXPECT_EQ(a.v, b.v);
  EXPECT_EQ(a.q, b.q);
  EXPECT_EQ(a.q_train, b.q_train);
  EXPECT_NE(a.k, c.k);
  EXPECT_FALSE(std::ranges::equal(a.Keys(0), a.Keys(1)));
}

TEST(SyntheticTraceTest, UnknownFamiliesAndSmallShapesAreNamed) {
  const absl::Status unknown = SyntheticTrace("mass-31", Shape(4096, 4)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(unknown));
  for (const char* word : {"mass-31", "low-rank"}) {
    EXPECT_NE(std::string(unknown.message()).find(word), std::string::npos) << unknown;
  }
  RandomTraceOptions shape = Shape(2047, 4);
  EXPECT_TRUE(absl::IsInvalidArgument(SyntheticTrace("rope", shape).status()));
  for (const uint32_t dim : {0u, 33u, 72u, 528u}) {
    shape = Shape(4096, 4);
    shape.head_dim = dim;
    const absl::Status status = SyntheticTrace("rope", shape).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status));
    EXPECT_NE(std::string(status.message()).find(absl::StrCat(dim, " dimensions")),
              std::string::npos)
        << status;
  }
}

TEST(MassScaleTest, ScoresByHandNeedTheFactorByHand) {
  // Scores 0, -1, -2, ..., times f: the first token's share of the mass is about 1 - e^-f, so 90%
  // lie on one from f = ln 10 on, and on two from half of that on.
  constexpr uint32_t kDim = 16;
  std::vector<float> keys(40 * kDim), q(kDim, 5.0f);
  for (int i = 0; i < 40; ++i) keys[i * kDim] = static_cast<float>(-i);
  q[0] = 1;
  const KvSegment segment{keys.data(), keys.data(), {0, 40}};
  const std::vector<TokenRange> ranges = {{0, 40}};
  const QueryBlock queries{q.data(), DType::kFp32, 1, kDim, 1.0f, ranges};
  const KvView head{{&segment, 1}, kDim, DType::kFp32};
  EXPECT_NEAR(ScaleForMass(head, queries, {.tokens = 1}), std::log(10.0), 0.01);
  EXPECT_NEAR(ScaleForMass(head, queries, {.tokens = 2}), std::log(10.0) / 2, 0.01);
}

}  // namespace
}  // namespace quarry::perf

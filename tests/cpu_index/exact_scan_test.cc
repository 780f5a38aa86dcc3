#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "cpu_index/budget.h"
#include "cpu_index/key_index.h"
#include "tests/support/kv_reference.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::KvData;
using testing::Reference;
using testing::ReferenceAnswer;
using testing::RelativeError;

// One KV head's keys and values, cut into segments of its own memory, as blocks are.
struct Head {
  KvData data;
  std::vector<std::vector<char>> memory;
  std::vector<KvSegment> segments;

  Head(DType dtype, uint32_t head_dim, uint32_t tokens, uint32_t segment_tokens, uint32_t seed)
      : data({.layers = 1, .heads = 4, .kv_heads = 1, .head_dim = head_dim, .dtype = dtype}, tokens,
             seed) {
    for (uint32_t lo = 0; lo < tokens; lo += segment_tokens) {
      uint32_t hi = std::min(tokens, lo + segment_tokens);
      for (const auto* part : {&data.k[0], &data.v[0]}) {
        memory.emplace_back(part->begin() + data.offset(lo), part->begin() + data.offset(hi));
      }
      segments.push_back({memory[memory.size() - 2].data(), memory.back().data(), {lo, hi}});
    }
  }
  // The view of tokens [lo, hi), which must fall on segments.
  KvView view(size_t first, size_t count) const {
    return {std::span(segments).subspan(first, count), data.shape.head_dim, data.shape.dtype};
  }
  KvView view() const { return view(0, segments.size()); }
};

struct Queries {
  std::vector<float> q;
  std::vector<TokenRange> ranges;
  QueryBlock block;

  Queries(uint32_t count, uint32_t head_dim, std::vector<TokenRange> r, DType dtype, uint32_t seed)
      : q(size_t{count} * head_dim), ranges(std::move(r)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, 1.5f);
    for (float& x : q) {
      x = normal(random);
      if (dtype == DType::kBf16) x = Bf16ToFloat(FloatToBf16(x));
    }
    ranges.resize(count, ranges.front());
    block = {q.data(), dtype, count, head_dim, 1.0f / std::sqrt(static_cast<float>(head_dim)),
             ranges};
  }
};

struct Partials {
  std::vector<float> acc;
  std::vector<Partial> partials;
  Partials(uint32_t count, uint32_t head_dim) : acc(size_t{count} * head_dim), partials(count) {
    for (uint32_t i = 0; i < count; ++i) {
      partials[i].acc = std::span(acc).subspan(size_t{i} * head_dim, head_dim);
    }
  }
};

void ExpectMatches(const Head& head, const Queries& queries, const Partials& got, double bound) {
  uint32_t d = head.data.shape.head_dim;
  for (uint32_t i = 0; i < queries.block.queries; ++i) {
    ReferenceAnswer want =
        Reference(head.data, 0, 0, queries.ranges[i], queries.q.data() + size_t{i} * d);
    std::vector<float> o(d, NAN);
    float lse = got.partials[i].Finish(o);
    EXPECT_LE(RelativeError(o, want.o), bound) << "query " << i;
    if (std::isinf(want.lse)) {
      EXPECT_EQ(lse, kEmptyLse);
    } else {
      EXPECT_NEAR(lse, want.lse, 1e-4);
    }
    EXPECT_EQ(got.partials[i].tokens, queries.ranges[i].size());
  }
}

TEST(ExactScanTest, AttendAllEqualsReferenceForEveryShape) {
  std::mt19937 random(Seed());
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (DType q_dtype : {DType::kBf16, DType::kFp32}) {
      for (uint32_t head_dim : {16u, 48u, 64u, 96u, 128u, 256u}) {
        for (uint32_t tokens : {1u, 2u, 63u, 64u, 65u, 255u, 256u, 257u, 1000u}) {
          Head head(dtype, head_dim, tokens, 256, static_cast<uint32_t>(random()));
          uint32_t count = 1 + static_cast<uint32_t>(random() % 20);
          std::vector<TokenRange> ranges;
          for (uint32_t i = 0; i < count; ++i) {
            uint32_t a = static_cast<uint32_t>(random() % (tokens + 1));
            uint32_t b = static_cast<uint32_t>(random() % (tokens + 1));
            ranges.push_back(i == 0 ? TokenRange{0, tokens}
                                    : TokenRange{std::min(a, b), std::max(a, b)});
          }
          Queries queries(count, head_dim, ranges, q_dtype, static_cast<uint32_t>(random()));
          Partials got(count, head_dim);
          ExactScan().AttendAll(head.view(), queries.block, got.partials);
          ExpectMatches(head, queries, got, 1e-5);
        }
      }
    }
  }
}

TEST(ExactScanTest, ManyTokensStayAccurate) {
  for (DType dtype : {DType::kBf16, DType::kFp32}) {
    const Head head(dtype, 128, 40000, 256, Seed());
    for (uint32_t count : {1u, 4u, 9u}) {
      const Queries queries(count, 128, {{0, 40000}}, DType::kFp32, Seed() + 1);
      Partials got(count, 128);
      ExactScan().AttendAll(head.view(), queries.block, got.partials);
      ExpectMatches(head, queries, got, 1e-5);
    }
  }
}

TEST(ExactScanTest, HugeScoresGiveNoNan) {
  Head head(DType::kFp32, 64, 300, 256, Seed());
  for (auto& buffer : head.memory) {
    for (size_t i = 0; i < buffer.size() / 4; i += 7) {
      StoreFromFloat(buffer.data(), i, DType::kFp32, i % 2 == 0 ? 1e30f : -1e30f);
    }
  }
  Queries queries(3, 64, {{0, 300}}, DType::kFp32, Seed());
  for (float& q : queries.q) q *= 1e20f;
  Partials got(3, 64);
  ExactScan().AttendAll(head.view(), queries.block, got.partials);
  for (const Partial& p : got.partials) {
    std::vector<float> o(64);
    EXPECT_FALSE(std::isnan(p.Finish(o)));
    for (float x : o) EXPECT_FALSE(std::isnan(x));
  }
}

// Attention under a budget over `runs` views of the same head.
std::vector<std::vector<float>> Budgeted(const Head& head, const Queries& queries,
                                         const Budget& budget, size_t segments_per_run,
                                         std::vector<uint64_t>* tokens, double* captured) {
  uint32_t n = queries.block.queries, d = head.data.shape.head_dim;
  std::vector<CoarseScores> coarse;
  std::vector<KvView> views;
  for (size_t s = 0; s < head.segments.size(); s += segments_per_run) {
    views.push_back(head.view(s, std::min(segments_per_run, head.segments.size() - s)));
    ExactScan().Score(views.back(), queries.block, &coarse.emplace_back());
  }
  std::vector<RunAllotment> allotments(views.size());
  for (auto& a : allotments) {
    a.threshold.resize(n);
    a.ties.resize(n);
  }
  *captured = 1;
  for (uint32_t i = 0; i < n; ++i) {
    std::vector<RunScores> scores;
    for (const CoarseScores& c : coarse) scores.push_back({&c, i});
    std::vector<RunShare> shares(scores.size());
    *captured = std::min(*captured, AllocateBudget(budget, scores, shares));
    for (size_t r = 0; r < shares.size(); ++r) {
      allotments[r].threshold[i] = shares[r].threshold;
      allotments[r].ties[i] = shares[r].ties;
    }
  }
  Partials total(n, d);
  for (size_t r = 0; r < views.size(); ++r) {
    Partials part(n, d);
    ExactScan().Refine(views[r], queries.block, coarse[r], allotments[r], part.partials);
    for (uint32_t i = 0; i < n; ++i) total.partials[i].Merge(part.partials[i]);
  }
  std::vector<std::vector<float>> out(n, std::vector<float>(d));
  tokens->clear();
  for (uint32_t i = 0; i < n; ++i) {
    total.partials[i].Finish(out[i]);
    tokens->push_back(total.partials[i].tokens);
  }
  return out;
}

// The reference's own selection: sort by score, ties by token.
std::vector<uint32_t> BestTokens(const Head& head, const float* q, TokenRange range,
                                 const Budget& budget) {
  uint32_t d = head.data.shape.head_dim;
  std::vector<std::pair<double, uint32_t>> z;
  double total = 0, largest = -1e300;
  for (uint32_t t = range.lo; t < range.hi; ++t) {
    double dot = 0;
    for (uint32_t i = 0; i < d; ++i) {
      dot += double{q[i]} *
             LoadAsFloat(head.data.k[0].data(), size_t{t} * d + i, head.data.shape.dtype);
    }
    z.push_back({-dot / std::sqrt(static_cast<double>(d)), t});
    largest = std::max(largest, -z.back().first);
  }
  std::sort(z.begin(), z.end());
  for (auto& [score, t] : z) total += std::exp(-score - largest);
  std::vector<uint32_t> out;
  double mass = 0;
  for (auto& [score, t] : z) {
    if (budget.k > 0 && out.size() == budget.k) break;
    if (budget.kind == Budget::Kind::kTopP && mass >= budget.mass * total) break;
    out.push_back(t);
    mass += std::exp(-score - largest);
  }
  return out;
}

TEST(ExactScanTest, BudgetSelectsTheBestTokensHoweverTheRunsAreCut) {
  Head head(DType::kBf16, 64, 2048, 16, Seed());
  for (const Budget& budget :
       {Budget{Budget::Kind::kFixedK, 1, 1}, Budget{Budget::Kind::kFixedK, 100, 1},
        Budget{Budget::Kind::kFixedK, 5000, 1}, Budget{Budget::Kind::kTopP, 0, 0.5f},
        Budget{Budget::Kind::kTopP, 0, 0.95f}, Budget{Budget::Kind::kTopP, 10, 0.95f},
        Budget{Budget::Kind::kTopP, 0, 1.0f}}) {
    Queries queries(4, 64, {{100, 2000}}, DType::kBf16, Seed() + 9);
    std::vector<uint64_t> tokens, first_tokens;
    double captured = 0, first_captured = 0;
    auto one = Budgeted(head, queries, budget, 128, &first_tokens, &first_captured);
    for (uint32_t i = 0; i < 4; ++i) {
      size_t want = BestTokens(head, queries.q.data() + i * 64, {100, 2000}, budget).size();
      EXPECT_NEAR(first_tokens[i], want, budget.kind == Budget::Kind::kTopP ? 1 : 0);
    }
    for (size_t per_run : {8u, 1u}) {  // 16 and 128 runs
      auto cut = Budgeted(head, queries, budget, per_run, &tokens, &captured);
      EXPECT_EQ(tokens, first_tokens);
      EXPECT_NEAR(captured, first_captured, 1e-6);
      for (uint32_t i = 0; i < 4; ++i) {
        EXPECT_LE(RelativeError(cut[i], std::vector<double>(one[i].begin(), one[i].end())), 1e-5);
      }
    }
    if (budget.kind == Budget::Kind::kTopP && budget.k == 0) {
      EXPECT_GE(first_captured, budget.mass - 1e-5);
    }
  }
}

TEST(ExactScanTest, PartsMergeInAnyOrder) {
  std::mt19937 random(Seed());
  Head head(DType::kFp32, 32, 512, 64, Seed());
  Queries queries(1, 32, {{0, 512}}, DType::kFp32, Seed());
  std::vector<size_t> order = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int round = 0; round < 5; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    Partials total(1, 32);
    for (size_t s : order) {
      Partials part(1, 32);
      ExactScan().AttendAll(head.view(s, 1), queries.block, part.partials);
      total.partials[0].Merge(part.partials[0]);
    }
    ReferenceAnswer want = Reference(head.data, 0, 0, {0, 512}, queries.q.data());
    std::vector<float> o(32);
    EXPECT_NEAR(total.partials[0].Finish(o), want.lse, 1e-5);
    EXPECT_LE(RelativeError(o, want.o), 1e-5);
  }
}

}  // namespace
}  // namespace quarry

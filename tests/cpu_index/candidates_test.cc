#include "cpu_index/candidates.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>
#include <vector>

#include "tests/support/kv_reference.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::KvData;
using testing::RelativeError;

constexpr uint32_t kHeadDim = 64;

// A run of tokens [first, first + tokens) in segments of 100, its queries, and random candidates.
struct Case {
  KvData data;
  uint32_t first;
  std::vector<KvSegment> segments;
  KvView view;
  std::vector<float> q;
  std::vector<TokenRange> ranges;
  QueryBlock queries;
  std::vector<std::set<uint32_t>> wanted;  // by query: candidates inside its range
  CoarseScores lists;

  Case(DType dtype, DType q_dtype, uint32_t tokens, std::mt19937* random)
      : data({.layers = 1, .heads = 4, .kv_heads = 1, .head_dim = kHeadDim, .dtype = dtype}, tokens,
             static_cast<uint32_t>((*random)())),
        first(static_cast<uint32_t>((*random)() % 1000)) {
    for (uint32_t lo = 0; lo < tokens; lo += 100) {
      segments.push_back({data.k[0].data() + data.offset(lo), data.v[0].data() + data.offset(lo),
                          {first + lo, first + std::min(tokens, lo + 100)}});
    }
    view = {segments, kHeadDim, dtype};
    std::normal_distribution<float> normal(0, 1.5f);
    for (uint32_t i = 0; i < 3 * kHeadDim; ++i) {
      const float x = normal(*random);
      q.push_back(q_dtype == DType::kBf16 ? Bf16ToFloat(FloatToBf16(x)) : x);
    }
    ranges = {{0, first + tokens + 5}, {first + tokens / 3, first + tokens}, {0, 0}};
    queries = {q.data(), q_dtype, 3, kHeadDim, 0.125f, ranges};
    std::vector<std::vector<Candidate>> found(3);
    wanted.resize(3);
    for (uint32_t i = 0; i < 3; ++i) {
      std::set<uint32_t> tokens_found;
      for (uint32_t n = tokens / 2 + 1; n > 0; --n) {
        tokens_found.insert(first + static_cast<uint32_t>((*random)() % tokens));
      }
      for (uint32_t t : tokens_found) {
        found[i].push_back({t, 0.0f});
        if (t >= ranges[i].lo && t < ranges[i].hi) wanted[i].insert(t);
      }
      std::shuffle(found[i].begin(), found[i].end(), *random);
    }
    ListCandidates(view.tokens(), ranges, found, &lists);
  }

  double Score(uint32_t query, uint32_t token) const {
    double dot = 0;
    for (uint32_t d = 0; d < kHeadDim; ++d) {
      dot += double{q[query * kHeadDim + d]} *
             LoadAsFloat(data.k[0].data() + data.offset(token - first), d, data.shape.dtype);
    }
    return dot * queries.scale;
  }
};

TEST(CandidatesTest, ListsHoldWhatWasFoundInsideTheRangeInTokenOrder) {
  std::mt19937 random(Seed());
  const Case c(DType::kBf16, DType::kBf16, 1000, &random);
  for (uint32_t i = 0; i < 3; ++i) {
    std::vector<uint32_t> tokens;
    for (size_t j = 0; j < c.lists.Row(i).size(); ++j) {
      tokens.push_back(c.lists.tokens.lo + c.lists.NodeOf(i, j));
    }
    EXPECT_EQ(tokens, std::vector<uint32_t>(c.wanted[i].begin(), c.wanted[i].end()));
  }
}

TEST(CandidatesTest, RescoredEqualDoubleAndSharedKeysCountOnce) {
  std::mt19937 random(Seed());
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (DType q_dtype : {DType::kBf16, DType::kFp32}) {
      for (uint32_t tokens : {1u, 7u, 100u, 101u, 1500u}) {
        Case c(dtype, q_dtype, tokens, &random);
        RescoreCandidates(c.view, c.queries, &c.lists);
        std::set<uint32_t> touched;
        for (uint32_t i = 0; i < 3; ++i) {
          touched.insert(c.wanted[i].begin(), c.wanted[i].end());
          for (size_t j = 0; j < c.lists.Row(i).size(); ++j) {
            const uint32_t token = c.lists.tokens.lo + c.lists.NodeOf(i, j);
            ASSERT_NEAR(c.lists.Row(i)[j], c.Score(i, token), 1e-4) << "token " << token;
          }
        }
        EXPECT_EQ(c.lists.bytes, touched.size() * kHeadDim * DTypeBytes(dtype));
      }
    }
  }
}

// Attention over the tokens in double.
std::vector<double> Attend(const Case& c, uint32_t query, const std::set<uint32_t>& tokens) {
  std::vector<double> o(kHeadDim, 0.0);
  double largest = -1e300, sum = 0;
  for (uint32_t t : tokens) largest = std::max(largest, c.Score(query, t));
  for (uint32_t t : tokens) {
    const double w = std::exp(c.Score(query, t) - largest);
    sum += w;
    for (uint32_t d = 0; d < kHeadDim; ++d) {
      o[d] += w * LoadAsFloat(c.data.v[0].data() + c.data.offset(t - c.first), d,
                              c.data.shape.dtype);
    }
  }
  for (double& x : o) x /= sum;
  return o;
}

TEST(CandidatesTest, AttentionIsOverExactlyWhatWasAllotted) {
  std::mt19937 random(Seed());
  for (DType dtype : {DType::kBf16, DType::kFp32}) {
    for (uint32_t tokens : {1u, 99u, 1000u}) {
      Case c(dtype, DType::kBf16, tokens, &random);
      RescoreCandidates(c.view, c.queries, &c.lists);
      // The first query gets its better half, the others everything.
      std::vector<float> sorted(c.lists.Row(0).begin(), c.lists.Row(0).end());
      std::sort(sorted.begin(), sorted.end());
      const float cut = sorted[sorted.size() / 2];
      const RunAllotment allotment{{cut, -INFINITY, -INFINITY}, {1, 0, 0}, {}, {}};
      std::vector<std::set<uint32_t>> want = c.wanted;
      want[0].clear();
      uint32_t ties = 1;
      for (size_t j = 0; j < c.lists.Row(0).size(); ++j) {
        const float score = c.lists.Row(0)[j];
        if (score > cut || (score == cut && ties-- > 0)) {
          want[0].insert(c.lists.tokens.lo + c.lists.NodeOf(0, j));
        }
      }
      std::vector<float> acc(3 * kHeadDim, 0.0f);
      std::vector<Partial> partials(3);
      for (size_t i = 0; i < 3; ++i) {
        partials[i].acc = std::span(acc).subspan(i * kHeadDim, kHeadDim);
      }
      AttendCandidates(c.view, c.queries, c.lists, allotment, partials);
      std::set<uint32_t> touched;
      for (uint32_t i = 0; i < 3; ++i) {
        touched.insert(want[i].begin(), want[i].end());
        EXPECT_EQ(partials[i].tokens, want[i].size());
        std::vector<float> o(kHeadDim, NAN);
        const float lse = partials[i].Finish(o);
        if (want[i].empty()) {
          EXPECT_EQ(lse, kEmptyLse);
        } else {
          EXPECT_LE(RelativeError(o, Attend(c, i, want[i])), 1e-5);
        }
      }
      EXPECT_EQ(partials[0].bytes,
                c.lists.bytes + touched.size() * kHeadDim * DTypeBytes(dtype));
    }
  }
}

}  // namespace
}  // namespace quarry

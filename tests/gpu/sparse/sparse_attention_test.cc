// Every pattern against attention by the brute-force mask of its index, in double.
#include "gpu/sparse/sparse_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "tests/gpu/sparse/sparse_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::Attends;
using testing::CaseShape;
using testing::SparseCase;

constexpr float kPoison = -1e30f;

std::vector<HeadPattern> AllPatterns() {
  return {{DensePattern{}},
          {AShapePattern{70, 200}},
          {VerticalSlashPattern{100, 130}},
          {VerticalSlashMassPattern{0.6, 1}},
          {BlockSparsePattern{6}},
          {BlockScoredPattern{0.7}}};
}

std::vector<HeadPattern> Mixed(uint32_t heads, std::mt19937_64* random) {
  const std::vector<HeadPattern> all = AllPatterns();
  std::vector<HeadPattern> out;
  const size_t first = (*random)() % all.size();
  for (uint32_t h = 0; h < heads; ++h) out.push_back(all[(first + h) % all.size()]);
  return out;
}

SparseIndex IndexOf(const SparseCase& c, std::span<const HeadPattern> patterns,
                    DenseFallback fallback, ThreadTeam* team) {
  const std::vector<HeadPlan> plans =
      PlanHeads({c.layer(), c.prefill(), patterns, c.last_q(), fallback}, team);
  return BuildIndex(
      plans, {c.layer(), c.shape().first_token, c.shape().rows, c.q().data(), fallback}, team);
}

// The tiles that a kernel runs, one by one: 64 keys of a range, a block or compacted columns.
uint64_t RunTiles(const SparseIndex& index) {
  uint64_t tiles = 0;
  for (uint32_t h = 0; h < index.heads; ++h) {
    for (uint32_t t = 0; t < index.row_tiles(); ++t) {
      const int64_t i0 = int64_t{index.first_token} + 128 * int64_t{t};
      const int64_t i1 = std::min<int64_t>(i0 + 128, index.first_token + index.rows);
      if (index.IsDense(h, t)) {
        for (int64_t j = 0; j < i1; j += 64) ++tiles;
        continue;
      }
      for (const RelativeRange& r : index.RangesOf(h)) {
        for (int64_t j = std::max<int64_t>(0, i0 + r.lo); j < std::min(i1, i0 + r.hi); j += 64) {
          ++tiles;
        }
      }
      for (uint32_t c = 0; c < index.columns_seen[index.At(h, t)]; c += 64) ++tiles;
      tiles += index.BlocksOf(h, t).size();
    }
  }
  return tiles;
}

class SparseAttentionTest : public ::testing::Test {
 protected:
  // Attends all rows, and compares `checked` of them, chosen at random.
  void Check(const SparseCase& c, const SparseIndex& index, uint32_t checked) {
    const CaseShape& s = c.shape();
    std::vector<float> o(c.q().size() + 16, kPoison), lse(size_t{s.rows} * s.heads + 16, kPoison);
    const SparseWork work =
        AttendSparse({c.layer(), &index, {}, c.q().data(), o.data(), lse.data()}, &team_);
    EXPECT_EQ(work.tiles, index.Cost());
    EXPECT_EQ(work.tiles, RunTiles(index));
    EXPECT_LE(index.Cost(), index.DenseHeadCost() * s.heads);
    for (size_t i = c.q().size(); i < o.size(); ++i) ASSERT_EQ(o[i], kPoison);
    for (size_t i = size_t{s.rows} * s.heads; i < lse.size(); ++i) ASSERT_EQ(lse[i], kPoison);
    for (uint32_t n = 0; n < checked; ++n) {
      // The first rows and the last ones, and some between.
      const auto row = n < 2   ? n % s.rows
                       : n < 4 ? s.rows - 1 - n % s.rows % 2 % s.rows
                               : static_cast<uint32_t>(random_() % s.rows);
      for (uint32_t h = 0; h < s.heads; ++h) {
        const uint32_t token = s.first_token + row;
        const auto want = c.Attend(row, h, [&](uint32_t j) { return Attends(index, h, token, j); });
        const size_t at = size_t{row} * s.heads + h;
        ASSERT_NEAR(lse[at], want.lse, 2e-5 * std::max(1.0, std::abs(want.lse)))
            << "row " << row << " head " << h;
        double error = 0, length = 0;
        for (uint32_t i = 0; i < s.head_dim; ++i) {
          const double difference = o[at * s.head_dim + i] - want.o[i];
          error += difference * difference;
          length += want.o[i] * want.o[i];
        }
        ASSERT_LT(std::sqrt(error / length), 3e-5) << "row " << row << " head " << h;
      }
    }
  }

  std::mt19937_64 random_{Seed()};
  ThreadTeam team_{3};
};

TEST_F(SparseAttentionTest, EveryPatternAttendsItsMask) {
  const DType dtypes[] = {DType::kFp32, DType::kBf16, DType::kFp16};
  const std::pair<uint32_t, uint32_t> heads[] = {{6, 6}, {6, 2}, {6, 1}, {8, 4}};
  const uint32_t dims[] = {64, 96, 128};
  const uint32_t lengths[] = {1, 2, 63, 64, 65, 127, 128, 129, 200, 385, 700, 1111, 1500};
  uint32_t n = static_cast<uint32_t>(random_() % 64);
  for (const uint32_t rows : lengths) {
    for (const bool offset : {false, true}) {
      const auto [q_heads, kv_heads] = heads[n % 4];
      const uint32_t first = offset ? 1 + static_cast<uint32_t>(random_() % 900) : 0;
      const SparseCase c({dtypes[n % 3], q_heads, kv_heads, dims[n / 2 % 3], first, rows},
                         &random_);
      ++n;
      const auto fallback = n % 2 == 0 ? DenseFallback::kNever : DenseFallback::kWhereCheaper;
      const SparseIndex index = IndexOf(c, Mixed(q_heads, &random_), fallback, &team_);
      SCOPED_TRACE(::testing::Message() << "first " << first << " rows " << rows << " heads "
                                        << q_heads << "/" << kv_heads);
      Check(c, index, 12);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(SparseAttentionTest, LongPrefillsAreRight) {
  const SparseCase c({DType::kBf16, 6, 2, 64, 1003, 5001}, &random_);
  const SparseIndex index = IndexOf(c, AllPatterns(), DenseFallback::kNever, &team_);
  for (uint32_t h = 1; h < 6; ++h) {
    EXPECT_LT(index.HeadCost(h), index.DenseHeadCost()) << h;
  }
  Check(c, index, 40);
}

// Ranges and columns anywhere, not only those that patterns choose.
TEST_F(SparseAttentionTest, AnyRangesAndColumnsAttendEachKeyOnce) {
  for (int round = 0; round < 25; ++round) {
    const SparseCase c({round % 2 == 0 ? DType::kFp32 : DType::kBf16, 2, 1, 64,
                        static_cast<uint32_t>(random_() % 2 * (random_() % 500)),
                        1 + static_cast<uint32_t>(random_() % 900)},
                       &random_);
    std::vector<HeadPlan> plans(2);
    for (HeadPlan& plan : plans) {
      plan.kind = HeadKind::kRanges;
      std::vector<uint32_t> slashes;
      for (uint32_t s = 0; s < c.tokens(); s += 1 + static_cast<uint32_t>(random_() % 400)) {
        slashes.push_back(s);
      }
      plan.ranges = RangesOfSlashes(slashes);
      for (uint32_t j = 0; j < c.tokens(); j += 1 + static_cast<uint32_t>(random_() % 20)) {
        plan.columns.push_back(j);
      }
    }
    const SparseIndex index = BuildIndex(
        plans, {c.layer(), c.shape().first_token, c.shape().rows, nullptr, DenseFallback::kNever},
        &team_);
    Check(c, index, 10);
    if (HasFatalFailure()) return;
  }
}

TEST_F(SparseAttentionTest, SampledRowsAreThoseOfAll) {
  const SparseCase c({DType::kFp16, 6, 3, 96, 77, 800}, &random_);
  const SparseIndex index = IndexOf(c, Mixed(6, &random_), DenseFallback::kNever, &team_);
  const size_t width = 6 * 96;
  std::vector<float> o(c.q().size(), kPoison), lse(800 * 6, kPoison);
  AttendSparse({c.layer(), &index, {}, c.q().data(), o.data(), lse.data()}, &team_);
  std::vector<uint32_t> tokens;
  std::vector<float> q;
  for (uint32_t row = static_cast<uint32_t>(random_() % 9); row < 800;
       row += 1 + static_cast<uint32_t>(random_() % 60)) {
    tokens.push_back(77 + row);
    q.insert(q.end(), c.Query(row, 0), c.Query(row, 0) + width);
  }
  std::vector<float> sampled_o(q.size(), kPoison), sampled_lse(tokens.size() * 6, kPoison);
  AttendSparse({c.layer(), &index, tokens, q.data(), sampled_o.data(), sampled_lse.data()}, &team_);
  for (size_t i = 0; i < sampled_o.size(); ++i) {
    ASSERT_NEAR(sampled_o[i], o[(tokens[i / width] - 77) * width + i % width], 1e-5);
  }
  for (size_t i = 0; i < sampled_lse.size(); ++i) {
    ASSERT_NEAR(sampled_lse[i], lse[(tokens[i / 6] - 77) * 6 + i % 6], 1e-4);
  }
}

TEST_F(SparseAttentionTest, ThreadsDoNotShow) {
  const SparseCase c({DType::kBf16, 6, 2, 64, 0, 600}, &random_);
  ThreadTeam one(1);
  const std::vector<HeadPattern> patterns = AllPatterns();
  const SparseIndex index = IndexOf(c, patterns, DenseFallback::kNever, &team_);
  const SparseIndex again = IndexOf(c, patterns, DenseFallback::kNever, &one);
  EXPECT_EQ(index.blocks, again.blocks);
  EXPECT_EQ(index.columns, again.columns);
  EXPECT_EQ(index.ranges, again.ranges);
  EXPECT_EQ(index.tiles, again.tiles);
  std::vector<float> o(c.q().size()), lse(600 * 6), o2(o.size()), lse2(lse.size());
  AttendSparse({c.layer(), &index, {}, c.q().data(), o.data(), lse.data()}, &team_);
  AttendSparse({c.layer(), &index, {}, c.q().data(), o2.data(), lse2.data()}, &one);
  EXPECT_EQ(o, o2);
  EXPECT_EQ(lse, lse2);
}

}  // namespace
}  // namespace quarry

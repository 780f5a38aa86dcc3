// The choice of columns and slashes by a card's kernels, their own sources on an imitation of a
// card, from made sums that neither they nor the host round: the same choice, ties and all.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "gpu/sparse/choose_lines.h"
#include "tests/gpu/cuda/imitated_sparse_kernels.h"
#include "tests/gpu/cuda/plan_check.h"
#include "tests/support/seed.h"

namespace quarry::cuda {
namespace {

class LineTriesTest : public ::testing::Test {
 protected:
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }

  // Sums in whole units: nothing, little and much of it, in all some three in four of a mass.
  std::vector<float> Sums(uint32_t tokens) {
    std::vector<float> out(tokens);
    const uint32_t much = Below(3), apart = 1 + Below(300);
    for (uint32_t j = 0; j < tokens; ++j) {
      uint32_t units = Below(4);
      if (much > 0 && j % apart < much) units += 1u << (5 + Below(10));
      if (Below(50) == 0) units += Below(2000);
      out[j] = static_cast<float>(units) / kMassUnits;
    }
    return out;
  }

  struct Case {
    TokenRange prefill;
    LineSums sums;
  };
  Case Made(TokenRange prefill) {
    const uint32_t tokens = prefill.hi;
    Case c{prefill, {}};
    for (const TokenRange& rows : LastRowTiles(c.prefill)) {
      const std::vector<float> mass = Sums(tokens);
      c.sums.tiles.push_back({rows, {mass.begin(), mass.end()}});
      // No query of this row tile sees what is behind it.
      for (uint32_t j = rows.hi; j < tokens; ++j) c.sums.tiles.back().mass[j] = 0;
    }
    const std::vector<float> slashes = Sums(tokens);
    c.sums.slashes.assign(slashes.begin(), slashes.end());
    return c;
  }

  static HeadPlan OfHost(const Case& c, const Line& line) {
    const LineScores scores(c.prefill, c.sums);
    HeadPlan plan;
    plan.kind = HeadKind::kRanges;
    if (line.mass == 0) {
      ChooseLines(scores, VerticalSlashPattern{line.columns, line.slashes},
                  DenseFallback::kWhereCheaper, &plan);
    } else if (!ChooseLines(scores, VerticalSlashMassPattern{line.mass, line.most_share},
                            DenseFallback::kWhereCheaper, &plan)) {
      return {};
    }
    const HeadCost cost =
        CostOf(plan.ranges, plan.columns, c.prefill, DenseFallback::kWhereCheaper);
    return cost.eighths < 8 * cost.dense_tiles ? plan : HeadPlan();
  }

  template <typename T>
  T* Memory(size_t count) {
    memory_.push_back(std::make_unique<AlignedMemory>((count + 1) * sizeof(T)));
    return reinterpret_cast<T*>(memory_.back()->data());
  }
  KeptLines Kept(size_t lines, uint32_t tokens) {
    return {Memory<LineTry>(lines), Memory<RelativeRange>(lines * MostRanges(tokens)),
            Memory<uint32_t>(lines * (MostRanges(tokens) + 1)),
            Memory<uint32_t>(lines * WordsOf(tokens)), Memory<uint32_t>(lines * WordsOf(tokens))};
  }

  // Of all lines, in one launch: line i of case i.
  std::vector<HeadPlan> OfKernels(const std::vector<Case>& cases, const std::vector<Line>& lines) {
    const size_t count = lines.size();
    const uint32_t tokens = cases[0].prefill.hi;
    KeepLinesArgs args = {};
    ChooseLinesArgs& tried = args.tried;
    tried.lines = lines.data();
    tried.line_count = static_cast<uint32_t>(count);
    tried.tokens = tokens;
    tried.width = tokens + Below(5);
    tried.prefill = cases[0].prefill;
    tried.tries = SlashTries(tokens);
    const size_t tries = count * tried.tries;
    float* const sums = Memory<float>(count * 3 * tried.width);
    for (size_t i = 0; i < count; ++i) {
      float* const at = sums + i * 3 * tried.width;
      for (size_t t = 0; t < cases[i].sums.tiles.size(); ++t) {
        tried.last_tiles[t] = cases[i].sums.tiles[t].rows;
        std::copy(cases[i].sums.tiles[t].mass.begin(), cases[i].sums.tiles[t].mass.end(),
                  at + t * tried.width);
      }
      std::copy(cases[i].sums.slashes.begin(), cases[i].sums.slashes.end(), at + 2 * tried.width);
    }
    tried.sums = sums;
    tried.results = Memory<LineTry>(tries);
    tried.ranges = Memory<RelativeRange>(tries * MostRanges(tokens));
    tried.range_tiles = Memory<uint32_t>(tries * (MostRanges(tokens) + 1));
    tried.bits = Memory<uint32_t>(tries * kTryBits * WordsOf(tokens));
    tried.breaks = Memory<LineBreak>(tries * MostRanges(tokens));
    args.kept = Kept(count, tokens);
    EXPECT_TRUE(kernels_.ChooseLines(args).ok());

    // Lists one behind the other, of a head that is not sparse none.
    std::vector<uint32_t> range_first{0}, column_first{0};
    for (size_t i = 0; i < count; ++i) {
      const LineTry& kept = args.kept.results[i];
      range_first.push_back(range_first.back() + (kept.is_complete != 0 ? kept.ranges : 0));
      column_first.push_back(column_first.back() + (kept.is_complete != 0 ? kept.columns : 0));
    }
    EmitLinesArgs emit = {lines.data(), static_cast<uint32_t>(count), tokens, args.kept, {}};
    emit.plan.range_first = range_first.data();
    emit.plan.column_first = column_first.data();
    emit.plan.ranges = Memory<RelativeRange>(range_first.back());
    emit.plan.range_tiles = Memory<uint32_t>(range_first.back() + count);
    emit.plan.columns = Memory<uint32_t>(column_first.back());
    EXPECT_TRUE(kernels_.EmitLines(emit).ok());
    std::vector<HeadPlan> out(count);
    for (size_t i = 0; i < count; ++i) {
      const LineTry& kept = args.kept.results[i];
      if (kept.is_complete == 0) continue;
      out[i].kind = HeadKind::kRanges;
      out[i].captured = static_cast<double>(kept.captured) / kept.mass;
      out[i].ranges.assign(emit.plan.ranges + range_first[i],
                           emit.plan.ranges + range_first[i + 1]);
      out[i].columns.assign(emit.plan.columns + column_first[i],
                            emit.plan.columns + column_first[i + 1]);
      const HeadCost cost =
          CostOf(out[i].ranges, out[i].columns, cases[i].prefill, DenseFallback::kWhereCheaper);
      EXPECT_EQ(kept.tiles, cost.tiles);
      EXPECT_EQ(kept.eighths, cost.eighths);
      EXPECT_EQ(kept.dense_tiles, cost.dense_tiles);
      uint32_t tiles = 0;
      for (size_t r = 0; r <= out[i].ranges.size(); ++r) {
        EXPECT_EQ(emit.plan.range_tiles[range_first[i] + i + r], tiles);
        if (r == out[i].ranges.size()) break;
        tiles += KeyTilesOf(static_cast<uint32_t>(out[i].ranges[r].hi - out[i].ranges[r].lo));
      }
    }
    return out;
  }

  std::mt19937_64 random_{Seed()};
  ImitatedSparseKernels kernels_{random_()};
  std::vector<std::unique_ptr<AlignedMemory>> memory_;
  uint32_t sparse_ = 0;

  void Run(uint32_t tokens, const std::vector<Line>& lines) {
    SCOPED_TRACE(::testing::Message() << tokens << " tokens");
    const TokenRange prefill{Below(std::max(1u, tokens / 3)), tokens};
    std::vector<Case> cases;
    for (size_t i = 0; i < lines.size(); ++i) cases.push_back(Made(prefill));
    const std::vector<HeadPlan> got = OfKernels(cases, lines);
    for (size_t i = 0; i < lines.size(); ++i) {
      SCOPED_TRACE(i);
      const HeadPlan want = OfHost(cases[i], lines[i]);
      ASSERT_EQ(got[i].kind, want.kind);
      if (want.kind == HeadKind::kDense) continue;
      ++sparse_;
      EXPECT_EQ(got[i].ranges, want.ranges);
      EXPECT_EQ(got[i].columns, want.columns);
      EXPECT_NEAR(got[i].captured, want.captured, 1e-9);
    }
  }
};

TEST_F(LineTriesTest, NumbersOfLines) {
  for (const uint32_t tokens : {1u, 2u, 31u, 100u, 129u, 700u, 2048u, 3333u}) {
    std::vector<Line> lines;
    for (const auto& [columns, slashes] : {std::pair{0u, 0u},
                                           {1u, 1u},
                                           {30u, 100u},
                                           {31u, 101u},
                                           {200u, 104u},
                                           {64u, 140u},
                                           {5000u, 0u},
                                           {0u, 5000u}}) {
      lines.push_back({static_cast<uint32_t>(lines.size()), columns, slashes, 0, 0});
    }
    for (int i = 0; i < 4; ++i) {
      lines.push_back({static_cast<uint32_t>(lines.size()), Below(tokens + 10),
                       Below(std::min(tokens, 300u)), 0, 0});
    }
    Run(tokens, lines);
  }
  EXPECT_GT(sparse_, 10u);
}

TEST_F(LineTriesTest, Masses) {
  for (const uint32_t tokens : {1u, 90u, 129u, 700u, 1500u + Below(500), 2500u}) {
    std::vector<Line> lines;
    for (const double mass : {0.05, 0.3, 0.6, 0.9, 1.0}) {
      for (const double share : {0.3, 1.0}) {
        lines.push_back({static_cast<uint32_t>(lines.size()), 0, 0, mass, share});
      }
    }
    Run(tokens, lines);
  }
  EXPECT_GT(sparse_, 10u);
}

}  // namespace
}  // namespace quarry::cuda

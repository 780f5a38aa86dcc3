// What patterns choose, against plain loops in double; budgets; chunks.
#include "gpu/sparse/build_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>
#include <set>
#include <vector>

#include "tests/gpu/sparse/sparse_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::Attends;
using testing::SparseCase;

// What the last queries attend, by key and by distance.
struct Lines {
  std::vector<double> columns, slashes;
};

Lines LinesOf(const SparseCase& c, uint32_t head) {
  const uint32_t tokens = c.tokens(), queries = std::min(c.shape().rows, 64u);
  Lines out{std::vector<double>(tokens, 0.0), std::vector<double>(tokens, 0.0)};
  for (uint32_t row = c.shape().rows - queries; row < c.shape().rows; ++row) {
    const uint32_t token = c.shape().first_token + row;
    std::vector<double> p(token + 1);
    double sum = 0;
    for (uint32_t j = 0; j <= token; ++j) sum += p[j] = std::exp(c.Score(row, head, j));
    for (uint32_t j = 0; j <= token; ++j) {
      out.columns[j] += p[j] / sum;
      out.slashes[token - j] += p[j] / sum;
    }
  }
  return out;
}

// The best `count` of the scores, the first `forced` before all.
std::set<uint32_t> Best(std::vector<double> scores, uint32_t count, uint32_t forced) {
  for (uint32_t i = 0; i < std::min<size_t>(forced, scores.size()); ++i) scores[i] = 1e9 - i;
  std::vector<uint32_t> order(scores.size());
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return scores[a] > scores[b]; });
  order.resize(std::min<size_t>(count, order.size()));
  return {order.begin(), order.end()};
}

// The sum of the scores of some.
template <typename Set>
double Worth(const std::vector<double>& scores, const Set& chosen) {
  double sum = 0;
  for (const uint32_t i : chosen) sum += scores[i];
  return sum;
}

class BuildIndexTest : public ::testing::Test {
 protected:
  HeadPlan Plan(const SparseCase& c, const Pattern& pattern, DenseFallback fallback) {
    const std::vector<HeadPattern> patterns(c.shape().heads, HeadPattern{pattern});
    return PlanHeads({c.layer(), c.prefill(), patterns, c.last_q(), fallback}, &team_)[0];
  }
  SparseIndex Index(const SparseCase& c, const Pattern& pattern, DenseFallback fallback) {
    const std::vector<HeadPattern> patterns(c.shape().heads, HeadPattern{pattern});
    const auto plans = PlanHeads({c.layer(), c.prefill(), patterns, c.last_q(), fallback}, &team_);
    return BuildIndex(
        plans, {c.layer(), c.shape().first_token, c.shape().rows, c.q().data(), fallback}, &team_);
  }
  // The share of the last queries' mass that an index attends, by its mask.
  static double MassOfLast(const SparseCase& c, const SparseIndex& index, uint32_t head) {
    const uint32_t queries = std::min(c.shape().rows, 64u);
    double mass = 0;
    for (uint32_t row = c.shape().rows - queries; row < c.shape().rows; ++row) {
      const uint32_t token = c.shape().first_token + row;
      mass += c.Attend(row, head, [&](uint32_t j) { return Attends(index, head, token, j); }).mass;
    }
    return mass / queries;
  }
  // Queries that attend keys at `distances`, and `columns`; the weight of each.
  void PlantLines(SparseCase* c, std::span<const uint32_t> distances,
                  std::span<const uint32_t> columns, double strength) {
    const uint32_t d = c->shape().head_dim, half = d / 2 - 1;
    std::vector<double> speed(half);
    for (double& w : speed) {
      w = std::uniform_real_distribution<double>(0, std::numbers::pi)(random_);
    }
    const double size = std::sqrt(strength * std::sqrt(double{1} * d) / half);
    for (uint32_t h = 0; h < c->shape().heads; ++h) {
      for (uint32_t row = 0; row < c->shape().rows; ++row) {
        for (uint32_t i = 0; i < half; ++i) {
          double cosine = 0, sine = 0;
          for (const uint32_t s : distances) {
            const double at = speed[i] * (double{1} * c->shape().first_token + row - s);
            cosine += std::cos(at);
            sine += std::sin(at);
          }
          c->Query(row, h)[2 * i] = static_cast<float>(size * cosine);
          c->Query(row, h)[2 * i + 1] = static_cast<float>(size * sine);
        }
        c->Query(row, h)[d - 2] = static_cast<float>(std::sqrt(strength * std::sqrt(1.0 * d)));
        c->Query(row, h)[d - 1] = 0;
      }
      for (uint32_t j = 0; j < c->tokens(); ++j) {
        for (uint32_t i = 0; i < half; ++i) {
          c->SetKey(h, j, 2 * i, static_cast<float>(size * std::cos(speed[i] * j)));
          c->SetKey(h, j, 2 * i + 1, static_cast<float>(size * std::sin(speed[i] * j)));
        }
        const bool column = std::find(columns.begin(), columns.end(), j) != columns.end();
        c->SetKey(h, j, d - 2,
                  column ? static_cast<float>(std::sqrt(strength * std::sqrt(1.0 * d))) : 0.0f);
        c->SetKey(h, j, d - 1, 0);
      }
    }
  }

  std::mt19937_64 random_{SteadySeed()};
  ThreadTeam team_{2};
};

TEST_F(BuildIndexTest, AShapeIsSinksAndAWindow) {
  const SparseCase c({DType::kFp32, 1, 1, 64, 50, 1000}, &random_);
  const SparseIndex index = Index(c, AShapePattern{70, 200}, DenseFallback::kNever);
  for (const uint32_t i : {50u, 51u, 177u, 178u, 305u, 306u, 433u, 700u, 1048u, 1049u}) {
    const uint32_t i0 = 50 + (i - 50) / 128 * 128;
    uint32_t in = 0;
    for (uint32_t j = 0; j <= i; ++j) {
      const bool attends = Attends(index, 0, i, j);
      in += attends;
      if (j < 70 || j + 200 > i) {
        EXPECT_TRUE(attends) << i << " " << j;
      }
      // And the rest of what the row tile reads for its first row, to a whole tile.
      if (j >= 70 && j + 199 + 64 <= i0 && i0 > 600) {
        EXPECT_FALSE(attends) << i << " " << j;
      }
    }
    EXPECT_LE(in, 70 + 200 + 128 + 63 + 200);
  }
}

TEST_F(BuildIndexTest, VerticalSlashTakesTheBestOfEach) {
  for (const auto& [first, rows] : {std::pair{0u, 900u}, {0u, 130u}, {333u, 520u}, {500u, 20u}}) {
    const SparseCase c({DType::kBf16, 2, 1, 64, first, rows}, &random_);
    const Lines lines = LinesOf(c, 0);
    const HeadPlan plan = Plan(c, VerticalSlashPattern{80, 140}, DenseFallback::kNever);
    const std::set<uint32_t> columns = Best(lines.columns, 80, 30);
    const std::set<uint32_t> slashes = Best(lines.slashes, 140, 100);
    // Nearly equal ones may change places by rounding; what they are worth together does not.
    EXPECT_EQ(plan.columns.size(), columns.size());
    EXPECT_NEAR(Worth(lines.columns, plan.columns), Worth(lines.columns, columns), 1e-5);
    for (uint32_t j = 0; j < 30; ++j) EXPECT_EQ(plan.columns[j], j);
    // Ranges are of the slashes; one in the other order of a tie may show.
    const std::vector<uint32_t> rising(slashes.begin(), slashes.end());
    const std::vector<RelativeRange> ranges = RangesOfSlashes(rising);
    EXPECT_EQ(plan.ranges, ranges);
    const SparseIndex index = Index(c, VerticalSlashPattern{80, 140}, DenseFallback::kNever);
    EXPECT_NEAR(plan.captured, MassOfLast(c, index, 0), 1e-4);
    for (uint32_t row = 0; row < rows; row += 17) {
      for (const uint32_t s : slashes) {
        if (s <= first + row) {
          ASSERT_TRUE(Attends(index, 0, first + row, first + row - s)) << row << " " << s;
        }
      }
    }
  }
}

TEST_F(BuildIndexTest, PlantedLinesAreFound) {
  SparseCase c({DType::kFp32, 1, 1, 128, 0, 3000}, &random_);
  const std::vector<uint32_t> slashes = {317, 1200, 2222}, columns = {500, 901, 1300};
  PlantLines(&c, slashes, columns, 9);
  const HeadPlan plan = Plan(c, VerticalSlashPattern{60, 300}, DenseFallback::kNever);
  for (const uint32_t j : columns) {
    EXPECT_TRUE(std::binary_search(plan.columns.begin(), plan.columns.end(), j)) << j;
  }
  for (const uint32_t s : slashes) {
    EXPECT_TRUE(std::any_of(plan.ranges.begin(), plan.ranges.end(), [s](const RelativeRange& r) {
      return r.lo <= -static_cast<int32_t>(s) && 128 - static_cast<int32_t>(s) <= r.hi;
    })) << s;
  }
  EXPECT_GT(plan.captured, 0.5);
}

TEST_F(BuildIndexTest, AskedMassIsCapturedOrAllIsDense) {
  int sparse = 0, dense = 0;
  for (const double mass : {0.3, 0.8, 0.95, 0.999}) {
    for (const double share : {0.05, 0.3, 1.0}) {
      for (const bool planted : {false, true}) {
        SparseCase c({DType::kFp32, 1, 1, 64, static_cast<uint32_t>(random_() % 300), 2000},
                     &random_);
        if (planted) PlantLines(&c, std::vector<uint32_t>{700, 1500}, std::vector<uint32_t>{}, 8);
        const VerticalSlashMassPattern pattern{mass, share};
        const SparseIndex index = Index(c, pattern, DenseFallback::kWhereCheaper);
        const HeadPlan plan = Plan(c, pattern, DenseFallback::kWhereCheaper);
        if (index.kind[0] == HeadKind::kDense) {
          ++dense;
          EXPECT_EQ(index.Cost(), index.DenseHeadCost());
          continue;
        }
        ++sparse;
        const double got = MassOfLast(c, index, 0);
        EXPECT_GE(got, mass - 1e-5);
        EXPECT_NEAR(got, plan.captured, 1e-4);
        EXPECT_LE(static_cast<double>(index.Cost()),
                  share * static_cast<double>(index.DenseHeadCost()));
      }
    }
  }
  EXPECT_GT(sparse, 3);
  EXPECT_GT(dense, 3);
}

TEST_F(BuildIndexTest, MassIsBoughtWhereItIsCheap) {
  // All mass on two slashes: few tiles. On scattered columns: none of its ranges help.
  SparseCase slashes({DType::kFp32, 1, 1, 128, 0, 4000}, &random_);
  PlantLines(&slashes, std::vector<uint32_t>{1000, 2500}, std::vector<uint32_t>{}, 14);
  const SparseIndex a =
      Index(slashes, VerticalSlashMassPattern{0.9, 1}, DenseFallback::kWhereCheaper);
  ASSERT_EQ(a.kind[0], HeadKind::kRanges);
  EXPECT_LT(a.Cost() * 3, a.DenseHeadCost());
  SparseCase columns({DType::kFp32, 1, 1, 128, 0, 4000}, &random_);
  PlantLines(&columns, std::vector<uint32_t>{}, std::vector<uint32_t>{900, 1800, 2700}, 14);
  const SparseIndex b =
      Index(columns, VerticalSlashMassPattern{0.9, 1}, DenseFallback::kWhereCheaper);
  ASSERT_EQ(b.kind[0], HeadKind::kRanges);
  EXPECT_EQ(b.ranges.size(), 1u);  // the local slashes alone
  for (const uint32_t j : {900u, 1800u, 2700u}) {
    EXPECT_TRUE(std::binary_search(b.columns.begin(), b.columns.end(), j));
  }
}

TEST_F(BuildIndexTest, BlocksAreThoseOfPlainLoops) {
  for (const auto& [first, rows] : {std::pair{0u, 1000u}, {77u, 900u}, {640u, 129u}}) {
    const SparseCase c({DType::kFp32, 1, 1, 64, first, rows}, &random_);
    const uint32_t d = 64, tokens = first + rows;
    // Mean keys, of what a block has before the row tile's end.
    std::vector<double> means;
    const auto set_means = [&](uint32_t end) {
      means.assign(size_t{(end + 63) / 64} * d, 0.0);
      for (uint32_t j = 0; j < end; ++j) {
        const uint32_t b = j / 64;
        for (uint32_t i = 0; i < d; ++i) {
          means[b * d + i] += double{c.Key(0, j, i)} / (std::min((b + 1) * 64, end) - b * 64);
        }
      }
    };
    const auto score = [&](const std::vector<double>& q, uint32_t b) {
      double z = 0;
      for (uint32_t i = 0; i < d; ++i) z += q[i] * means[b * d + i];
      return z / 8;
    };
    const SparseIndex pooled = Index(c, BlockSparsePattern{7}, DenseFallback::kNever);
    const SparseIndex scored = Index(c, BlockScoredPattern{0.4}, DenseFallback::kNever);
    for (uint32_t t = 0; t < pooled.row_tiles(); ++t) {
      const uint32_t i0 = first + 128 * t, i1 = std::min(i0 + 128, tokens);
      set_means(i1);
      std::vector<double> weight((i1 + 63) / 64, 0.0);
      for (uint32_t lo = i0; lo < i1; lo += 64) {
        std::vector<double> q(d, 0.0), p;
        const uint32_t hi = std::min(lo + 64, i1);
        for (uint32_t i = lo; i < hi; ++i) {
          for (uint32_t e = 0; e < d; ++e) q[e] += c.Query(i - first, 0)[e] / (1.0 * hi - lo);
        }
        double sum = 0;
        for (uint32_t b = 0; b < (hi + 63) / 64; ++b) sum += p.emplace_back(std::exp(score(q, b)));
        for (uint32_t b = 0; b < p.size(); ++b) weight[b] += p[b] / sum;
      }
      std::set<uint32_t> want = {0};
      for (uint32_t b = i0 / 64; b < (i1 + 63) / 64; ++b) want.insert(b);
      std::vector<uint32_t> order(weight.size());
      for (uint32_t b = 0; b < order.size(); ++b) order[b] = b;
      std::stable_sort(order.begin(), order.end(),
                       [&](uint32_t a, uint32_t b) { return weight[a] > weight[b]; });
      for (const uint32_t b : order) {
        if (want.size() < 7) want.insert(b);
      }
      if (!pooled.IsDense(0, t)) {
        const auto got = pooled.BlocksOf(0, t);
        ASSERT_EQ(got.size(), want.size());
        EXPECT_NEAR(Worth(weight, got), Worth(weight, want), 1e-5);
        EXPECT_TRUE(std::is_sorted(got.begin(), got.end()));
      }
      if (scored.IsDense(0, t)) continue;
      for (uint32_t b = 0; b < weight.size(); ++b) {
        double best = -1e9;  // by how much a row's score for the block passes the least
        for (uint32_t i = i0; i < i1; ++i) {
          if (b * 64 > i) continue;
          const std::vector<double> q(c.Query(i - first, 0), c.Query(i - first, 0) + d);
          double most = -1e9;
          for (uint32_t other = 0; other * 64 <= i; ++other) most = std::max(most, score(q, other));
          best = std::max(best, score(q, b) - most - std::log(0.4));
        }
        const auto blocks = scored.BlocksOf(0, t);
        const bool in = std::find(blocks.begin(), blocks.end(), b) != blocks.end();
        if (b == 0 || b >= i0 / 64 || best > 1e-4) {
          EXPECT_TRUE(in) << t << " " << b;
        } else if (best < -1e-4) {
          EXPECT_FALSE(in) << t << " " << b;
        }
      }
    }
  }
}

TEST_F(BuildIndexTest, ChunksDoNotShow) {
  const SparseCase c({DType::kBf16, 6, 2, 64, 200, 1500}, &random_);
  const std::vector<HeadPattern> patterns = {{DensePattern{}},
                                             {AShapePattern{70, 100}},
                                             {VerticalSlashPattern{60, 120}},
                                             {VerticalSlashMassPattern{0.5, 1}},
                                             {BlockSparsePattern{5}},
                                             {BlockScoredPattern{0.8}}};
  for (const auto fallback : {DenseFallback::kNever, DenseFallback::kWhereCheaper}) {
    const auto plans = PlanHeads({c.layer(), c.prefill(), patterns, c.last_q(), fallback}, &team_);
    const SparseIndex whole =
        BuildIndex(plans, {c.layer(), 200, 1500, c.q().data(), fallback}, &team_);
    for (uint32_t lo = 0; lo < 1500; lo += 384) {
      const uint32_t rows = std::min(384u, 1500 - lo);
      const SparseIndex chunk =
          BuildIndex(plans, {c.layer(), 200 + lo, rows, c.Query(lo, 0), fallback}, &team_);
      for (uint32_t h = 0; h < 6; ++h) {
        for (uint32_t t = 0; t < chunk.row_tiles(); ++t) {
          RowTileKeys a, b;
          RowTileKeysOf(chunk, h, t, &a);
          RowTileKeysOf(whole, h, lo / 128 + t, &b);
          EXPECT_EQ(a.ranges, b.ranges) << h << " " << lo << " " << t;
          EXPECT_EQ(a.columns, b.columns);
          EXPECT_EQ(a.rows, b.rows);
        }
      }
    }
  }
}

TEST_F(BuildIndexTest, ShortPrefillsAreDenseByThemselves) {
  for (const uint32_t rows : {1u, 100u, 400u}) {
    const SparseCase c({DType::kFp32, 1, 1, 64, 0, rows}, &random_);
    for (const Pattern& pattern :
         {Pattern(AShapePattern{1024, 4096}), Pattern(VerticalSlashPattern{1000, 200}),
          Pattern(VerticalSlashMassPattern{0.9, 1}), Pattern(BlockSparsePattern{100})}) {
      const SparseIndex index = Index(c, pattern, DenseFallback::kWhereCheaper);
      EXPECT_EQ(index.Cost(), index.DenseHeadCost()) << PatternText(pattern) << " " << rows;
    }
  }
}

TEST_F(BuildIndexTest, SparseCostsLessOrIsDense) {
  for (int round = 0; round < 12; ++round) {
    const SparseCase c({DType::kFp32, 1, 1, 64, static_cast<uint32_t>(random_() % 400),
                        200 + static_cast<uint32_t>(random_() % 3000)},
                       &random_);
    const auto some = [this](uint32_t below) { return static_cast<uint32_t>(random_() % below); };
    for (const Pattern& pattern : {Pattern(AShapePattern{some(2000), 1 + some(2000)}),
                                   Pattern(VerticalSlashPattern{some(1000), some(1000)}),
                                   Pattern(VerticalSlashMassPattern{0.1 + 0.01 * some(90), 1}),
                                   Pattern(BlockSparsePattern{1 + some(40)})}) {
      const SparseIndex index = Index(c, pattern, DenseFallback::kWhereCheaper);
      if (index.kind[0] == HeadKind::kDense) continue;
      for (uint32_t t = 0; t < index.row_tiles(); ++t) {
        if (index.IsDense(0, t)) continue;
        EXPECT_LT(9 * index.tiles[t], 8 * index.DenseTiles(t)) << PatternText(pattern);
      }
    }
  }
}

}  // namespace
}  // namespace quarry

// What prefill_bench is made of: its heads are what they are said to be, and it counts right.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "gpu/sparse/captured.h"
#include "perf/prefill/fidelity.h"
#include "perf/prefill/measure_layer.h"
#include "perf/prefill/oracle.h"
#include "perf/prefill/pattern_fit.h"
#include "perf/prefill/plan_tiles.h"
#include "proto/half.h"

namespace quarry::perf {
namespace {

using ::testing::ElementsAre;

const LayerShape& ShapeOf(std::string_view name) {
  const auto shape = std::find_if(LayerShapes().begin(), LayerShapes().end(),
                                  [&](const LayerShape& s) { return s.name == name; });
  EXPECT_NE(shape, LayerShapes().end());
  return *shape;
}

MadeLayer::Options Small(uint32_t tokens, uint32_t seed = 1) {
  return {ShapeOf("small"), DType::kBf16, tokens, seed};
}

class PrefillMeasuringTest : public ::testing::Test {
 protected:
  ThreadTeam team_{2};
};

TEST_F(PrefillMeasuringTest, RowsAreTheSameHoweverTheyAreAskedFor) {
  const MadeLayer layer(Small(1000), &team_), same(Small(1000), &team_),
      other(Small(1000, 2), &team_);
  const LayerKv& kv = layer.kv();
  const size_t bytes = kv.kv.head_stride * kv.kv_heads, width = size_t{kv.heads} * kv.head_dim;
  for (const auto side : {&LayerKv::Keys, &LayerKv::Values}) {
    const auto all = [&](const MadeLayer& l) { return std::span((l.kv().*side)(0), bytes); };
    EXPECT_TRUE(std::ranges::equal(all(layer), all(same)));
    EXPECT_FALSE(std::ranges::equal(all(layer), all(other)));
  }
  const std::vector<MadeHead> kinds = MadeHeads("mixed", kv.heads);
  std::vector<float> rows(40 * width), some(2 * width);
  layer.Queries(kinds, TokenRange{700, 740}, rows.data(), &team_);
  same.Queries(kinds, std::vector<uint32_t>{703, 739}, some.data(), &team_);
  for (const auto& [row, at] : {std::pair{3, 0}, {39, 1}}) {
    EXPECT_TRUE(std::equal(&rows[row * width], &rows[row * width] + width, &some[at * width]));
  }
}

TEST_F(PrefillMeasuringTest, OraclesNeedWhatKindsOfHeadsAreSaidTo) {
  for (const char* const shape : {"llama-3-8b", "phi-3-mini"}) {
    MadeLayer::Options options{ShapeOf(shape), DType::kBf16, 32768, 1};
    options.shape.heads = 16;
    options.shape.kv_heads = 4;
    const MadeLayer layer(options, &team_);
    const std::vector<MadeHead> kinds = MadeHeads("mixed", 16);
    const std::vector<OracleShare> oracle =
        OracleShares(layer, kinds, SampledRowTiles(32768, 4), kOracleMass, &team_);
    for (size_t h = 0; h < kinds.size(); ++h) {
      SCOPED_TRACE(std::string(shape) + ", " + std::string(MadeHeadName(kinds[h])) + " head " +
                   std::to_string(h));
      EXPECT_LE(oracle[h].tiles, oracle[h].blocks);
      switch (kinds[h]) {
        case MadeHead::kLines:
          EXPECT_GT(oracle[h].tiles, 0.04);
          EXPECT_LT(oracle[h].tiles, 0.08);
          EXPECT_GT(oracle[h].blocks, 2 * oracle[h].tiles);  // columns are scattered
          break;
        case MadeHead::kLocal:
          EXPECT_LT(oracle[h].tiles, 0.03);
          break;
        case MadeHead::kBlocks:
          EXPECT_GT(oracle[h].tiles, 0.03);
          EXPECT_LT(oracle[h].tiles, 0.12);
          EXPECT_LT(oracle[h].blocks, 2 * oracle[h].tiles);
          break;
        case MadeHead::kDiffuse:
          EXPECT_GT(oracle[h].tiles, 0.8);
          break;
      }
    }
  }
}

// Of the middle row tile's rows by hand, from the weights themselves.
TEST_F(PrefillMeasuringTest, AnOracleTakesTheHeaviestKeysOfARowTile) {
  const MadeLayer layer(Small(700), &team_);
  const LayerKv& kv = layer.kv();
  const std::vector<MadeHead> kinds = MadeHeads("mixed", kv.heads);
  const uint32_t t = 3;
  const TokenRange rows{t * kRowTile, (t + 1) * kRowTile};
  std::vector<float> q(size_t{kRowTile} * kv.heads * kv.head_dim);
  layer.Queries(kinds, rows, q.data(), &team_);
  const std::vector<OracleShare> oracle =
      OracleShares(layer, kinds, std::vector<uint32_t>{t}, 0.9, &team_);
  for (uint32_t h = 0; h < kv.heads; ++h) {
    std::vector<double> mass(rows.hi, 0.0), blocks(KeyTilesOf(rows.hi), 0.0);
    for (uint32_t r = 0; r < kRowTile; ++r) {
      std::vector<double> weight(rows.lo + r + 1);
      for (uint32_t j = 0; j < weight.size(); ++j) {
        double dot = 0;
        for (uint32_t i = 0; i < kv.head_dim; ++i) {
          dot += double{q[(size_t{r} * kv.heads + h) * kv.head_dim + i]} *
                 LoadAsFloat(kv.Keys(h), size_t{j} * kv.head_dim + i, kv.dtype);
        }
        weight[j] = std::exp(dot / std::sqrt(1.0 * kv.head_dim));
      }
      const double sum = std::accumulate(weight.begin(), weight.end(), 0.0);
      for (uint32_t j = 0; j < weight.size(); ++j) {
        mass[j] += weight[j] / sum;
        blocks[j / kKeyTile] += weight[j] / sum;
      }
    }
    const auto fewest = [](std::vector<double> of) {
      std::sort(of.rbegin(), of.rend());
      uint32_t n = 0;
      for (double sum = 0; sum < 0.9 * kRowTile; ++n) sum += of[n];
      return n;
    };
    const double dense = KeyTilesOf(rows.hi);
    EXPECT_DOUBLE_EQ(oracle[h].tiles, KeyTilesOf(fewest(mass)) / dense) << "head " << h;
    EXPECT_DOUBLE_EQ(oracle[h].blocks, fewest(blocks) / dense) << "head " << h;
  }
}

TEST_F(PrefillMeasuringTest, SamplesAreSpreadAndEndWithTheLastRows) {
  EXPECT_THAT(SampledRowTiles(1024, 4), ElementsAre(1, 3, 5, 7));
  EXPECT_THAT(SampledRowTiles(1100, 3), ElementsAre(1, 4, 7));
  EXPECT_THAT(SampledRowTiles(300, 8), ElementsAre(0, 1));
  const std::vector<uint32_t> rows = FidelityRows(464, 4);
  ASSERT_EQ(rows.size(), 68u);
  EXPECT_THAT(std::vector<uint32_t>(rows.begin(), rows.begin() + 5),
              ElementsAre(50, 150, 250, 350, 400));
  EXPECT_EQ(rows.back(), 463u);
}

class PlannedLayerTest : public PrefillMeasuringTest {
 protected:
  static constexpr uint32_t kTokens = 3000;
  PlannedLayerTest() {
    absl::StatusOr<LayerOnDevice> put = LayerOnDevice::Put(device_.get(), layer_, kTokens);
    EXPECT_TRUE(put.ok()) << put.status();
    at_ = std::make_unique<LayerOnDevice>(*std::move(put));
    EXPECT_TRUE(at_->PutLastQueries(kinds_, &team_).ok());
    EXPECT_TRUE(at_->PutRows(kinds_, {0, kTokens}, &team_).ok());
  }
  // plan_ too.
  std::vector<HeadPlan> Planned(std::span<const HeadPattern> patterns) {
    EXPECT_TRUE(at_->Plan(patterns, &plan_).ok());
    return LayerOnDevice::HeadsOf(plan_).value();
  }
  // As attention of all rows has it.
  SparseIndex IndexOf(std::span<const HeadPlan> plan) {
    std::vector<float> q(size_t{kTokens} * layer_.kv().heads * layer_.kv().head_dim);
    layer_.Queries(kinds_, TokenRange{0, kTokens}, q.data(), &team_);
    return BuildIndex(plan, {layer_.kv(), 0, kTokens, q.data()}, &team_);
  }

  const std::unique_ptr<Device> device_ = MakeHostDevice({});
  const MadeLayer layer_{Small(kTokens), &team_};
  const std::vector<MadeHead> kinds_ = MadeHeads("mixed", layer_.kv().heads);
  std::unique_ptr<LayerOnDevice> at_;
  LayerPlan plan_;
};

TEST_F(PlannedLayerTest, TilesAreThoseOfTheIndex) {
  const std::vector<HeadPattern> patterns = {
      {DensePattern{}},         {AShapePattern{64, 300}},   {VerticalSlashPattern{100, 110}},
      {BlockSparsePattern{9}},  {BlockScoredPattern{0.01}}, {VerticalSlashMassPattern{0.9, 1}},
      {BlockSparsePattern{20}}, {AShapePattern{8, 1500}}};
  const std::vector<HeadPlan> plan = Planned(patterns);
  const SparseIndex index = IndexOf(plan);
  std::vector<uint32_t> all(kTokens / kRowTile);
  std::iota(all.begin(), all.end(), 0u);
  const std::vector<double> tiles = PlanTiles(layer_, kinds_, all, &team_).Of(plan, &team_);
  EXPECT_EQ(PlanTiles::Dense({0, kTokens}), static_cast<double>(index.DenseHeadCost()));
  for (uint32_t h = 0; h < patterns.size(); ++h) {
    // The last row tile, which is not whole, is not among the sampled ones of block patterns.
    const bool blocks = plan[h].kind == HeadKind::kBlocks;
    EXPECT_NEAR(tiles[h], static_cast<double>(index.HeadCost(h)), blocks ? 0.06 * tiles[h] : 0)
        << PatternText(patterns[h].pattern);
  }
}

TEST_F(PlannedLayerTest, PatternsAreFittedToShares) {
  const PlanTiles tiles(layer_, kinds_, SampledRowTiles(kTokens, 6), &team_);
  const double dense = PlanTiles::Dense({0, kTokens});
  std::vector<double> shares;
  for (uint32_t h = 0; h < layer_.kv().heads; ++h) shares.push_back(0.3 + 0.05 * h);
  for (const std::string& name : FittedPatterns()) {
    const auto patterns = FitPatterns(name, shares, at_.get(), tiles, &team_);
    ASSERT_TRUE(patterns.ok()) << patterns.status();
    const std::vector<double> run = tiles.Of(Planned(*patterns), &team_);
    for (uint32_t h = 0; h < shares.size(); ++h) {
      EXPECT_TRUE(name.starts_with(PatternName((*patterns)[h].pattern))) << name;
      // The queries of a diffuse head ask for a block of their own each, whatever the threshold,
      // and no few lines have much of its mass.
      const bool diffuse = kinds_[h] == MadeHead::kDiffuse;
      if (diffuse && (name == "block_scored" || name == kLinesByMass)) continue;
      EXPECT_LE(run[h], shares[h] * dense) << name << " head " << h;
      EXPECT_GE(run[h], 0.7 * shares[h] * dense) << name << " head " << h;
    }
  }
}

TEST_F(PlannedLayerTest, FidelityIsThatOfAnswers) {
  const std::vector<HeadPattern> patterns(layer_.kv().heads, {AShapePattern{4, 200}});
  const std::vector<HeadPlan> plan = Planned(patterns);
  ASSERT_TRUE(at_->AttendSparse(plan_).ok());
  const std::vector<uint32_t> rows = {600, 1500, 2990};
  const ExactRows exact(layer_, kinds_, rows, &team_);
  std::vector<float> o(size_t{layer_.kv().heads} * layer_.kv().head_dim), lse(layer_.kv().heads);
  std::vector<CapturedSums> sums(lse.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    ASSERT_TRUE(at_->Read(rows[r], o, lse).ok());
    exact.meter().Add(r, o, lse, sums);
  }
  std::vector<float> q(rows.size() * o.size());
  layer_.Queries(kinds_, rows, q.data(), &team_);
  const std::vector<Captured> want = CaptureMeter(layer_.kv(), {0, kTokens}, rows, q.data(), &team_)
                                         .Measure(IndexOf(plan), &team_);
  for (size_t h = 0; h < sums.size(); ++h) {
    const Fidelity got = Of(std::span(&sums[h], 1));
    EXPECT_EQ(got.answers, rows.size());
    EXPECT_NEAR(got.mass, want[h].mass, 1e-5);
    EXPECT_NEAR(got.least_mass, want[h].least_mass, 1e-5);
    EXPECT_NEAR(got.error, want[h].error, 1e-5);
  }
  EXPECT_LT(Of(sums).mass, 0.9);
  ASSERT_TRUE(at_->AttendDense(kTokens).ok());
  std::vector<CapturedSums> dense(lse.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    ASSERT_TRUE(at_->Read(rows[r], o, lse).ok());
    exact.meter().Add(r, o, lse, dense);
  }
  EXPECT_GT(Of(dense).least_mass, 0.99999);
  EXPECT_LT(Of(dense).error, 1e-5);
}

// The rows that dense attention is measured by where the whole would take too long.
TEST_F(PlannedLayerTest, TheLastRowsAloneAreAttendedAsAmongAll) {
  std::vector<float> o(size_t{layer_.kv().heads} * layer_.kv().head_dim), lse(layer_.kv().heads);
  std::vector<float> again(o.size()), lse_again(lse.size());
  ASSERT_TRUE(at_->AttendDense(kTokens).ok());
  ASSERT_TRUE(at_->Read(2900, o, lse).ok());
  ASSERT_TRUE(at_->PutRows(kinds_, {2048, kTokens}, &team_).ok());
  ASSERT_TRUE(at_->AttendDense(128).ok());
  ASSERT_TRUE(at_->Read(2900, again, lse_again).ok());
  EXPECT_EQ(o, again);
  EXPECT_EQ(lse, lse_again);
}

}  // namespace
}  // namespace quarry::perf

// The kernels over coded keys and nodes: every instruction set gives what the layouts say.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu_index/kernels.h"
#include "cpu_index/simd.h"
#include "proto/half.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using kernels::kCodeBlockKeys;
using kernels::kCodeCoordinates;

constexpr uint32_t kStored = 90, kQueries = 5;
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A coded key's coordinate, from the layout's description.
int KeyCode(const uint8_t* block, uint32_t key, uint32_t c) {
  const uint8_t* const lane = block + 4 * key;
  if (c < 16) return lane[64 * (c / 8) + c % 4] >> (c % 8 / 4 * 4) & 15;
  const uint32_t e = c - 16;
  return lane[128 + 64 * (e / 16) + e % 4] >> (2 * (e % 16 / 4)) & 3;
}

// A centroid's, likewise.
int CentroidByte(const uint8_t* block, uint32_t key, uint32_t c) {
  return block[c / 4 * 64 + key * 4 + c % 4];
}

// What the kernels promise of a score.
double Bounded(double score) {
  if (std::isnan(score)) return kNone;
  return std::min(score, double{kernels::kMostScore});
}

// Stored blocks and queries, random.
class CodesKernelsTest : public ::testing::Test {
 protected:
  using Blocks = std::vector<uint32_t>;

  CodesKernelsTest() {
    codes_.resize(kStored * kernels::kCentroidBlockBytes);
    for (uint8_t& c : codes_) c = static_cast<uint8_t>(random_());
    weights_.resize(kQueries * kCodeCoordinates);
    for (int8_t& w : weights_) w = static_cast<int8_t>(random_());
    std::normal_distribution<float> normal;
    for (uint32_t i = 0; i < kQueries; ++i) {
      scale_.push_back(0.001f * (1 + static_cast<float>(i)));
      offset_.push_back(normal(random_));
      breadth_.push_back(std::exp(normal(random_)));
    }
    for (uint32_t at = 0; at < kStored * kCodeBlockKeys; ++at) {
      key_scale_.push_back(FloatToBf16(std::exp(normal(random_))));
      variance_.push_back(std::exp(2 * normal(random_)));
    }
    for (uint32_t at = 0; at < kQueries * kStored; ++at) centre_.push_back(3 * normal(random_));
  }

  // Blocks to take: the first `count` of them, or as many chosen ones, in no order and repeated.
  Blocks Taken(uint32_t count, bool chosen) {
    Blocks out(count);
    std::iota(out.begin(), out.end(), 0);
    for (uint32_t& b : out) b = chosen ? static_cast<uint32_t>(random_() % kStored) : b;
    return out;
  }
  // f(the blocks taken, what a tile's `which` is): every level is to be tried with each.
  template <typename F>
  void ForTaken(F&& f) {
    for (const uint32_t count : {0u, 1u, 2u, 7u, 37u}) {
      for (const bool chosen : {false, true}) {
        SCOPED_TRACE(std::to_string(count) + (chosen ? " chosen" : " first"));
        const Blocks blocks = Taken(count, chosen);
        f(blocks, chosen ? blocks.data() : nullptr);
      }
    }
  }

  int32_t Sum(uint32_t query, const uint8_t* block, uint32_t key, bool centroid) const {
    int32_t sum = 0;
    for (uint32_t c = 0; c < kCodeCoordinates; ++c) {
      const int code = centroid ? CentroidByte(block, key, c) : KeyCode(block, key, c);
      sum += weights_[query * kCodeCoordinates + c] * code;
    }
    return sum;
  }
  // In double, with the roundings that floats of these sizes may have made.
  struct Wanted {
    double score, rounding;
  };
  Wanted KeyScore(uint32_t query, const Blocks& blocks, size_t taken, uint32_t key) const {
    const uint32_t b = blocks[taken];
    const double above =
        double{scale_[query]} * Sum(query, codes_.data() + size_t{b} * 256, key, false);
    const double scale = Bf16ToFloat(key_scale_[b * kCodeBlockKeys + key]);
    const double centre = centre_[query * kStored + taken];
    const double rounding =
        1e-6 * ((std::abs(above) + std::abs(offset_[query])) * std::abs(scale) + std::abs(centre));
    return {Bounded((above + offset_[query]) * scale + centre), rounding};
  }
  Wanted NodeScore(uint32_t query, uint32_t block, uint32_t node) const {
    const double sum = double{scale_[query]} *
                       Sum(query, codes_.data() + size_t{block} * kernels::kCentroidBlockBytes,
                           node, true);
    const double spread =
        std::min<double>(double{variance_[block * kCodeBlockKeys + node]} * breadth_[query],
                         kernels::kMostNodeVariance);
    const double rounding = 1e-6 * (std::abs(sum) + std::abs(offset_[query]) + 6);
    return {Bounded(sum + offset_[query] + 0.5 * spread), rounding};
  }
  void ExpectScore(float got, const Wanted& wanted) const {
    if (std::isfinite(wanted.score) && wanted.score < kernels::kMostScore) {
      ASSERT_NEAR(got, wanted.score, wanted.rounding);
    } else {
      ASSERT_EQ(got, wanted.score);
    }
  }

  kernels::CodedKeyTile KeyTile(const Blocks& blocks, const uint32_t* which,
                                std::vector<float>* out) {
    out->assign(kQueries * blocks.size() * kCodeBlockKeys + 1, -1.0f);
    kernels::CodedKeyTile tile{};
    tile.codes = codes_.data();
    tile.key_scale = key_scale_.data();
    tile.which = which;
    tile.blocks = static_cast<uint32_t>(blocks.size());
    tile.weights = weights_.data();
    tile.scale = scale_.data();
    tile.offset = offset_.data();
    tile.queries = kQueries;
    tile.centre = centre_.data();
    tile.ld_centre = kStored;
    tile.out = out->data();
    tile.ld_out = blocks.size() * kCodeBlockKeys;
    return tile;
  }
  kernels::NodeTile NodesTile(const Blocks& blocks, const uint32_t* which,
                              std::vector<float>* out) {
    out->assign(kQueries * blocks.size() * kCodeBlockKeys + 1, -1.0f);
    kernels::NodeTile tile{};
    tile.centroids = codes_.data();
    tile.variance = variance_.data();
    tile.which = which;
    tile.blocks = static_cast<uint32_t>(blocks.size());
    tile.weights = weights_.data();
    tile.scale = scale_.data();
    tile.offset = offset_.data();
    tile.breadth = breadth_.data();
    tile.queries = kQueries;
    tile.out = out->data();
    tile.ld_out = blocks.size() * kCodeBlockKeys;
    return tile;
  }

  // Of a number of a tile's output.
  struct Place {
    uint32_t query;
    size_t taken;
    uint32_t lane;
  };
  static Place PlaceOf(size_t at, const Blocks& blocks) {
    const size_t row = blocks.size() * kCodeBlockKeys;
    return {static_cast<uint32_t>(at / row), at % row / kCodeBlockKeys,
            static_cast<uint32_t>(at % kCodeBlockKeys)};
  }
  void ExpectKeyScores() {
    ForTaken([&](const Blocks& blocks, const uint32_t* which) {
      for (const SimdLevel level : SupportedSimdLevels()) {
        SCOPED_TRACE(SimdLevelName(level));
        std::vector<float> out;
        KernelsOf(level).score_codes(KeyTile(blocks, which, &out));
        for (size_t at = 0; at + 1 < out.size(); ++at) {
          const Place p = PlaceOf(at, blocks);
          ExpectScore(out[at], KeyScore(p.query, blocks, p.taken, p.lane));
        }
        ASSERT_EQ(out.back(), -1.0f);
      }
    });
  }
  void ExpectNodeScores() {
    ForTaken([&](const Blocks& blocks, const uint32_t* which) {
      for (const SimdLevel level : SupportedSimdLevels()) {
        SCOPED_TRACE(SimdLevelName(level));
        std::vector<float> out;
        KernelsOf(level).score_nodes(NodesTile(blocks, which, &out));
        for (size_t at = 0; at + 1 < out.size(); ++at) {
          const Place p = PlaceOf(at, blocks);
          ExpectScore(out[at], NodeScore(p.query, blocks[p.taken], p.lane));
        }
        ASSERT_EQ(out.back(), -1.0f);
      }
    });
  }

  std::mt19937 random_{static_cast<uint32_t>(Seed())};
  std::vector<uint8_t> codes_;
  std::vector<int8_t> weights_;
  std::vector<uint16_t> key_scale_;
  std::vector<float> scale_, offset_, breadth_, variance_;
  std::vector<float> centre_;  // [queries][kStored], by the block's place among those taken
};

TEST_F(CodesKernelsTest, TheLargestCodesAndWeightsAddUp) {
  for (const int8_t weight : {int8_t{-128}, int8_t{127}}) {
    std::fill(codes_.begin(), codes_.end(), uint8_t{255});
    std::fill(weights_.begin(), weights_.end(), weight);
    for (const SimdLevel level : SupportedSimdLevels()) {
      std::vector<int32_t> out(kCodeBlockKeys * kQueries);
      KernelsOf(level).sum_codes(
          {codes_.data(), nullptr, 1, weights_.data(), kQueries, out.data(), kCodeBlockKeys});
      // 16 coordinates of 4 bits and 32 of 2.
      EXPECT_EQ(out, std::vector<int32_t>(out.size(), (16 * 15 + 32 * 3) * weight))
          << SimdLevelName(level);
    }
    ExpectNodeScores();
  }
}

TEST_F(CodesKernelsTest, SumsOfCodedKeysFollowTheLayout) {
  ForTaken([&](const Blocks& blocks, const uint32_t* which) {
    std::vector<int32_t> wanted;
    for (uint32_t i = 0; i < kQueries; ++i) {
      for (const uint32_t b : blocks) {
        for (uint32_t key = 0; key < kCodeBlockKeys; ++key) {
          wanted.push_back(Sum(i, codes_.data() + size_t{b} * 256, key, false));
        }
      }
    }
    for (const SimdLevel level : SupportedSimdLevels()) {
      std::vector<int32_t> out(wanted.size(), -1);
      KernelsOf(level).sum_codes({codes_.data(), which, static_cast<uint32_t>(blocks.size()),
                                  weights_.data(), kQueries, out.data(),
                                  blocks.size() * kCodeBlockKeys});
      EXPECT_EQ(out, wanted) << SimdLevelName(level);
    }
  });
}

TEST_F(CodesKernelsTest, ScoresOfCodedKeysAreAroundTheirBlocksCentres) { ExpectKeyScores(); }

TEST_F(CodesKernelsTest, ScoresOfNodesHoldTheirSpread) { ExpectNodeScores(); }

TEST_F(CodesKernelsTest, WhatIsNoNumberHasNoScoreAndOthersAreBounded) {
  scale_ = {1e30f, kInfinity, kNan, 1e-3f, -1e38f};
  offset_ = {0, 1, 2, kNan, -3e38f};
  for (uint32_t at = 0; at < centre_.size(); at += 3) {
    centre_[at] = at % 2 == 0 ? kNone : at % 7 == 0 ? kNan : kInfinity;
  }
  for (uint32_t at = 0; at < key_scale_.size(); at += 5) key_scale_[at] = FloatToBf16(3e38f);
  for (const SimdLevel level : SupportedSimdLevels()) {
    SCOPED_TRACE(SimdLevelName(level));
    const Blocks blocks = Taken(kStored, false);
    std::vector<float> keys, nodes;
    KernelsOf(level).score_codes(KeyTile(blocks, nullptr, &keys));
    KernelsOf(level).score_nodes(NodesTile(blocks, nullptr, &nodes));
    for (const float x : keys) ASSERT_TRUE(x <= kernels::kMostScore);  // so it is a number
    for (const float x : nodes) ASSERT_TRUE(x <= kernels::kMostScore);
    // The third query has no scale and the fourth no offset.
    const size_t row = size_t{kStored} * kCodeBlockKeys;
    for (size_t at = 2 * row; at < 4 * row; ++at) ASSERT_EQ(keys[at], kNone) << at;
    for (size_t at = 2 * row; at < 4 * row; ++at) ASSERT_EQ(nodes[at], kNone) << at;
    ASSERT_EQ(*std::max_element(nodes.begin(), nodes.end()), kernels::kMostScore);
  }
}

TEST_F(CodesKernelsTest, LanesWithoutANodeNeverScore) {
  for (uint32_t at = 0; at < variance_.size(); at += 3) variance_[at] = kNone;
  for (uint32_t at = 1; at < variance_.size(); at += 3) variance_[at] = 0;
  breadth_ = {1e-30f, 1e-38f, 1e30f, 1, 3};
  ExpectNodeScores();
  for (const SimdLevel level : SupportedSimdLevels()) {
    const Blocks blocks = Taken(kStored, false);
    std::vector<float> out;
    KernelsOf(level).score_nodes(NodesTile(blocks, nullptr, &out));
    for (size_t at = 0; at + 1 < out.size(); ++at) {
      const size_t node = at % (size_t{kStored} * kCodeBlockKeys);
      ASSERT_EQ(out[at] == kNone, node % 3 == 0) << SimdLevelName(level) << ", node " << node;
    }
  }
}

TEST_F(CodesKernelsTest, BlocksWithALargeScoreForSomeQueryAreFound) {
  ForTaken([&](const Blocks& blocks, const uint32_t* which) {
    for (const SimdLevel level : SupportedSimdLevels()) {
      SCOPED_TRACE(SimdLevelName(level));
      // Scores of the same level, for the comparison is to the bit.
      std::vector<float> scores;
      kernels::CodedKeyTile tile = KeyTile(blocks, which, &scores);
      KernelsOf(level).score_codes(tile);
      tile.out = nullptr;
      const size_t row = blocks.size() * kCodeBlockKeys;
      for (const float rank : {0.0f, 0.5f, 0.97f, 1.0f}) {
        std::vector<float> least(kQueries, kInfinity);
        for (uint32_t i = 0; i < kQueries && row > 0; i += 2) {  // the others find nothing
          std::vector<float> sorted(scores.begin() + static_cast<ptrdiff_t>(i * row),
                                    scores.begin() + static_cast<ptrdiff_t>((i + 1) * row));
          std::sort(sorted.begin(), sorted.end());
          least[i] = sorted[static_cast<size_t>(rank * static_cast<float>(row - 1))];
        }
        Blocks wanted;
        for (uint32_t b = 0; b < blocks.size(); ++b) {
          bool hit = false;
          for (size_t at = 0; at < kQueries * row; ++at) {
            hit |= at % row / kCodeBlockKeys == b && scores[at] >= least[at / row];
          }
          if (hit) wanted.push_back(b);
        }
        Blocks found(blocks.size() + 2, ~0u);
        const uint32_t count = KernelsOf(level).find_codes(tile, least.data(), found.data());
        ASSERT_EQ(found.back(), ~0u);  // one more than there are blocks may be written
        found.resize(count);
        ASSERT_EQ(found, wanted) << rank;
        ASSERT_EQ(wanted.empty(), blocks.empty());
      }
    }
  });
}

// Rows of floats: ties, and what is no number.
std::vector<float> RandomFloats(size_t n, std::mt19937* random) {
  std::normal_distribution<float> normal(0, 8);
  std::vector<float> out(n);
  for (float& x : out) {
    x = std::round(normal(*random) * 8) / 8;
    switch ((*random)() % 16) {
      case 0: x = kNone; break;
      case 1: x = kInfinity; break;
      case 2: x = kNan; break;
      default: break;
    }
  }
  return out;
}

constexpr size_t kLengths[] = {0, 1, 2, 15, 16, 17, 31, 32, 33, 250, 1000};

TEST(SelectKernelTest, PlacesOfWhatIsLargeEnoughForSomeRowComeRising) {
  std::mt19937 random(static_cast<uint32_t>(Seed()));
  for (const size_t n : kLengths) {
    for (const uint32_t rows : {0u, 1u, 3u, 33u}) {
      const size_t ld = n + 5;
      const std::vector<float> x = RandomFloats(rows * ld + 1, &random);
      std::vector<float> least;
      for (uint32_t r = 0; r < rows; ++r) least.push_back(static_cast<float>(random() % 12) + 6);
      if (rows == 3) least = {kNone, kNan, kInfinity};  // NaN is not even at least -infinity
      std::vector<uint32_t> wanted;
      for (uint32_t i = 0; i < n; ++i) {
        bool taken = false;
        for (uint32_t r = 0; r < rows; ++r) taken |= x[r * ld + i] >= least[r];
        if (taken) wanted.push_back(i);
      }
      for (const SimdLevel level : SupportedSimdLevels()) {
        std::vector<uint32_t> out(n + 17, ~0u);
        const size_t count =
            KernelsOf(level).select(x.data(), ld, rows, n, least.data(), out.data());
        ASSERT_EQ(out.back(), ~0u);  // no more than the room that was asked for
        out.resize(count);
        ASSERT_EQ(out, wanted) << SimdLevelName(level) << ", " << rows << " rows of " << n;
      }
    }
  }
}

TEST(ExpGroupsKernelTest, SumsAreThoseOfEachSixteen) {
  std::mt19937 random(static_cast<uint32_t>(Seed()));
  for (const size_t groups : {0u, 1u, 2u, 15u, 16u, 17u, 40u}) {
    std::vector<float> x(groups * kCodeBlockKeys);
    for (float& v : x) {
      v = static_cast<float>(random() % 3000) / -32.0f;  // exact; far below, too
      if (random() % 5 == 0) v = kNone;
    }
    if (groups > 1) std::fill_n(x.begin(), kCodeBlockKeys, kNone);
    const float shift = 2.5f;
    for (const SimdLevel level : SupportedSimdLevels()) {
      std::vector<float> out(groups + 1, -1.0f);
      KernelsOf(level).exp_groups(x.data(), groups, shift, out.data());
      ASSERT_EQ(out.back(), -1.0f);
      for (size_t g = 0; g < groups; ++g) {
        double wanted = 0;
        for (uint32_t t = 0; t < kCodeBlockKeys; ++t) {
          wanted += std::exp(double{x[g * kCodeBlockKeys + t]} - shift);
        }
        ASSERT_NEAR(out[g], wanted, 1e-6 * wanted + 1e-37) << SimdLevelName(level) << ", " << g;
      }
    }
  }
}

TEST(HistogramKernelTest, EachValueCountsInItsBinAndIsAddedToWhatWasThere) {
  std::mt19937 random(static_cast<uint32_t>(Seed()));
  for (const size_t n : kLengths) {
    const std::vector<float> x = RandomFloats(n, &random);
    for (const float per_unit : {8.0f, 0.5f}) {
      const float top = 10.25f;
      std::vector<uint32_t> wanted(kernels::kHistogramBins, 3);
      for (const float v : x) {
        // All numbers here are exact.
        const double depth = (double{top} - v) * per_unit;
        const bool last = !(depth < kernels::kHistogramBins - 1);
        ++wanted[last ? kernels::kHistogramBins - 1
                      : static_cast<size_t>(std::max(0.0, std::floor(depth)))];
      }
      for (const SimdLevel level : SupportedSimdLevels()) {
        std::vector<uint32_t> counts(kernels::kHistogramBins, 3);
        KernelsOf(level).histogram(x.data(), n, top, per_unit, counts.data());
        ASSERT_EQ(counts, wanted) << SimdLevelName(level) << ", " << n;
      }
    }
  }
}

}  // namespace
}  // namespace quarry

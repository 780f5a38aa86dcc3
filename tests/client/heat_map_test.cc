// Heat maps: what a head's colour says, and that labels are written.
#include "client/cli/heat_map.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "client/cli/bitmap_font.h"

namespace quarry::cli {
namespace {

HeadAudit Head(const std::string& model, uint32_t layer, uint32_t kv_head, double error,
               double ratio) {
  HeadAudit head{model, layer, kv_head, {}};
  head.figures.audits = 1;
  head.figures.error_sum = head.figures.error_max = error;
  head.figures.ratios[static_cast<size_t>(AuditFigures::RatioBucket(ratio))] = 1;
  return head;
}

// Every head of a model, as a daemon might have found them.
std::vector<HeadAudit> Model(const std::string& name, uint32_t layers, uint32_t kv_heads) {
  std::vector<HeadAudit> heads;
  for (uint32_t l = 0; l < layers; ++l) {
    for (uint32_t h = 0; h < kv_heads; ++h) {
      if (l == layers / 2 && h == 1) continue;  // no audit of this one
      heads.push_back(Head(name, l, h, 0.01 + 0.08 * l / layers + 0.01 * h,
                           std::pow(2.0, (static_cast<double>(h) - kv_heads / 2.0) / 2)));
      heads.back().figures.mass_audits = heads.back().figures.recall_audits = 1;
      heads.back().figures.mass_sum = 0.5 + 0.4 * l / layers;
      heads.back().figures.recall_sum = 1 - 0.1 * h;
    }
  }
  return heads;
}

// How many pixels have each colour.
size_t Count(const Picture& picture, Colour colour) {
  size_t count = 0;
  for (int y = 0; y < picture.size().height; ++y) {
    for (int x = 0; x < picture.size().width; ++x) count += picture.At({x, y}) == colour;
  }
  return count;
}

constexpr Colour kLargest{253, 231, 37}, kNoError{68, 1, 84}, kFarMore{178, 24, 43},
    kUnseen{200, 200, 200};

TEST(HeatMapTest, ColoursSayHowLargeErrorsAreAndHowHonestEstimates) {
  // Cells are as large as a screen allows; the scales beside them have each colour in few pixels.
  constexpr size_t kMuch = 150;
  const std::vector<HeadAudit> heads = {Head("m", 0, 0, 0.0, 1.0), Head("m", 1, 0, 0.2, 4.0)};
  const Picture picture = DrawHeatMaps(heads);
  EXPECT_GT(Count(picture, kNoError), kMuch);
  EXPECT_GT(Count(picture, kLargest), kMuch);
  EXPECT_GT(Count(picture, kFarMore), kMuch);
  EXPECT_LT(Count(picture, kUnseen), kMuch);
  const std::vector<HeadAudit> with_a_gap = {heads[0], Head("m", 1, 1, 0.2, 4.0)};
  EXPECT_GT(Count(DrawHeatMaps(with_a_gap), kUnseen), kMuch);
}

TEST(HeatMapTest, TheErrorOfLseIsShownWhateverTheCapturedMass) {
  std::vector<HeadAudit> heads = Model("m", 4, 4);
  const size_t before = Count(DrawHeatMaps(heads), kLargest);
  heads.front().figures.mass_error_sum = 0.1;
  EXPECT_GT(Count(DrawHeatMaps(heads), kLargest), before + 100);
}

TEST(HeatMapTest, WithoutAuditsItSaysSo) {
  const Picture picture = DrawHeatMaps({});
  EXPECT_GT(Count(picture, {40, 40, 40}), 100u);
  EXPECT_EQ(Count(picture, kUnseen), 0u);
}

TEST(HeatMapTest, EachModelHasItsRowOfPanelsAndLargeOnesFitAScreen) {
  std::vector<HeadAudit> heads = Model("llama-8b", 32, 8);
  const int one = DrawHeatMaps(heads).size().height;
  for (const HeadAudit& head : Model("phi-mini", 8, 4)) heads.push_back(head);
  const Picture both = DrawHeatMaps(heads);
  EXPECT_GT(both.size().height, one + 150);
  const Picture large = DrawHeatMaps(Model("large", 128, 64));
  EXPECT_LT(large.size().height, 1000);
  EXPECT_LT(large.size().width, 2000);
}

TEST(PictureTest, IsWrittenAsPng) {
  char path[] = "/tmp/quarry_picture_XXXXXX";
  ASSERT_GE(mkstemp(path), 0);
  std::vector<HeadAudit> heads = Model("llama-8b", 32, 8);
  for (const HeadAudit& head : Model("phi-mini", 8, 4)) heads.push_back(head);
  ASSERT_TRUE(DrawHeatMaps(heads).SavePng(path).ok());
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  EXPECT_GT(file.tellg(), 500);
  std::remove(path);
  EXPECT_FALSE(DrawHeatMaps(heads).SavePng("/no/such/folder/x.png").ok());
}

TEST(PictureTest, WhatLiesOutsideIsNotDrawn) {
  Picture picture({4, 4});
  picture.Fill({-2, -2}, {3, 3}, {1, 2, 3});
  picture.Fill({3, 3}, {100, 100}, {1, 2, 3});
  picture.Write({-3, 2}, "WIDE", {1, 2, 3});
  EXPECT_EQ(picture.At({0, 0}), (Colour{1, 2, 3}));
  EXPECT_EQ(picture.At({1, 1}), (Colour{255, 255, 255}));
  EXPECT_EQ(picture.At({3, 3}), (Colour{1, 2, 3}));
}

TEST(BitmapFontTest, GlyphsDifferAndUnknownOnesAreABox) {
  std::set<std::array<uint8_t, kGlyphHeight>> seen;
  const std::string known = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:-_+/%<>=()^";
  for (char c : known) seen.insert(Glyph(c));
  EXPECT_EQ(seen.size(), known.size());
  EXPECT_EQ(Glyph('a'), Glyph('A'));
  EXPECT_EQ(Glyph('\n'), Glyph('@'));
  EXPECT_FALSE(seen.contains(Glyph('@')));
}

}  // namespace
}  // namespace quarry::cli

// Pictures of pattern files: what a head's colour says.
#include "gpu/sparse/pattern_picture.h"

#include <gtest/gtest.h>

#include <set>
#include <tuple>

namespace quarry {
namespace {

TEST(PatternPictureTest, HeadsOfOneKindHaveOneColourAndKindsDiffer) {
  PatternFile file{"m", 3, 2, {}};
  for (const Pattern& pattern :
       {Pattern(DensePattern{}), Pattern(AShapePattern{1, 1}), Pattern(VerticalSlashPattern{1, 1}),
        Pattern(VerticalSlashMassPattern{0.5, 1}), Pattern(BlockSparsePattern{1}),
        Pattern(BlockScoredPattern{0.5})}) {
    file.patterns.push_back({pattern, 0.5, 0.1});
  }
  const cli::Picture picture = DrawPatterns(file);
  // Of each kind there is a cell in the map and a square in the legend, no colour twice.
  std::set<std::tuple<int, int, int>> colours;
  for (int y = 0; y < picture.size().height; ++y) {
    for (int x = 0; x < picture.size().width / 3; ++x) {
      const cli::Colour c = picture.At({x, y});
      colours.insert({c.red, c.green, c.blue});
    }
  }
  EXPECT_EQ(colours.size(), 2u + 5u);  // ground and ink
}

TEST(PatternPictureTest, AnyShapeAndNothingExpectedIsDrawn) {
  for (const auto& [layers, heads] : {std::pair{1u, 1u}, {2u, 300u}, {400u, 1u}, {80u, 64u}}) {
    PatternFile file{"m", layers, heads, {}};
    file.patterns.resize(size_t{layers} * heads);
    const cli::Picture picture = DrawPatterns(file);
    EXPECT_GT(picture.size().width, 3 * static_cast<int>(heads));
    EXPECT_GT(picture.size().height, 3 * static_cast<int>(layers));
  }
}

}  // namespace
}  // namespace quarry

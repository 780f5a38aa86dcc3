#include "gpu/sparse/pattern_picture.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "client/cli/colour_scale.h"

namespace quarry {
namespace {

using cli::Colour;
using cli::Extent;
using cli::Picture;
using cli::Place;

constexpr Colour kInk{40, 40, 40}, kGrey{200, 200, 200};
constexpr int kMargin = 20, kGap = 30, kTitle = 30, kAxis = 40, kLeastPanel = 160;
constexpr int kSwatch = 10, kSwatchText = 120;

// In the order of Pattern's kinds; both kinds of vertical-slash have one colour.
struct Kind {
  const char* name;
  Colour colour;
};
constexpr Kind kKinds[] = {{"dense", {60, 60, 60}},
                           {"a_shape", {230, 159, 0}},
                           {"vertical_slash", {86, 180, 233}},
                           {"block_sparse", {0, 158, 115}},
                           {"block_scored", {204, 121, 167}}};

Colour ColourOf(const Pattern& pattern) {
  for (const Kind& kind : kKinds) {
    if (PatternName(pattern) == kind.name) return kind.colour;
  }
  return kGrey;
}

class Panels {
 public:
  explicit Panels(const PatternFile& file)
      : file_(file),
        cell_{Fit(file.heads, 320, 26), Fit(file.layers, 480, 18)},
        map_{cell_.width * static_cast<int>(file.heads),
             cell_.height * static_cast<int>(file.layers)} {}

  int width() const { return kAxis + std::max(map_.width, kLeastPanel); }
  int height() const { return kTitle + map_.height + kAxis; }

  template <typename F>
  void Draw(Place at, const std::string& title, const F& colour, Picture* picture) const {
    picture->Write(at, title, kInk);
    const Place map{at.x + kAxis, at.y + kTitle};
    for (uint32_t l = 0; l < file_.layers; ++l) {
      for (uint32_t h = 0; h < file_.heads; ++h) {
        // A line of the ground stays between cells that are large enough.
        const Extent size{cell_.width - (cell_.width > 6), cell_.height - (cell_.height > 6)};
        picture->Fill(
            {map.x + static_cast<int>(h) * cell_.width, map.y + static_cast<int>(l) * cell_.height},
            size, colour(file_.At(l, h)));
      }
    }
    DrawAxes(map, picture);
  }

 private:
  static int Fit(uint32_t count, int room, int most) {
    return std::clamp(room / static_cast<int>(std::max(count, 1u)), 3, most);
  }
  // Every how many a number stands, so that they do not touch.
  static uint32_t Every(int cell, int room) {
    uint32_t every = 1;
    while (static_cast<int>(every) * cell < room) every *= 2;
    return every;
  }
  void DrawAxes(Place map, Picture* picture) const {
    for (uint32_t h = 0; h < file_.heads; h += Every(cell_.width, 18)) {
      const std::string text = std::to_string(h);
      const int centre = map.x + static_cast<int>(h) * cell_.width + cell_.width / 2;
      picture->Write({centre - Picture::TextExtent(text).width / 2, map.y + map_.height + 5}, text,
                     kInk);
    }
    for (uint32_t l = 0; l < file_.layers; l += Every(cell_.height, 10)) {
      const std::string text = std::to_string(l);
      const int centre = map.y + static_cast<int>(l) * cell_.height + cell_.height / 2;
      picture->Write({map.x - 5 - Picture::TextExtent(text).width, centre - 3}, text, kInk);
    }
    picture->Write({map.x, map.y + map_.height + 18}, "head", kInk);
    picture->Write({map.x - kAxis, map.y - 12}, "layer", kInk);
  }

  const PatternFile& file_;
  const Extent cell_, map_;
};

}  // namespace

Picture DrawPatterns(const PatternFile& file) {
  constexpr int kHeading = 30, kHeadingScale = 2;
  double end = 1e-6;
  for (const HeadPattern& head : file.patterns) end = std::max(end, head.error);
  const Panels panels(file);
  const std::string heading = file.model + ": prefill patterns";
  const auto kinds = static_cast<int>(std::size(kKinds));
  Picture picture({2 * kMargin + std::max({3 * panels.width() + 2 * kGap, kinds * kSwatchText,
                                           Picture::TextExtent(heading, kHeadingScale).width}),
                   2 * kMargin + kHeading + panels.height() + kMargin + kSwatch});
  picture.Write({kMargin, kMargin}, heading, kInk, kHeadingScale);
  Place at{kMargin, kMargin + kHeading};
  panels.Draw(
      at, "pattern", [](const HeadPattern& head) { return ColourOf(head.pattern); }, &picture);
  at.x += panels.width() + kGap;
  panels.Draw(
      at, "tiles of dense: 1 is light",
      [](const HeadPattern& head) {
        return head.tiles_share < 0 ? kGrey : cli::Rising(head.tiles_share);
      },
      &picture);
  at.x += panels.width() + kGap;
  panels.Draw(
      at, absl::StrFormat("relative error: %.2g is light", end),
      [end](const HeadPattern& head) {
        return head.error < 0 ? kGrey : cli::Rising(head.error / end);
      },
      &picture);
  at = {kMargin, kMargin + kHeading + panels.height() + kMargin / 2};
  for (const Kind& kind : kKinds) {
    picture.Fill(at, {kSwatch, kSwatch}, kind.colour);
    picture.Write({at.x + kSwatch + 5, at.y + 1}, kind.name, kInk);
    at.x += kSwatchText;
  }
  return picture;
}

}  // namespace quarry

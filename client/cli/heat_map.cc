#include "client/cli/heat_map.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "client/cli/colour_scale.h"

namespace quarry::cli {
namespace {

constexpr Colour kInk{40, 40, 40}, kGrey{200, 200, 200}, kGrid{255, 255, 255};
constexpr std::string_view kLegend =
    "white: as predicted. blue: less. red: more. grey: heads that no audit saw";
constexpr int kMargin = 20, kTitle = 30, kAxis = 40, kBar = 12, kBarGap = 14, kBarText = 44;
constexpr int kLeastPanelWidth = 150, kGap = 24;

struct Figure {
  std::string title;
  double (*value)(const AuditFigures&);
  double (*place)(double value, double end);  // on the scale, 0 to 1
  Colour (*colour)(double place);
  std::string low, high;  // of the scale
  double end = 1;         // its upper end
};

double Linear(double value, double end) { return value / end; }
double OctavesAroundOne(double value, double) { return 0.5 + std::log2(value) / 4; }

struct Model {
  std::span<const HeadAudit> heads;
  uint32_t layers = 0, kv_heads = 0;  // that any audit saw, counted from 0
  uint64_t audits = 0, mass_audits = 0, recall_audits = 0;
};

std::vector<Model> Models(std::span<const HeadAudit> heads) {
  std::vector<Model> models;
  for (size_t lo = 0, hi = 0; lo < heads.size(); lo = hi) {
    Model model;
    for (; hi < heads.size() && heads[hi].model == heads[lo].model; ++hi) {
      model.layers = std::max(model.layers, heads[hi].layer + 1);
      model.kv_heads = std::max(model.kv_heads, heads[hi].kv_head + 1);
      model.audits += heads[hi].figures.audits;
      model.mass_audits += heads[hi].figures.mass_audits;
      model.recall_audits += heads[hi].figures.recall_audits;
    }
    model.heads = heads.subspan(lo, hi - lo);
    models.push_back(model);
  }
  return models;
}

Figure FromZero(const Model& model, std::string title, double (*value)(const AuditFigures&)) {
  double end = 1e-6;
  for (const HeadAudit& head : model.heads) {
    const double v = value(head.figures);
    if (v > end) end = v;
  }
  return {std::move(title), value, Linear, Rising, "0", absl::StrFormat("%.2g", end), end};
}

std::vector<Figure> FiguresOf(const Model& model) {
  std::vector<Figure> figures;
  figures.push_back(
      FromZero(model, "relative error of o", [](const AuditFigures& f) { return f.error(); }));
  figures.push_back({"actual / predicted",
                     [](const AuditFigures& f) { return f.RatioQuantile(0.5); }, OctavesAroundOne,
                     Diverging, "1/4", "4"});
  if (model.mass_audits > 0) {
    figures.push_back({"captured mass", [](const AuditFigures& f) { return f.mass(); }, Linear,
                       Rising, "0", "1"});
  }
  if (model.recall_audits > 0) {
    figures.push_back(
        {"recall", [](const AuditFigures& f) { return f.recall(); }, Linear, Rising, "0", "1"});
  }
  // Where tokens are estimated, the captured mass does not tell it.
  figures.push_back(FromZero(model, "relative error of e^lse",
                             [](const AuditFigures& f) { return f.mass_error(); }));
  return figures;
}

// Of one head: large enough to be seen, small enough that a panel fits a screen.
Extent CellOf(const Model& model) {
  const auto fit = [](uint32_t count, int room, int most) {
    return std::clamp(room / static_cast<int>(std::max(count, 1u)), 3, most);
  };
  return {fit(model.kv_heads, 260, 26), fit(model.layers, 420, 18)};
}

Extent MapOf(const Model& model) {
  const Extent cell = CellOf(model);
  return {cell.width * static_cast<int>(model.kv_heads),
          cell.height * static_cast<int>(model.layers)};
}

Extent PanelOf(const Model& model) {
  const Extent map = MapOf(model);
  return {std::max(kLeastPanelWidth, kAxis + map.width + kBarGap + kBar + kBarText),
          kTitle + map.height + kAxis};
}

// Every how many heads or layers a number stands, so that they do not touch.
uint32_t TickEvery(uint32_t count, int cell, int room) {
  uint32_t every = 1;
  for (uint32_t next : {1u, 2u, 4u, 8u, 16u, 32u, 64u}) {
    every = next;
    if (static_cast<int>(every) * cell >= room) break;
  }
  return std::min(every, std::max(count, 1u));
}

void DrawAxes(const Model& model, Place map, Picture* picture) {
  const Extent cell = CellOf(model), size = MapOf(model);
  const uint32_t across = TickEvery(model.kv_heads, cell.width, 18);
  for (uint32_t h = 0; h < model.kv_heads; h += across) {
    const std::string text = std::to_string(h);
    const int centre = map.x + static_cast<int>(h) * cell.width + cell.width / 2;
    picture->Write({centre - Picture::TextExtent(text).width / 2, map.y + size.height + 5}, text,
                   kInk);
  }
  const uint32_t down = TickEvery(model.layers, cell.height, 10);
  for (uint32_t l = 0; l < model.layers; l += down) {
    const std::string text = std::to_string(l);
    const int centre = map.y + static_cast<int>(l) * cell.height + cell.height / 2;
    picture->Write({map.x - 5 - Picture::TextExtent(text).width, centre - 3}, text, kInk);
  }
  picture->Write({map.x, map.y + size.height + 18}, "KV head", kInk);
  picture->Write({map.x - kAxis, map.y - 12}, "layer", kInk);
}

void DrawScale(const Figure& figure, Place at, int height, Picture* picture) {
  for (int y = 0; y < height; ++y) {
    const double place = 1 - static_cast<double>(y) / std::max(height - 1, 1);
    picture->Fill({at.x, at.y + y}, {kBar, 1}, figure.colour(place));
  }
  picture->Write({at.x + kBar + 4, at.y}, figure.high, kInk);
  picture->Write({at.x + kBar + 4, at.y + std::max(height - 7, 9)}, figure.low, kInk);
}

void DrawPanel(const Model& model, const Figure& figure, Place at, Picture* picture) {
  picture->Write(at, figure.title, kInk);
  const Place map{at.x + kAxis, at.y + kTitle};
  const Extent cell = CellOf(model), size = MapOf(model);
  picture->Fill(map, size, kGrey);
  for (const HeadAudit& head : model.heads) {
    const double value = figure.value(head.figures);
    if (std::isnan(value)) continue;
    picture->Fill({map.x + static_cast<int>(head.kv_head) * cell.width,
                   map.y + static_cast<int>(head.layer) * cell.height},
                  cell, figure.colour(figure.place(value, figure.end)));
  }
  for (uint32_t h = 1; h < model.kv_heads && cell.width > 6; ++h) {
    picture->Fill({map.x + static_cast<int>(h) * cell.width, map.y}, {1, size.height}, kGrid);
  }
  for (uint32_t l = 1; l < model.layers && cell.height > 6; ++l) {
    picture->Fill({map.x, map.y + static_cast<int>(l) * cell.height}, {size.width, 1}, kGrid);
  }
  DrawAxes(model, map, picture);
  DrawScale(figure, {map.x + size.width + kBarGap, map.y}, std::max(size.height, 40), picture);
}

std::string Heading(const Model& model) {
  return absl::StrFormat("%s: %d audits", model.heads.front().model, model.audits);
}

}  // namespace

Picture DrawHeatMaps(std::span<const HeadAudit> heads) {
  constexpr int kHeadingScale = 2, kHeading = 30;
  const std::vector<Model> models = Models(heads);
  Extent size{2 * kMargin + kLeastPanelWidth, kMargin};
  for (const Model& model : models) {
    const Extent panel = PanelOf(model);
    const auto panels = static_cast<int>(FiguresOf(model).size());
    size.width = std::max({size.width, 2 * kMargin + panels * (panel.width + kGap) - kGap,
                           2 * kMargin + Picture::TextExtent(Heading(model), kHeadingScale).width});
    size.height += kHeading + std::max(panel.height, kTitle + 40 + kAxis) + kMargin;
  }
  size.width = std::max(size.width, 2 * kMargin + Picture::TextExtent(kLegend).width);
  size.height += kHeading;
  Picture picture(size);
  Place at{kMargin, kMargin};
  if (models.empty()) picture.Write(at, "no audits yet", kInk, kHeadingScale);
  for (const Model& model : models) {
    picture.Write(at, Heading(model), kInk, kHeadingScale);
    const Extent panel = PanelOf(model);
    at.y += kHeading;
    for (const Figure& figure : FiguresOf(model)) {
      DrawPanel(model, figure, at, &picture);
      at.x += panel.width + kGap;
    }
    at.x = kMargin;
    at.y += std::max(panel.height, kTitle + 40 + kAxis) + kMargin;
  }
  if (!models.empty()) picture.Write(at, kLegend, kInk);
  return picture;
}

}  // namespace quarry::cli

#include "perf/retrieval/svg_plot.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace quarry::perf {
namespace {

constexpr double kWidth = 560, kHeight = 380;
constexpr double kLeft = 64, kRight = 12, kTop = 30, kBottom = 44;
constexpr const char* kColors[] = {"#1f77b4", "#d62728", "#2ca02c", "#9467bd",
                                   "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f"};

std::string Color(size_t i) { return kColors[i % std::size(kColors)]; }

std::string Number(double x) { return absl::StrFormat("%.3g", x); }

// A logarithmic axis over whole decades.
struct LogAxis {
  int lo = 0, hi = 1;  // powers of ten
  void Cover(double x) {
    const int below = static_cast<int>(std::floor(std::log10(x)));
    const int above = static_cast<int>(std::ceil(std::log10(x)));
    lo = empty ? below : std::min(lo, below);
    hi = std::max(empty ? above : std::max(hi, above), lo + 1);
    empty = false;
  }
  double At(double x) const { return (std::log10(x) - lo) / (hi - lo); }
  bool empty = true;
};

double XAt(const LogAxis& axis, double x) {
  return kLeft + axis.At(x) * (kWidth - kLeft - kRight);
}
double YAt(const LogAxis& axis, double y) {
  return kHeight - kBottom - axis.At(y) * (kHeight - kTop - kBottom);
}

std::string Text(double x, double y, std::string_view anchor, std::string_view text) {
  return absl::StrFormat("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", x, y,
                         std::string(anchor), EscapeHtml(text));
}

std::string Line(double x1, double y1, double x2, double y2, std::string_view stroke) {
  return absl::StrFormat(
      "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n", x1, y1, x2, y2,
      std::string(stroke));
}

std::string Open(double height) {
  return absl::StrFormat("<svg width=\"%.0f\" height=\"%.0f\" viewBox=\"0 0 %.0f %.0f\" role=\"img\">\n",
                         kWidth, height, kWidth, height);
}

std::string Grid(const PlotAxes& axes, const LogAxis& x, const LogAxis& y) {
  std::string out = Text(kWidth / 2, 18, "middle", axes.title);
  for (int p = x.lo; p <= x.hi; ++p) {
    const double at = XAt(x, std::pow(10.0, p));
    absl::StrAppend(&out, Line(at, kTop, at, kHeight - kBottom, "#ddd"),
                    Text(at, kHeight - kBottom + 15, "middle", Number(std::pow(10.0, p))));
  }
  for (int p = y.lo; p <= y.hi; ++p) {
    const double at = YAt(y, std::pow(10.0, p));
    absl::StrAppend(&out, Line(kLeft, at, kWidth - kRight, at, "#ddd"),
                    Text(kLeft - 6, at + 4, "end", Number(std::pow(10.0, p))));
  }
  absl::StrAppend(&out, Text((kLeft + kWidth) / 2, kHeight - 10, "middle", axes.x),
                  absl::StrFormat("<text transform=\"translate(14 %.1f) rotate(-90)\" "
                                  "text-anchor=\"middle\">%s</text>\n",
                                  kHeight / 2, EscapeHtml(axes.y)));
  return out;
}

std::string Drawn(const PlotSeries& series, const LogAxis& x, const LogAxis& y,
                  const std::string& color) {
  std::string out;
  std::string path;
  for (const PlotPoint& point : Frontier(series.points)) {
    absl::StrAppendFormat(&path, "%s%.1f %.1f", path.empty() ? "M" : " L", XAt(x, point.x),
                          YAt(y, point.y));
  }
  absl::StrAppend(&out, "<path d=\"", path, "\" fill=\"none\" stroke=\"", color, "\"/>\n");
  for (const PlotPoint& point : series.points) {
    absl::StrAppendFormat(
        &out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"><title>%s</title></circle>\n",
        XAt(x, point.x), YAt(y, point.y), color, EscapeHtml(point.label));
  }
  return out;
}

}  // namespace

std::string EscapeHtml(std::string_view text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::vector<PlotPoint> Frontier(std::vector<PlotPoint> points) {
  std::sort(points.begin(), points.end(), [](const PlotPoint& a, const PlotPoint& b) {
    return a.x < b.x || (a.x == b.x && a.y < b.y);
  });
  std::vector<PlotPoint> out;
  for (PlotPoint& point : points) {
    if (out.empty() || point.y < out.back().y) out.push_back(std::move(point));
  }
  return out;
}

std::string ScatterPlot(const PlotAxes& axes, const std::vector<PlotSeries>& series) {
  LogAxis x, y;
  std::vector<PlotSeries> drawn = series;
  for (PlotSeries& s : drawn) {
    std::erase_if(s.points, [](const PlotPoint& point) { return point.x <= 0; });
    for (PlotPoint& point : s.points) {
      point.y = std::max(point.y, axes.y_floor);
      x.Cover(point.x);
      y.Cover(point.y);
    }
  }
  std::string out = Open(kHeight);
  if (x.empty) {
    return absl::StrCat(out, Text(kWidth / 2, kHeight / 2, "middle", axes.title + ": nothing measured"),
                        "</svg>\n");
  }
  absl::StrAppend(&out, Grid(axes, x, y));
  double legend = kTop + 14;
  for (size_t i = 0; i < drawn.size(); ++i) {
    if (drawn[i].points.empty()) continue;
    absl::StrAppend(&out, Drawn(drawn[i], x, y, Color(i)));
    absl::StrAppendFormat(&out, "<text x=\"%.1f\" y=\"%.1f\" fill=\"%s\">%s</text>\n", kLeft + 8,
                          legend, Color(i), EscapeHtml(drawn[i].name));
    legend += 15;
  }
  return absl::StrCat(out, "</svg>\n");
}

std::string BarPlot(const std::string& title, const std::vector<PlotBar>& bars) {
  constexpr double kRow = 20, kNames = 190, kValues = 70;
  double largest = 0;
  for (const PlotBar& bar : bars) largest = std::max(largest, bar.value);
  std::string out = Open(kTop + kRow * static_cast<double>(bars.size()) + 8);
  absl::StrAppend(&out, Text(kWidth / 2, 18, "middle", title));
  for (size_t i = 0; i < bars.size(); ++i) {
    const double top = kTop + kRow * static_cast<double>(i);
    const double length =
        largest > 0 ? bars[i].value / largest * (kWidth - kNames - kValues) : 0.0;
    absl::StrAppend(&out, Text(kNames - 6, top + 14, "end", bars[i].name));
    absl::StrAppendFormat(&out,
                          "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"/>\n",
                          kNames, top + 3, length, kRow - 6, Color(0));
    absl::StrAppend(&out, Text(kNames + length + 6, top + 14, "start", Number(bars[i].value)));
  }
  return absl::StrCat(out, "</svg>\n");
}

}  // namespace quarry::perf

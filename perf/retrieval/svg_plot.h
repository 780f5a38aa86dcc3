// Plots as inline SVG.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace quarry::perf {

struct PlotPoint {
  double x = 0, y = 0;
  std::string label;  // shown when it is pointed at
};

struct PlotSeries {
  std::string name;
  std::vector<PlotPoint> points;
};

struct PlotAxes {
  std::string title, x, y;
  double y_floor = 1e-4;  // smaller values are drawn here
};

// For text and attributes of HTML and SVG.
std::string EscapeHtml(std::string_view text);

// The points that no other of the series beats in both coordinates, by rising x: small is good.
std::vector<PlotPoint> Frontier(std::vector<PlotPoint> points);

// Scatters the series over logarithmic axes, a line along each one's frontier. Points with x <= 0 are
// left out; without any point the plot says so.
std::string ScatterPlot(const PlotAxes& axes, const std::vector<PlotSeries>& series);

struct PlotBar {
  std::string name;
  double value = 0;
};
// Horizontal bars with their values.
std::string BarPlot(const std::string& title, const std::vector<PlotBar>& bars);

}  // namespace quarry::perf

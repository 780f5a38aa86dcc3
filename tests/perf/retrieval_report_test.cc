#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <regex>
#include <string>
#include <vector>

#include "perf/retrieval/report.h"
#include "perf/retrieval/svg_plot.h"

namespace quarry::perf {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

Row RowOf(const std::string& index, const std::string& budget, uint32_t head, double error,
          double us) {
  Row row;
  row.index = index;
  row.budget = budget;
  row.trace = "t";
  row.head = head;
  row.head_class = "medium";
  row.n = 4096;
  row.runs = 1;
  row.threads = 1;
  row.rel_l2 = error;
  row.rel_l2_p95 = 2 * error;
  row.bytes_read = 1e6;
  row.build_core_s = index == "exact" ? 0 : 2.5;
  row.us_p50 = us;
  row.us_p99 = 2 * us;
  return row;
}

TEST(RetrievalReportTest, HeadsOfAClassBecomeOneLineBesideTheExactScan) {
  const std::vector<Row> rows = {RowOf("exact", "all", 0, 0, 100), RowOf("exact", "all", 1, 0, 120),
                                 RowOf("exact", "all", 2, 0, 110),
                                 RowOf("hnsw/ef=9", "top-10", 0, 0.1, 10),
                                 RowOf("hnsw/ef=9", "top-10", 1, 0.3, 11),
                                 RowOf("hnsw/ef=9", "top-10", 2, 0.2, 12)};
  const std::vector<ReportLine> lines = Summarise(rows);
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[1].heads, 3u);
  EXPECT_NEAR(lines[1].mean.rel_l2, 0.2, 1e-12);
  EXPECT_NEAR(lines[1].worst_p95, 0.6, 1e-12);
  EXPECT_EQ(lines[1].mean.us_p50, 11);
  ASSERT_TRUE(lines[1].times_faster.has_value());
  EXPECT_NEAR(*lines[1].times_faster, 10, 1e-9);
}

TEST(RetrievalReportTest, OtherThreadsLengthsAndClassesStayApart) {
  std::vector<Row> rows(4, RowOf("exact", "all", 0, 0, 100));
  rows[1].threads = 2;
  rows[2].n = 8192;
  rows[3].head_class = "sharp";
  EXPECT_EQ(Summarise(rows).size(), 4u);
}

TEST(RetrievalReportTest, TheFrontierKeepsWhatNothingBeats) {
  const std::vector<PlotPoint> frontier =
      Frontier({{3, 1, "c"}, {1, 5, "a"}, {2, 2, "b"}, {2, 3, "beaten"}, {4, 1, "beaten"}});
  std::string labels;
  for (const PlotPoint& point : frontier) labels += point.label;
  EXPECT_EQ(labels, "abc");
}

TEST(RetrievalReportTest, TheFileHasItsPlotsAndNeedsNothingElse) {
  const std::vector<Row> rows = {RowOf("exact", "all", 0, 0, 100),
                                 RowOf("a<b>/x", "top-10", 0, 0.1, 10)};
  const std::string html =
      HtmlReport({.machine = "m & n", .commit = "abc", .command = "retrieval_bench"}, rows);
  EXPECT_THAT(html, HasSubstr("Error against bytes"));
  EXPECT_THAT(html, HasSubstr("Error against time, 1 threads"));
  EXPECT_THAT(html, HasSubstr("Building one KV head"));
  EXPECT_THAT(html, HasSubstr("<h2>medium heads, 4096 tokens</h2>"));
  EXPECT_THAT(html, HasSubstr("m &amp; n"));
  EXPECT_THAT(html, HasSubstr("a&lt;b&gt;"));
  EXPECT_THAT(html, Not(HasSubstr("a<b>")));
  for (const char* outside : {"<script", "http://", "https://", "src=", "href=", "@import"}) {
    EXPECT_THAT(html, Not(HasSubstr(outside)));
  }
  EXPECT_THAT(html, Not(HasSubstr("nan")));
  EXPECT_THAT(html, Not(HasSubstr("inf")));
  // Every element that is opened is closed.
  for (const char* element : {"svg", "table", "tr", "td", "th", "text", "circle", "body", "html"}) {
    const auto count = [&](const std::string& pattern) {
      const std::regex regex(pattern);
      return std::distance(std::sregex_iterator(html.begin(), html.end(), regex),
                           std::sregex_iterator());
    };
    EXPECT_EQ(count("<" + std::string(element) + "[ >]"), count("</" + std::string(element) + ">"))
        << element;
  }
}

TEST(RetrievalReportTest, NothingMeasuredIsSaid) {
  EXPECT_THAT(ScatterPlot({"Title", "x", "y"}, {}), HasSubstr("Title: nothing measured"));
  EXPECT_THAT(HtmlReport({}, {}), HasSubstr("</html>"));
}

}  // namespace
}  // namespace quarry::perf

#include "perf/retrieval/report.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "perf/retrieval/svg_plot.h"
#include "perf/statistics.h"

namespace quarry::perf {
namespace {

constexpr std::string_view kStyle =
    "body{font:14px system-ui,sans-serif;margin:24px;max-width:1220px}"
    "svg{font:11px system-ui,sans-serif;background:#fff;border:1px solid #ccc;margin:4px}"
    "table{border-collapse:collapse;font-size:12px}"
    "td,th{padding:2px 7px;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,td:nth-child(2),th:first-child,th:nth-child(2){text-align:left}"
    "pre{white-space:pre-wrap}";

// Kinds of heads that are reported apart.
using Part = std::tuple<std::string, uint32_t>;  // class, n
Part PartOf(const Row& row) { return {row.head_class, row.n}; }

ReportLine MeanOf(std::span<const Row* const> rows) {
  ReportLine line;
  line.mean = *rows.front();
  line.heads = static_cast<uint32_t>(rows.size());
  const auto mean = [&](double Row::*member) {
    double sum = 0;
    for (const Row* row : rows) sum += row->*member;
    line.mean.*member = sum / static_cast<double>(rows.size());
  };
  for (double Row::*member :
       {&Row::build_core_s, &Row::bytes_per_token, &Row::recall_at_100, &Row::mass, &Row::rel_l2,
        &Row::rel_l2_p95, &Row::partial_rel_l2, &Row::tokens_retrieved, &Row::oracle_tokens,
        &Row::bytes_read}) {
    mean(member);
  }
  for (const Row* row : rows) line.worst_p95 = std::max(line.worst_p95, row->rel_l2_p95);
  for (std::optional<double> Row::*member :
       {&Row::predicted_error, &Row::us_p50, &Row::us_mean, &Row::us_p99}) {
    std::vector<double> values;
    for (const Row* row : rows) {
      if ((row->*member).has_value()) values.push_back(*(row->*member));
    }
    line.mean.*member = values.empty() ? std::nullopt : std::optional<double>(Median(values));
  }
  return line;
}

// "hnsw/M=32/ef=100" is of the family hnsw.
std::string Family(const std::string& index) { return index.substr(0, index.find('/')); }

std::string LabelOf(const ReportLine& line) {
  const Row& row = line.mean;
  return absl::StrFormat("%s, %s, %d runs: error %.4f, %.3f MB, %s us", row.index, row.budget,
                         row.runs, row.rel_l2, row.bytes_read / 1e6,
                         row.us_p50 ? absl::StrFormat("%.0f", *row.us_p50) : "-");
}

// One series for each family, in order of their names.
template <typename X>
std::vector<PlotSeries> SeriesOf(std::span<const ReportLine> lines, X&& x) {
  std::map<std::string, PlotSeries> by_family;
  for (const ReportLine& line : lines) {
    PlotSeries& series = by_family[Family(line.mean.index)];
    series.name = Family(line.mean.index);
    series.points.push_back({x(line.mean), line.mean.rel_l2, LabelOf(line)});
  }
  std::vector<PlotSeries> out;
  for (auto& [name, series] : by_family) out.push_back(std::move(series));
  return out;
}

std::string OrDash(const std::optional<double>& x, const char* format) {
  return x.has_value() ? absl::StrFormat(*absl::ParsedFormat<'f'>::New(format), *x) : "-";
}

std::string Table(std::span<const ReportLine> lines) {
  std::string out =
      "<table><tr><th>index</th><th>budget</th><th>runs</th><th>threads</th><th>heads</th>"
      "<th>recall@100</th><th>mass</th><th>error</th><th>p95, mean</th><th>p95, worst head</th>"
      "<th>before merge</th><th>predicted</th><th>tokens</th><th>oracle</th><th>MB read</th>"
      "<th>us p50</th><th>us p99</th><th>times faster</th><th>build core s</th>"
      "<th>B/token</th></tr>\n";
  for (const ReportLine& line : lines) {
    const Row& r = line.mean;
    absl::StrAppendFormat(&out, "<tr><td>%s</td><td>%s</td><td>%d</td><td>%d</td><td>%d</td>",
                          EscapeHtml(r.index), EscapeHtml(r.budget), r.runs, r.threads, line.heads);
    absl::StrAppendFormat(
        &out, "<td>%.3f</td><td>%.4f</td><td>%.4f</td><td>%.4f</td><td>%.4f</td><td>%.4f</td>",
        r.recall_at_100, r.mass, r.rel_l2, r.rel_l2_p95, line.worst_p95, r.partial_rel_l2);
    absl::StrAppend(&out, "<td>", OrDash(r.predicted_error, "%.4f"), "</td>");
    absl::StrAppendFormat(&out, "<td>%.0f</td><td>%.0f</td><td>%.3f</td>", r.tokens_retrieved,
                          r.oracle_tokens, r.bytes_read / 1e6);
    absl::StrAppend(&out, "<td>", OrDash(r.us_p50, "%.0f"), "</td><td>", OrDash(r.us_p99, "%.0f"),
                    "</td><td>", OrDash(line.times_faster, "%.2f"), "</td>");
    absl::StrAppendFormat(&out, "<td>%.2f</td><td>%.1f</td></tr>\n", r.build_core_s,
                          r.bytes_per_token);
  }
  return out + "</table>\n";
}

std::string BuildPlot(std::span<const ReportLine> lines) {
  std::map<std::string, double> by_build;  // the longest of what differs in its searches alone
  for (const ReportLine& line : lines) {
    if (line.mean.build_core_s <= 0) continue;
    const std::string name =
        absl::StrCat(Family(line.mean.index), ", ", line.mean.runs, " runs");
    by_build[name] = std::max(by_build[name], line.mean.build_core_s);
  }
  std::vector<PlotBar> bars;
  for (const auto& [name, seconds] : by_build) bars.push_back({name, seconds});
  return BarPlot("Building one KV head: core seconds", bars);
}

std::string PartOfReport(const Part& part, std::span<const ReportLine> lines) {
  std::set<uint32_t> threads;
  for (const ReportLine& line : lines) {
    if (line.mean.us_p50.has_value()) threads.insert(line.mean.threads);
  }
  std::string out = absl::StrFormat("<h2>%s heads, %d tokens</h2>\n", EscapeHtml(std::get<0>(part)),
                                    std::get<1>(part));
  std::vector<ReportLine> once;  // bytes do not depend on the threads
  for (const ReportLine& line : lines) {
    if (threads.empty() || line.mean.threads == 0 || line.mean.threads == *threads.begin()) {
      once.push_back(line);
    }
  }
  absl::StrAppend(&out, ScatterPlot({"Error against bytes", "MB read, a KV head and query group",
                                     "relative error of the output"},
                                    SeriesOf(once, [](const Row& r) { return r.bytes_read / 1e6; })));
  for (uint32_t count : threads) {
    std::vector<ReportLine> timed;
    for (const ReportLine& line : lines) {
      if (line.mean.threads == count) timed.push_back(line);
    }
    absl::StrAppend(&out,
                    ScatterPlot({absl::StrCat("Error against time, ", count, " threads"),
                                 "us at the median, a KV head and query group",
                                 "relative error of the output"},
                                SeriesOf(timed, [](const Row& r) { return r.us_p50.value_or(0); })));
  }
  return absl::StrCat(out, BuildPlot(once), Table(lines));
}

}  // namespace

std::vector<ReportLine> Summarise(std::span<const Row> rows) {
  using Key = std::tuple<std::string, uint32_t, std::string, std::string, uint32_t, uint32_t>;
  std::map<Key, std::vector<const Row*>> groups;
  std::vector<Key> order;  // of first appearance
  for (const Row& row : rows) {
    const Key key{row.head_class, row.n, row.index, row.budget, row.runs, row.threads};
    if (!groups.contains(key)) order.push_back(key);
    groups[key].push_back(&row);
  }
  std::vector<ReportLine> lines;
  std::map<std::tuple<Part, uint32_t>, double> exact_us;
  for (const Key& key : order) {
    ReportLine& line = lines.emplace_back(MeanOf(groups[key]));
    const Row& row = line.mean;
    if (row.index != "exact" || row.budget != "all" || !row.us_p50.has_value()) continue;
    double& us = exact_us.try_emplace({PartOf(row), row.threads}, *row.us_p50).first->second;
    us = std::min(us, *row.us_p50);
  }
  for (ReportLine& line : lines) {
    const auto exact = exact_us.find({PartOf(line.mean), line.mean.threads});
    if (exact == exact_us.end() || line.mean.us_p50.value_or(0) <= 0) continue;
    line.times_faster = exact->second / *line.mean.us_p50;
  }
  return lines;
}

std::string HtmlReport(const ReportHead& head, std::span<const Row> rows) {
  std::string out = absl::StrCat(
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Retrieval</title>",
      "<style>", std::string(kStyle), "</style></head><body>\n<h1>Retrieval</h1>\n<pre>machine  ",
      EscapeHtml(head.machine), "\ncommit   ", EscapeHtml(head.commit), "\ncommand  ",
      EscapeHtml(head.command), "</pre>\n",
      "<p>Means over heads, their queries and query heads; times are medians over the heads. Error: "
      "of the output after the merge with the window, relative to exact attention in double. "
      "Oracle: the fewest tokens, chosen by exact scores, for the same error. Lines join what no "
      "other setting of the same index beats. Errors below 0.0001 are drawn there.</p>\n");
  std::map<Part, std::vector<ReportLine>> parts;
  for (ReportLine& line : Summarise(rows)) parts[PartOf(line.mean)].push_back(std::move(line));
  for (const auto& [part, lines] : parts) absl::StrAppend(&out, PartOfReport(part, lines));
  return absl::StrCat(out, "</body></html>\n");
}

}  // namespace quarry::perf

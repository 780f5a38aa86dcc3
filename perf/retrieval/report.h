// The results as one HTML file that needs nothing else.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "perf/retrieval/row.h"

namespace quarry::perf {

struct ReportHead {
  std::string machine, commit, command;
};

// Rows that differ only in trace, layer and head, as one: means, and the median of their times.
struct ReportLine {
  Row mean;            // trace, layer and head say nothing
  uint32_t heads = 0;
  double worst_p95 = 0;                // of rel_l2, over the heads
  std::optional<double> times_faster;  // than `exact` over all tokens, at as many threads
};
std::vector<ReportLine> Summarise(std::span<const Row> rows);

// For each class and length: error against bytes, error against time, build time, and a table.
std::string HtmlReport(const ReportHead& head, std::span<const Row> rows);

}  // namespace quarry::perf

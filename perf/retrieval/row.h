// One line of results: an index and a budget on one head.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace quarry::perf {

// Means are over the queries and the query heads of the KV head's group.
struct Row {
  std::string index;   // and its knobs
  std::string budget;
  std::string trace;
  uint32_t layer = 0;
  uint32_t head = 0;   // the KV head
  std::string head_class;
  uint32_t n = 0;      // tokens of the trace
  uint32_t runs = 0;
  uint32_t threads = 0;  // answering at once, each another KV head; 0: not timed
  std::string cache;     // "cold": no answer finds anything of its head in a cache
  double build_core_s = 0;
  double bytes_per_token = 0;  // of the index, beside keys and values
  double recall_at_100 = 0;
  double mass = 0;
  double rel_l2 = 0, partial_rel_l2 = 0;  // after and before the merge with the window
  double rel_l2_p95 = 0, rel_l2_max = 0;
  uint32_t queries = 0, lost = 0;  // query heads answered, and those of an error above 0.5
  // Tokens with at least a 64th of a query head's softmax mass, the window's included, over all its
  // queries; and those that were not attended one by one.
  uint32_t heavy = 0, heavy_missed = 0;
  // Of a query head's mass: the heaviest of its 100 best tokens that was not, over all queries.
  double missed_share = 0;
  std::optional<double> predicted_error;  // none: the index makes no prediction
  std::optional<double> predicted_within_2x;  // share of queries whose error is within a factor of 2
  double tokens_retrieved = 0;            // a query head
  double oracle_tokens = 0;  // the fewest best tokens for an error of rel_l2, a query head
  double bytes_read = 0;     // an answer to the whole group: every line touched
  std::optional<double> us_p50, us_mean, us_p99;  // an answer to the whole group
  std::optional<double> scan_us_p50, scan_us_mean;  // an exact scan in turns with each answer
};

std::string RowToJson(const Row& row);
// InvalidArgument says what is missing.
absl::StatusOr<Row> RowFromJson(const std::string& line);

}  // namespace quarry::perf

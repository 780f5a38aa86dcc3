#include "perf/retrieval/row.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"

namespace quarry::perf {
namespace {

using Json = nlohmann::ordered_json;

Json OrNull(const std::optional<double>& x) { return x.has_value() ? Json(*x) : Json(nullptr); }

std::optional<double> FromNull(const Json& x) {
  return x.is_null() ? std::nullopt : std::optional<double>(x.get<double>());
}

}  // namespace

std::string RowToJson(const Row& row) {
  return Json({{"index", row.index},
               {"budget", row.budget},
               {"trace", row.trace},
               {"layer", row.layer},
               {"head", row.head},
               {"class", row.head_class},
               {"n", row.n},
               {"runs", row.runs},
               {"threads", row.threads},
               {"cache", row.cache},
               {"build_core_s", row.build_core_s},
               {"bytes_per_token", row.bytes_per_token},
               {"recall_at_100", row.recall_at_100},
               {"mass", row.mass},
               {"rel_l2", row.rel_l2},
               {"rel_l2_p95", row.rel_l2_p95},
               {"rel_l2_max", row.rel_l2_max},
               {"queries", row.queries},
               {"lost", row.lost},
               {"heavy", row.heavy},
               {"heavy_missed", row.heavy_missed},
               {"missed_share", row.missed_share},
               {"partial_rel_l2", row.partial_rel_l2},
               {"predicted_error", OrNull(row.predicted_error)},
               {"predicted_within_2x", OrNull(row.predicted_within_2x)},
               {"tokens_retrieved", row.tokens_retrieved},
               {"oracle_tokens", row.oracle_tokens},
               {"bytes_read", row.bytes_read},
               {"us_p50", OrNull(row.us_p50)},
               {"us_mean", OrNull(row.us_mean)},
               {"us_p99", OrNull(row.us_p99)},
               {"scan_us_p50", OrNull(row.scan_us_p50)},
               {"scan_us_mean", OrNull(row.scan_us_mean)}})
      .dump();
}

absl::StatusOr<Row> RowFromJson(const std::string& line) {
  try {
    const Json json = Json::parse(line);
    Row row;
    json.at("index").get_to(row.index);
    json.at("budget").get_to(row.budget);
    json.at("trace").get_to(row.trace);
    json.at("layer").get_to(row.layer);
    json.at("head").get_to(row.head);
    json.at("class").get_to(row.head_class);
    json.at("n").get_to(row.n);
    json.at("runs").get_to(row.runs);
    json.at("threads").get_to(row.threads);
    json.at("cache").get_to(row.cache);
    json.at("build_core_s").get_to(row.build_core_s);
    json.at("bytes_per_token").get_to(row.bytes_per_token);
    json.at("recall_at_100").get_to(row.recall_at_100);
    json.at("mass").get_to(row.mass);
    json.at("rel_l2").get_to(row.rel_l2);
    json.at("rel_l2_p95").get_to(row.rel_l2_p95);
    json.at("rel_l2_max").get_to(row.rel_l2_max);
    json.at("queries").get_to(row.queries);
    json.at("lost").get_to(row.lost);
    row.heavy = json.value("heavy", 0u);  // lines of earlier commits have none
    row.heavy_missed = json.value("heavy_missed", 0u);
    row.missed_share = json.value("missed_share", 0.0);
    json.at("partial_rel_l2").get_to(row.partial_rel_l2);
    row.predicted_error = FromNull(json.at("predicted_error"));
    row.predicted_within_2x = FromNull(json.at("predicted_within_2x"));
    json.at("tokens_retrieved").get_to(row.tokens_retrieved);
    json.at("oracle_tokens").get_to(row.oracle_tokens);
    json.at("bytes_read").get_to(row.bytes_read);
    row.us_p50 = FromNull(json.at("us_p50"));
    row.us_mean = FromNull(json.at("us_mean"));
    row.us_p99 = FromNull(json.at("us_p99"));
    // Lines of earlier commits have none.
    row.scan_us_p50 = FromNull(json.value("scan_us_p50", Json()));
    row.scan_us_mean = FromNull(json.value("scan_us_mean", Json()));
    return row;
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat("not a row of results: ", e.what()));
  }
}

}  // namespace quarry::perf

// What indexing_bench prints, as a table or as JSON lines.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "absl/time/time.h"

namespace quarry::perf {

// What the daemon says of its indexes.
struct IndexState {
  double runs = 0, indexed = 0, queued = 0;
  double built = 0, relearned = 0, failed = 0;  // since the start
};

struct IndexingPhase {
  std::string name;
  std::vector<double> us;  // of its steps
  double seconds = 0;
  IndexState begin, end;  // at the end of the phase before and of this one
  double index_core_s = 0;
  bool complete = true;  // false: the limit came first
};

// The indexes of one context from the beginning of their making to their end.
struct IndexBuild {
  std::string name;  // what was indexed, and beside what
  absl::Time start;  // of `seconds`
  double seconds = 0, core_s = 0;
  IndexState begin, end;
};

enum class IndexingFormat { kTable, kJson };

class IndexingReport {
 public:
  struct Options {
    IndexingFormat format = IndexingFormat::kTable;
    nlohmann::json labels;  // of every JSON line
    double heads = 0;       // of one context's runs
    double gib = 0;         // of their K and V
  };
  explicit IndexingReport(Options options) : options_(std::move(options)) {}

  // Its steps are kept for Compare.
  void Add(uint32_t round, const IndexingPhase& phase);
  void Add(uint32_t round, const IndexBuild& build);
  // The steps of all rounds in one phase, with those in another.
  void Compare(const std::string& name, const std::string& with) const;

 private:
  bool json() const { return options_.format == IndexingFormat::kJson; }
  void Print(const char* line, const std::string& name, const nlohmann::json& fields) const;

  const Options options_;
  std::map<std::string, std::vector<double>> steps_;  // microseconds, by phase
};

}  // namespace quarry::perf

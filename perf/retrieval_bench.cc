// Retrieval: every index under every budget, over the heads of traces, beside the exact scan and
// the oracle.
//
// Workload: traces from files (--traces), made heads with the structure of real ones (--synthetic),
// or random numbers (--random); with none of these the default set, made heads of every family
// (perf/retrieval/default_set.h). For each KV head of a trace, its decode queries with their whole
// group. Retrieved from is what the window (first 128, last 512 tokens) leaves; tokens that every
// query sees are indexed in `runs` equal runs, the few behind them are scanned.
// Errors: against exact attention in double over the same rounded K, V and q, after the merge with
// the exact window (rel_l2) and before it (partial_rel_l2). Heads are classed by exact replay of
// training queries alone (perf/retrieval/head_class.h).
// Time: one answer for a whole group. The heads take turns, and before each turn as much memory as
// the last-level cache holds is read, out of 2 GiB with the heads', so that no answer finds anything
// of its head in a cache. Several threads answer at once, each another KV head, and at most as many
// as a trace has.
// Bytes: every line touched of centroids, codes, links, keys and values; what several queries of a
// group share counts once.
// Floor: the oracle, which knows all scores and reads only the best tokens' keys and values.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cpu_index/simd.h"
#include "perf/retrieval/default_set.h"
#include "perf/retrieval/index_specs.h"
#include "perf/retrieval/random_trace.h"
#include "perf/retrieval/report.h"
#include "perf/retrieval/row.h"
#include "perf/retrieval/synthetic_trace.h"
#include "perf/retrieval/trace_bench.h"
#include "perf/trace.h"
#include "proto/status_macros.h"

namespace quarry::perf {
namespace {

constexpr uint32_t kTrainQueries = 64;  // of random and synthetic traces

struct Settings {
  std::vector<std::string> traces;        // directories
  std::vector<uint32_t> random;           // tokens of random traces
  std::vector<std::string> synthetic;     // families
  std::vector<uint32_t> tokens = {32768};  // of synthetic traces
  std::vector<std::string> indexes;       // beginnings of names; none: all
  std::vector<std::string> budgets;       // likewise
  std::vector<uint32_t> runs = {1};
  std::vector<uint32_t> threads = {1, 0};  // 0: all
  std::optional<uint32_t> train_queries;  // positions, of traces that are made
  uint32_t seed = 1;
  std::vector<std::string> from;  // files of earlier results
  std::string report;             // file
  std::string commit = "unknown";
  std::string command;
  BenchSettings bench;
};

bool Chosen(const std::vector<std::string>& beginnings, const std::string& name) {
  return beginnings.empty() ||
         std::any_of(beginnings.begin(), beginnings.end(),
                     [&](const std::string& beginning) { return name.starts_with(beginning); });
}

// `indexes`: beginnings of names too, beside those of the settings.
std::vector<IndexSpec> ChosenSpecs(const Settings& settings,
                                   const std::vector<std::string>& indexes) {
  std::vector<IndexSpec> all = AllSpecs(settings.seed);
  std::erase_if(all, [&](const IndexSpec& spec) {
    return !Chosen(settings.indexes, spec.name) || !Chosen(indexes, spec.name);
  });
  for (IndexSpec& spec : all) {
    std::erase_if(spec.searches, [&](const SearchSpec& search) {
      return !Chosen(settings.budgets, BudgetName(search.budget));
    });
  }
  std::erase_if(all, [](const IndexSpec& spec) { return spec.searches.empty(); });
  return all;
}

// Whether each beginning is one of a name.
absl::Status CheckBeginnings(const char* option, const std::vector<std::string>& beginnings,
                             const std::set<std::string>& names) {
  for (const std::string& beginning : beginnings) {
    const auto at = names.lower_bound(beginning);
    if (at != names.end() && at->starts_with(beginning)) continue;
    return absl::InvalidArgumentError(absl::StrCat(option, ": no name begins with ", beginning,
                                                   "; there are ", absl::StrJoin(names, ", ")));
  }
  return absl::OkStatus();
}

absl::Status CheckChoice(const Settings& settings) {
  std::set<std::string> indexes, budgets;
  for (const IndexSpec& spec : AllSpecs(settings.seed)) {
    indexes.insert(spec.name);
    for (const SearchSpec& search : spec.searches) budgets.insert(BudgetName(search.budget));
  }
  QUARRY_RETURN_IF_ERROR(CheckBeginnings("--indexes", settings.indexes, indexes));
  QUARRY_RETURN_IF_ERROR(CheckBeginnings("--budgets", settings.budgets, budgets));
  if (!ChosenSpecs(settings, {}).empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("none of --indexes ", absl::StrJoin(settings.indexes, " "),
                   " is measured under --budgets ", absl::StrJoin(settings.budgets, " ")));
}

absl::Status MeasureTrace(const Trace& trace, const Settings& settings,
                          const TraceBench::Sink& sink,
                          const std::vector<std::string>& indexes = {}) {
  absl::StatusOr<std::unique_ptr<TraceBench>> bench = TraceBench::Create(trace, settings.bench);
  if (!bench.ok()) return bench.status();
  (*bench)->MeasureOracle(sink);
  for (const IndexSpec& spec : ChosenSpecs(settings, indexes)) {
    for (uint32_t runs : settings.runs) {
      if (absl::Status status = (*bench)->Measure(spec, runs, sink); !status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

// One file in memory at a time.
absl::Status MeasureDirectory(const std::string& directory, const Settings& settings,
                              const TraceBench::Sink& sink) {
  QUARRY_ASSIGN_OR_RETURN(const std::vector<std::string> paths, ListTraces(directory));
  for (const std::string& path : paths) {
    QUARRY_ASSIGN_OR_RETURN(const Trace trace, ReadTrace(path));
    QUARRY_RETURN_IF_ERROR(MeasureTrace(trace, settings, sink));
  }
  return absl::OkStatus();
}

absl::Status MeasureDefaultSet(const Settings& settings, const TraceBench::Sink& sink) {
  for (const MadeSet& set : DefaultSet()) {
    const RandomTraceOptions shape{
        .tokens = set.tokens,
        .kv_heads = set.kv_heads,
        .train_queries = settings.train_queries.value_or(set.train_queries),
        .seed = settings.seed};
    if (ChosenSpecs(settings, set.indexes).empty()) continue;
    for (const std::string& family : SyntheticFamilies()) {
      QUARRY_ASSIGN_OR_RETURN(const Trace trace, SyntheticTrace(family, shape));
      QUARRY_RETURN_IF_ERROR(MeasureTrace(trace, settings, sink, set.indexes));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadRows(const std::string& path, std::vector<Row>* rows) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat(path, " cannot be read"));
  size_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    absl::StatusOr<Row> row = RowFromJson(line);
    if (!row.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ":", number, ": ", std::string(row.status().message())));
    }
    rows->push_back(std::move(*row));
  }
  return absl::OkStatus();
}

// The processor's name and how many of it, from the system.
std::string Machine() {
  std::ifstream file("/proc/cpuinfo");
  std::string name = "unknown processor";
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("model name")) continue;
    name = line.substr(line.find(':') + 2);
    break;
  }
  return absl::StrCat(name, ", ", std::thread::hardware_concurrency(), " processors, level ",
                      Kernels().name);
}

absl::Status WriteReport(const Settings& settings, const std::vector<Row>& rows) {
  if (settings.report.empty()) return absl::OkStatus();
  std::ofstream file(settings.report);
  file << HtmlReport({Machine(), settings.commit, settings.command}, rows);
  file.close();
  return file ? absl::OkStatus()
              : absl::UnavailableError(absl::StrCat(settings.report, " cannot be written"));
}

absl::Status Run(const Settings& settings) {
  if (absl::Status status = ChooseSimdLevel().status(); !status.ok()) return status;
  QUARRY_RETURN_IF_ERROR(CheckChoice(settings));
  std::vector<Row> rows;
  for (const std::string& path : settings.from) {
    if (absl::Status status = ReadRows(path, &rows); !status.ok()) return status;
  }
  const TraceBench::Sink sink = [&rows](const Row& row) {
    std::printf("%s\n", RowToJson(row).c_str());
    std::fflush(stdout);
    rows.push_back(row);
  };
  const uint32_t train_queries = settings.train_queries.value_or(kTrainQueries);
  for (const std::string& directory : settings.traces) {
    QUARRY_RETURN_IF_ERROR(MeasureDirectory(directory, settings, sink));
  }
  for (const std::string& family : settings.synthetic) {
    for (uint32_t tokens : settings.tokens) {
      QUARRY_ASSIGN_OR_RETURN(const Trace trace,
                              SyntheticTrace(family, {.tokens = tokens,
                                                     .train_queries = train_queries,
                                                     .seed = settings.seed}));
      QUARRY_RETURN_IF_ERROR(MeasureTrace(trace, settings, sink));
    }
  }
  for (uint32_t tokens : settings.random) {
    const Trace trace = RandomTrace(
        {.tokens = tokens, .train_queries = train_queries, .seed = settings.seed});
    if (absl::Status status = MeasureTrace(trace, settings, sink); !status.ok()) return status;
  }
  if (settings.traces.empty() && settings.synthetic.empty() && settings.random.empty() &&
      settings.from.empty()) {
    QUARRY_RETURN_IF_ERROR(MeasureDefaultSet(settings, sink));
  }
  return WriteReport(settings, rows);
}

}  // namespace
}  // namespace quarry::perf

int main(int argc, char** argv) {
  quarry::perf::Settings settings;
  CLI::App app(absl::StrCat(
      "Indexes and budgets over traces, as JSON lines; QUARRY_SIMD chooses the level. Unless traces "
      "are named: ",
      quarry::perf::DefaultSetText()));
  app.add_option("--traces", settings.traces, "directories of traces, *.safetensors");
  app.add_option("--random", settings.random, "tokens of random traces");
  CLI::Option* const synthetic =
      app.add_option("--synthetic", settings.synthetic,
                     absl::StrCat("families of hard heads: ",
                                  absl::StrJoin(quarry::perf::SyntheticFamilies(), ", ")))
          ->delimiter(',');
  app.add_option("--tokens", settings.tokens, "of synthetic traces")
      ->delimiter(',')
      ->needs(synthetic);
  app.add_option("--indexes", settings.indexes, "only indexes whose names begin like these");
  app.add_option("--budgets", settings.budgets, "only budgets whose names begin like these");
  app.add_option("--runs", settings.runs, "runs that an index is cut into")
      ->check(CLI::PositiveNumber);
  app.add_option("--threads", settings.threads, "answers at once; 0: as many as processors");
  app.add_option("--train-queries", settings.train_queries,
                 absl::StrCat("positions whose queries are sampled, of traces that are made; ",
                              quarry::perf::kTrainQueries, ", or as the default set says"))
      ->check(CLI::PositiveNumber);
  app.add_option("--queries", settings.bench.queries, "test queries a head")
      ->check(CLI::PositiveNumber);
  app.add_option("--samples", settings.bench.samples, "timed answers a head; 0: no timing");
  app.add_flag("--beside-scan", settings.bench.beside_scan,
               "time an exact scan in turns with every answer: scan_us_p50, scan_us_mean");
  app.add_option("--kv-heads", settings.bench.kv_heads, "only the first KV heads; 0: all");
  app.add_option("--working-set", settings.bench.working_set_bytes, "bytes");
  app.add_option("--seed", settings.seed, "of traces that are made, and of indexes");
  app.add_option("--report", settings.report, "HTML file to write");
  app.add_option("--from", settings.from, "results of earlier runs, for the report");
  app.add_option("--commit", settings.commit, "what is measured, for the report");
  CLI11_PARSE(app, argc, argv);
  for (int i = 0; i < argc; ++i) absl::StrAppend(&settings.command, i > 0 ? " " : "", argv[i]);
  for (uint32_t& threads : settings.threads) {
    if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  }
  settings.bench.threads = settings.threads;
  if (absl::Status status = quarry::perf::Run(settings); !status.ok()) {
    std::fprintf(stderr, "retrieval_bench: %s\n", status.ToString().c_str());
    return 1;
  }
  return 0;
}

// TraceBench: all of one trace's heads, measured with one index after the other.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "perf/retrieval/head_class.h"
#include "perf/retrieval/head_memory.h"
#include "perf/retrieval/index_specs.h"
#include "perf/retrieval/indexed_head.h"
#include "perf/retrieval/row.h"
#include "perf/retrieval/truth.h"
#include "perf/trace.h"

namespace quarry::perf {

struct BenchSettings {
  Window window;
  // Test queries a head, evenly chosen, each with the whole group. Of the trace's others as many,
  // if there are, come before them and are neither judged nor timed: they teach what answers learn
  // from live queries, as decoding would have.
  uint32_t queries = 12;
  uint32_t samples = 8;    // timed answers a head; 0: no timing
  std::vector<uint32_t> threads = {1};
  bool beside_scan = false;  // each answer timed in turns with an exact scan of the same
  uint32_t kv_heads = 0;   // only the first so many; 0: all
  size_t working_set_bytes = size_t{2} << 30;
};

class TraceBench {
 public:
  using Sink = std::function<void(const Row&)>;

  // Computes the exact answers with all processors. The trace outlives this. InvalidArgument: no
  // test query has a token beside its window.
  static absl::StatusOr<std::unique_ptr<TraceBench>> Create(const Trace& trace,
                                                            const BenchSettings& settings);

  // Builds the index of every head in `runs` runs, and gives a row for each search, number of
  // threads and head.
  absl::Status Measure(const IndexSpec& spec, uint32_t runs, const Sink& sink) const;
  // Rows of the best tokens by exact scores, with as many for each query as an error needs.
  void MeasureOracle(const Sink& sink) const;

  HeadClass head_class(uint32_t kv_head) const { return heads_[kv_head].head_class; }

 private:
  struct Head {
    HeadMemory memory;
    HeadClass head_class;
    std::vector<float>
        q;  // [queries + earlier ones][group][head_dim], rounded to the trace's dtype
    std::vector<QueryTruth> truth;  // [queries][group]
    std::vector<float> window;      // as q, without head_dim: log lengths of what the window holds
  };
  using Heads = std::vector<std::unique_ptr<IndexedHead>>;
  using Times = std::vector<std::vector<double>>;  // microseconds by head
  struct Timed {
    Times answers, scans;
  };

  TraceBench(const Trace& trace, const BenchSettings& settings)
      : trace_(trace), settings_(settings) {}
  void ChooseQueries();
  void AddHead(uint32_t kv_head);
  void ComputeTruths(uint32_t kv_head, Head* head) const;
  absl::StatusOr<std::unique_ptr<IndexedHead>> BuildHead(const IndexSpec& spec, uint32_t runs,
                                                         uint32_t kv_head) const;
  absl::StatusOr<Heads> BuildAll(const IndexSpec& spec, uint32_t runs) const;
  QueryBlock Queries(const Head& head, uint32_t query, std::span<const TokenRange> ranges) const;
  std::span<const float> Elsewhere(const Head& head, uint32_t query) const;
  std::vector<TokenRange> Ranges(uint32_t query) const;
  Row RowOf(uint32_t kv_head) const;
  // What the head's answers have learned is what earlier queries taught under that budget.
  void Teach(const Head& head, IndexedHead* indexed, const Budget& budget) const;
  void FillQuality(const Head& head, const IndexedHead& indexed, const SearchSpec& search,
                   Row* row) const;
  // scans: the exact index of every head, or none.
  Timed Time(const Heads& heads, const Heads& scans, const Budget& budget, uint32_t threads) const;

  const Trace& trace_;
  const BenchSettings settings_;
  std::vector<uint32_t> chosen_;  // test queries, as indexes into the trace's; earlier ones behind
  uint32_t tests_ = 0;            // of them
  TokenRange indexed_;            // what every chosen query sees beside its window
  uint32_t end_ = 0;              // one past the last token that some query retrieves from
  std::vector<Head> heads_;
  std::unique_ptr<WorkingSet> working_set_;  // null: no timing
};

}  // namespace quarry::perf

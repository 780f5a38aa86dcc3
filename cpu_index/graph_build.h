// Links between keys by which those that a query wants are found, made from sampled queries.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/key_index.h"

namespace quarry {

struct GraphOptions {
  uint32_t query_keys = 100;  // N_q: nearest keys of a training query that it ties together
  uint32_t links = 31;        // M: with their number, two lines of memory a key
  uint32_t entries = 256;     // keys where a search begins
  uint32_t threads = 1;       // of the build; any number gives the same graph
};

// A directed graph of one run's keys, every one of which can be reached from the entries.
class GraphLinks {
 public:
  static constexpr uint32_t kLineLinks = 16;

  GraphLinks() = default;
  GraphLinks(uint32_t keys, uint32_t links)
      : keys_(keys),
        links_(links),
        key_lines_((1 + links + kLineLinks - 1) / kLineLinks),
        lines_(size_t{keys} * key_lines_) {}

  uint32_t keys() const { return keys_; }
  uint32_t links() const { return links_; }  // room of a key
  std::span<const uint32_t> Of(uint32_t key) const {
    const uint32_t* const row = lines_[size_t{key} * key_lines_].word;
    return {row + 1, row[0]};
  }
  // Where a key's links lie: how many, they, then anything; 64-byte aligned.
  uint32_t* Row(uint32_t key) { return lines_[size_t{key} * key_lines_].word; }
  const uint32_t* Row(uint32_t key) const { return lines_[size_t{key} * key_lines_].word; }
  uint64_t memory_bytes() const {
    return lines_.size() * sizeof(Line) + entries.size() * sizeof(uint32_t);
  }

  std::vector<uint32_t> entries;  // keys where searches begin, rising

 private:
  struct alignas(64) Line {
    uint32_t word[kLineLinks] = {};
  };
  uint32_t keys_ = 0, links_ = 0, key_lines_ = 0;
  std::vector<Line> lines_;
};

// queries: [n][head_dim], sampled, of all heads of the group, in the order of their positions; may
// be empty: then the graph is one of near keys. Values are not read.
// The links are RoarGraph's projection of what queries attend (arXiv 2408.08933, section 4) with
// the lists of all queries of a pivot united. In place of RoarGraph's search of the graph for every
// key, a key is also linked to keys near it among those that the same query found, and among those
// of its part of a bisection.
// InvalidArgument: no keys, options of 0, links below 4 or above 255, queries that are no whole
// rows.
// Cost: n * keys * head_dim for the queries' keys; see perf/README.md for how long it takes.
absl::StatusOr<GraphLinks> BuildGraph(const KvView& run, std::span<const float> queries,
                                      const GraphOptions& options);

}  // namespace quarry

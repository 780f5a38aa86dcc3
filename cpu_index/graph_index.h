// The attention-aware graph: keys that sampled queries attend together are linked.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/graph_build.h"
#include "cpu_index/key_index.h"

namespace quarry {

// An index of one run, of a whole group's queries. It reads the run's own keys, a few percent of
// them, in no order, and holds nothing but links. Score returns every key that it read, with its
// exact score, for each query of whose range it is. Thread-safe but for set_queue.
class GraphIndex final : public TokenIndex {
 public:
  // As BuildGraph.
  static absl::StatusOr<std::unique_ptr<GraphIndex>> Build(const KvView& run,
                                                           std::span<const float> queries,
                                                           const GraphOptions& options);
  // What Serialize made. DataLoss or InvalidArgument: anything else.
  static absl::StatusOr<std::unique_ptr<GraphIndex>> Deserialize(std::span<const std::byte> bytes);
  // Equal graphs have equal bytes.
  std::vector<std::byte> Serialize() const;

  std::string_view kind() const override { return "graph"; }
  bool Fits(const KvView& run) const override {
    return run.tokens().size() == tokens_.size() && run.head_dim == head_dim_;
  }
  void AttendAll(const KvView& run, const QueryBlock& queries,
                 std::span<Partial> acc) const override;
  void Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const override;
  void Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
              const RunAllotment& allotment, std::span<Partial> acc) const override;

  // L: how many of the best keys it has met must have had their links followed, for each query,
  // before a search ends. Not while the index is searched.
  void set_queue(uint32_t queue) { queue_ = queue; }
  uint64_t memory_bytes() const { return links_.memory_bytes(); }
  const GraphLinks& links() const { return links_; }

 private:
  GraphIndex(TokenRange tokens, uint32_t head_dim, GraphLinks links)
      : tokens_(tokens), head_dim_(head_dim), links_(std::move(links)) {}

  const TokenRange tokens_;
  const uint32_t head_dim_;
  const GraphLinks links_;
  uint32_t queue_ = 128;
};

}  // namespace quarry

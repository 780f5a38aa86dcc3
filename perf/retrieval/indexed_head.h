// One KV head cut into runs, each with its index, and answers from all of them together.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/cluster_search.h"
#include "perf/retrieval/head_memory.h"
#include "perf/retrieval/index_specs.h"

namespace quarry::perf {

// Immutable but for Prepare, and for what its answers teach its history; what it was built from
// outlives it.
class IndexedHead {
 public:
  struct Unit {
    const TokenIndex* index = nullptr;
    // Under a tolerated error searched in its place, with those of other units; may be null.
    const ClusterIndex* clusters = nullptr;
    std::vector<KvSegment> segments;
    KvView view;
  };

  // `runs` runs of equal length over `indexed`, and a tail that is scanned up to `end`.
  // input.runs is set here. Time counts this thread alone, or the whole process, as the spec says.
  static absl::StatusOr<std::unique_ptr<IndexedHead>> Build(const IndexSpec& spec,
                                                            const HeadMemory& memory,
                                                            TokenRange indexed, uint32_t end,
                                                            uint32_t runs, BuildInput input);

  void Prepare(const SearchSpec& search);  // not while answers are made
  // The history of answers under a tolerated error begins anew. Not while answers are made.
  void Forget() { history_ = std::make_unique<ScanHistory>(); }
  ScanHistory* history() const { return history_.get(); }
  bool has_clusters() const;
  std::span<const Unit> units() const { return units_; }
  double build_core_s() const { return build_core_s_; }  // of all threads that worked on it
  double bytes_per_token() const { return bytes_per_token_; }

 private:
  std::vector<Unit> units_;
  std::vector<std::unique_ptr<KeyIndex>> own_;
  std::unique_ptr<ScanHistory> history_ = std::make_unique<ScanHistory>();
  double build_core_s_ = 0;
  double bytes_per_token_ = 0;
};

// Answers queries as the daemon does: every unit scores, the budget shares out, every unit refines; or,
// under a tolerated error, units without clusters are attended whole, then all clusters are searched.
// Keeps its buffers from one answer to the next. For one thread.
class HeadAnswer {
 public:
  // lists: for Attended; an answer that is timed does without.
  explicit HeadAnswer(bool lists = true) : lists_(lists) {}

  // queries.ranges bound the units' tokens. Overwrites the last answer.
  // elsewhere: [queries] as ClusterLimits::other_length, of the window.
  void Answer(const IndexedHead& head, const QueryBlock& queries,
              std::span<const float> elsewhere, const Budget& budget);

  std::span<const Partial> partials() const { return partials_; }  // by query
  uint64_t bytes() const;                                          // of all queries together
  // Under budgets that drop what they do not attend: the share of the mass that they do not.
  double lost_mass(uint32_t query) const { return lost_mass_[query]; }
  // The tokens that the query attended, exactly or by their rows. Needs lists.
  std::vector<uint32_t> Attended(const IndexedHead& head, const QueryBlock& queries,
                                 uint32_t query) const;

 private:
  void Reset(const QueryBlock& queries, size_t units);
  void AnswerWithin(const IndexedHead& head, const QueryBlock& queries,
                    std::span<const float> elsewhere, float error);

  const bool lists_;
  bool whole_ = false;  // units of tokens were attended without scores
  bool searched_ = false;  // clusters were
  std::vector<uint32_t> refined_;          // of clusters, by any query
  std::vector<CoarseScores> coarse_;       // by unit
  std::vector<RunAllotment> allotments_;   // by unit
  std::vector<float> acc_;
  std::vector<Partial> partials_;
  std::vector<double> lost_mass_;
};

}  // namespace quarry::perf

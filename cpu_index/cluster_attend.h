// What a search of clustered indexes holds; its own files include this, and its calibration.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu_index/cluster_search.h"
#include "cpu_index/error_cut.h"
#include "cpu_index/coded_queries.h"
#include "cpu_index/kernels.h"
#include "cpu_index/scratch.h"

namespace quarry {

// What a full node counts more than one token, in logs.
inline const float kLogLeaf = std::log(static_cast<float>(kLeafRows));
inline const float kLogSuper = std::log(static_cast<float>(kSuperRows));

// Memory of a thread's searches. Rows are of a query each; their lengths are what the search says.
// Nodes and tokens of all runs stand one behind another; supers of a run begin at a multiple of 16.
struct ClusterScratch {
  Scratch<float> copy, super_score, leaf_score, leaf_centre, token_score, centre;
  Scratch<uint32_t> opened_supers;  // rising
  Scratch<uint32_t> local;          // of some of them, within their run
  Scratch<uint32_t> outliers;       // as `opened`
  // Leaves: an entry of `opened` is a place in a row of leaf_score, and rising; opened_leaf is the
  // same leaf within its run; run_ends says where each run's end among them.
  Scratch<uint32_t> opened, opened_leaf, run_ends;
  // Tokens whose rows are read, rising: entries are places in a row of token_score.
  Scratch<uint32_t> taken, ranked, row_place;
  Scratch<float> row_score, leaf_sum, super_sum, leaf_weight;
  Scratch<uint32_t> weighty;
  Scratch<std::byte> gathered;  // keys and values of tokens
};

// One search: Look finds what is opened, Attend reads and estimates.
class ClusterSearch {
 public:
  ClusterSearch(std::span<const ClusterRun> runs, const QueryBlock& queries,
                const ClusterLimits& limits, ClusterScratch* scratch);
  void Look();
  void Attend(std::span<Partial> acc, std::vector<uint32_t>* refined);
  // After Attend: which share of the square of a query's predicted error adds up over tokens and groups.
  float TogetherShare(uint32_t query) const {
    const ErrorCut& cut = cuts_[query];
    return cut.error > 0 ? cut.together * cut.together / (cut.error * cut.error) : 0;
  }

 private:
  using Depth = ClusterLimits::Depth;

  // cluster_search.cc
  void MakeReady();
  std::span<const float> Coordinates(uint32_t query) const;
  float Elsewhere(uint32_t query) const;
  // Log of the sum of e^x.
  float LogSum(std::span<const float> x);
  float SuperMass(uint32_t query);
  float LeafMass(std::span<const float> scores);
  void ScoreSupers();
  void CountLast(const NodeLevel& level, uint32_t rows, size_t at, float* score, size_t ld) const;
  bool Everything() const;
  void OpenSupers();
  void ScoreLeaves();
  const uint32_t* LocalSupers(size_t run, size_t lo, size_t n);
  void FindOutliers();
  kernels::CodedKeyTile CodeTile(const ClusterIndex::Parts& p, const uint32_t* which,
                                 uint32_t blocks) const;
  std::vector<float> BestByCodes(uint32_t count);
  void OpenLeaves();
  void CloseOpened();
  void ScoreTokens();
  void Mask(size_t run, size_t lo, size_t leaves);

  size_t leaf_row() const { return s_.opened_supers.size() * kLeavesPerSuper; }
  std::span<const float> SuperScores(uint32_t query) const {
    return {s_.super_score.data() + size_t{query} * supers_, supers_};
  }
  std::span<const float> LeafScores(uint32_t query) const {
    return {s_.leaf_score.data() + query * leaf_row(), leaf_row()};
  }
  std::span<const float> LeafCentres(uint32_t query) const {
    return {s_.leaf_centre.data() + query * leaf_row(), leaf_row()};
  }
  // f(run, of its opened supers: the first's place among all, how many)
  template <typename F>
  void ForOpenedSupers(F&& f) const {
    const std::span<const uint32_t> opened = s_.opened_supers.all();
    size_t lo = 0;
    for (size_t r = 0; r < runs_.size(); ++r) {
      size_t hi = lo;
      while (hi < opened.size() && opened[hi] < first_super_[r + 1]) ++hi;
      if (hi > lo) f(r, lo, hi - lo);
      lo = hi;
    }
  }
  // f(run, of its opened leaves: the first's place among all, how many)
  template <typename F>
  void ForOpenedLeaves(F&& f) const {
    size_t lo = 0;
    for (size_t r = 0; r < runs_.size(); lo = s_.run_ends[r++]) {
      if (s_.run_ends[r] > lo) f(r, lo, s_.run_ends[r] - lo);
    }
  }

  // cluster_attend.cc
  size_t token_row() const { return s_.opened.size() * kLeafRows; }
  float* TokenScores(uint32_t query) const { return s_.token_score.data() + query * token_row(); }
  void ForTaken(std::span<const uint32_t> entries, auto&& f) const;
  void RankTokens();
  void WeighGroups(std::span<Partial> parts);
  ErrorCut CutOf(uint32_t query, float top);
  ErrorCut ForcedCut(uint32_t query);
  void TakeTokens();
  void ScoreRows(std::span<const uint32_t> entries, float* out);
  std::vector<uint32_t> SplitExact(std::span<Partial> parts);
  void CountOthers(uint32_t query, std::span<const float> weight);
  void ListTokens(std::span<const uint32_t> entries, std::vector<uint32_t>* out) const;
  void AttendExactly(std::span<const uint32_t> entries, std::span<Partial> acc);
  void AddValues(std::span<Partial> parts);
  void AddTokenValues(std::span<float> sums);
  void AddLeafValues(std::span<const Partial> parts, std::span<float> sums);
  void AddSuperValues(std::span<float> sums);

  const std::span<const ClusterRun> runs_;
  const QueryBlock& queries_;
  const ClusterLimits& limits_;
  const ClusterModel& model_;
  const uint32_t count_;  // queries
  ClusterScratch& s_;

  std::vector<uint32_t> first_super_;  // [runs + 1]
  std::vector<bool> whole_;            // [runs] every query sees all of it
  uint32_t supers_ = 0;                // with gaps
  std::vector<float> coordinates_;     // [queries][head_dim]
  CodedQueries node_, code_;
  CodedQueries row_queries_;  // of those whose rows were wanted
  std::vector<float> leaf_breadth_, super_breadth_, code_variance_;  // [queries], as the rest
  std::vector<ClusterModel::Unrest> unrest_;
  std::vector<float> mass_;         // log of all weights, with what is known to be elsewhere
  std::vector<float> closed_;       // error that closed groups may make, by e^shift
  std::vector<float> ranked_from_;  // or empty: tokens with this score are scored by their rows
  std::vector<ErrorCut> cuts_;         // masses by e^max of the partials
  std::vector<float> by_code_, by_leaf_, by_super_;  // masses estimated by each, by e^shift
  uint64_t bytes_ = 0;
};

}  // namespace quarry

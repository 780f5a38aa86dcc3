// What a search of clustered indexes consists of; its own files include this.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cpu_index/cluster_search.h"
#include "cpu_index/coded_queries.h"
#include "cpu_index/error_cut.h"
#include "cpu_index/kernels.h"
#include "cpu_index/scratch.h"

namespace quarry {

// What a full node counts more than one token, in logs.
inline const float kLogLeaf = std::log(static_cast<float>(kLeafRows));
inline const float kLogSuper = std::log(static_cast<float>(kSuperRows));

// A token whose weight is this share of the tolerated error stands out: its leaf is opened.
inline constexpr float kOutlierShare = 1.0f / 32;

// Log of e^a + e^b.
float LogAdd(float a, float b);

// Tokens whose scale is at least this are coarse. Their scales are told apart by eighths, to where
// nothing changes any more.
inline constexpr float kLeastCoarse = 1.1875f, kStepsPerScale = 8;
inline constexpr uint32_t kScaleSteps = 64;

// The queries of a search. Constant once they are made ready for its model, which takes a while.
struct ClusterQueries {
  ClusterQueries(const ClusterModel& head, const QueryBlock& queries, const ClusterLimits& limited);

  // By the quantisers of any run's parts: those of a model are the same.
  void Prepare(const ClusterIndex::Parts& parts);
  // After Prepare, by searches that score tokens.
  void PrepareCoarse();
  bool prepared() const { return !coordinates.empty(); }
  uint32_t count() const { return block.queries; }
  std::span<const float> Coordinates(uint32_t query) const {
    return std::span(coordinates).subspan(size_t{query} * block.head_dim, block.head_dim);
  }
  // In the units of the tokens' weights.
  float Elsewhere(uint32_t query) const;
  uint32_t MostTokens(uint32_t query) const;

  const ClusterModel& model;
  const QueryBlock& block;
  const ClusterLimits& limits;
  const float tolerance;  // that is aimed at
  const bool every_code;  // read, to find tokens that stand out
  std::vector<float> coordinates;  // [queries][head_dim]
  CodedQueries node, code, row;
  std::vector<float> leaf_breadth, super_breadth;  // [queries], as the rest
  std::vector<float> code_variance;                // as ClusterModel's, and no more than its most
  // [queries] by how much codes may miss the score of a token of scale 1; of others, that by their
  // scale.
  std::vector<float> code_miss;
  // [queries] what coarse tokens weigh more by their codes than with a scale of 1, and by how much
  // more than their weight they count in errors; both logs, by the steps of their scale above 1.
  struct Coarse {
    float spread[kScaleSteps], unrest[kScaleSteps];
  };
  std::vector<Coarse> coarse;
  std::vector<ClusterModel::Unrest> unrest;
  std::vector<bool> trusted;  // what is estimated for it
};

// Memory of a part of a search. Rows are of a query each; their lengths are what the part says.
// Nodes and tokens of all its runs stand one behind another; supers of a run begin at a multiple of 16.
struct ClusterScratch {
  Scratch<float> copy, super_score, leaf_score, leaf_centre, token_score, centre, rank;
  Scratch<uint32_t> opened_supers;  // rising
  Scratch<uint32_t> local;          // of some of them, within their run
  Scratch<uint32_t> outliers;       // as `opened`
  // Leaves: an entry of `opened` is a place in a row of leaf_score, and rising; opened_leaf is the
  // same leaf within its run; run_ends says where each run's end among them.
  Scratch<uint32_t> opened, opened_leaf, run_ends;
  // Tokens whose rows are read, rising: entries are places in a row of token_score.
  Scratch<uint32_t> taken, ranked, row_place;
  // Uncoded tokens, rising: first places of all tokens of the opened supers, then, of the opened
  // leaves, as `taken`; and their scores, [known][queries].
  Scratch<uint32_t> known;
  Scratch<float> known_score, uncoded_score;
  Scratch<float> token_scale;  // a row like those of token_score
  // Tokens whose codes are coarse, entries rising, and the steps of their scales.
  Scratch<uint32_t> coarse, coarse_step;
  Scratch<float> row_score, leaf_sum, leaf_weight;
  Scratch<uint32_t> weighty;
  Scratch<std::byte> gathered;  // keys and values of tokens
};

// What a part finds out about a query, stage after stage.
struct ClusterFindings {
  // Log of what the part weighs, of the runs that are seen whole: a part of another may be the lesser
  // one, and what is hidden must not make other errors matter less.
  float mass = 0;
  float centre_mass = 0;   // the same by the leaves' centres alone, a lower bound
  ScoreHistogram weights;  // of what was scored last: supers, leaves, tokens
  ScoreHistogram centres;  // of leaves, where every code is read
  // Weights estimated by each, by e^max.
  float max = 0, by_code = 0, by_leaf = 0, by_super = 0;
  // Of what other queries had read: weights of tokens that this one had left to their codes.
  float others = 0, others_squares = 0;
};

// How a stage goes on, by query.
struct TokenFloors {
  std::vector<float> outlier;  // a leaf is opened with a token that may score as much
  std::vector<float> known;    // with an uncoded key that does
  std::vector<float> leaf;     // and with at least this weight
  // Tokens are scored by their rows that score so much by their codes, or may do by `heavy`.
  std::vector<float> ranked, heavy;
};

// Some of a search's runs.
class ClusterPart {
 public:
  ClusterPart(std::span<const ClusterRun> runs, const ClusterQueries& queries);
  ~ClusterPart();

  // The stages, each with what was decided by the findings of all parts after the one before it.
  void ScoreSupers();
  void ScoreLeaves(std::span<const float> super_floors);
  void ScoreTokens(const TokenFloors& floors);
  // least: [queries] weight of all of a query's groups that count. scanned: those for which every
  // key and value is read, and nothing is estimated.
  void Attend(std::span<const ErrorCut> cuts, std::span<const float> least,
              const std::vector<bool>& scanned);

  std::span<const ClusterFindings> findings() const { return found_; }
  // After ScoreTokens of how much tokens err rather than weigh: see ClusterQueries::Coarse.
  std::span<const float> TokenScores(uint32_t query) const {
    return {s_.token_score.data() + query * token_row(), token_row()};
  }
  size_t leaf_row() const { return s_.opened_supers.size() * kLeavesPerSuper; }
  // After Attend: of tokens that were read exactly; estimates of all others, but for the slopes.
  std::span<const Partial> exact() const { return exact_; }
  std::span<const Partial> estimated() const { return estimated_; }
  uint64_t bytes() const { return bytes_; }
  // Appends the tokens that are attended by their rows, or by their keys and values.
  void ListRead(std::vector<uint32_t>* out) const;

 private:
  // cluster_look.cc
  float LogSum(std::span<const float> x);
  float SuperMass(uint32_t query);
  float LeafMass(std::span<const float> scores);
  void CountLast(const NodeLevel& level, uint32_t rows, size_t at, float* score, size_t ld) const;
  void OpenSupers(std::span<const float> floors);
  const uint32_t* LocalSupers(size_t run, size_t lo, size_t n);
  void FindOutliers(const std::vector<float>& floors);
  void FindUncoded(std::vector<float> floors);
  kernels::CodedKeyTile CodeTile(const ClusterIndex::Parts& p, const uint32_t* which,
                                 uint32_t blocks) const;
  void OpenLeaves(const std::vector<float>& floors);
  void CloseOpened();
  void ScoreCodes();
  void FindCoarse();
  void ScoreDoubts();
  void ScoreKnown();
  void Mask(size_t run, size_t lo, size_t leaves);
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
  float* OwnTokenScores(uint32_t query) { return s_.token_score.data() + query * token_row(); }
  float Shift(uint32_t query) const;
  void ForTaken(std::span<const uint32_t> entries, auto&& f) const;
  void RankTokens(const TokenFloors& floors);
  void WeighGroups();
  void TakeTokens(std::span<const ErrorCut> cuts);
  void ScoreRows(std::span<const uint32_t> entries, float* out);
  void PutKnown(std::span<const uint32_t> entries, float* out) const;
  std::vector<uint32_t> SplitExact(std::span<const ErrorCut> cuts);
  std::vector<uint32_t> CoarseSteps(std::span<const uint32_t> entries) const;
  void CountOthers(uint32_t query, float refine, std::span<const float> weight);
  void CountRead(std::span<const uint32_t> exact);
  void ListTokens(std::span<const uint32_t> entries, std::vector<uint32_t>* out) const;
  void AttendExactly(std::span<const uint32_t> entries, const std::vector<bool>& scanned);
  void Estimate(std::span<const ErrorCut> cuts, std::span<const float> least,
                const std::vector<bool>& scanned);
  void Scan(const std::vector<bool>& scanned);
  void AddValues(std::span<const float> least);
  void AddTokenValues(std::span<float> sums);
  void AddLeafValues(std::span<const float> least, std::span<float> sums);
  void AddSuperValues(std::span<float> sums);

  const std::span<const ClusterRun> runs_;
  const ClusterQueries& q_;
  const ClusterModel& model_;
  const uint32_t count_;  // queries
  std::unique_ptr<ClusterScratch> scratch_;
  ClusterScratch& s_;

  std::vector<uint32_t> first_super_;  // [runs + 1]
  std::vector<bool> whole_;            // [runs] every query sees all of it
  uint32_t supers_ = 0;                // with gaps
  std::vector<ClusterFindings> found_;  // [queries]
  std::vector<float> acc_;             // of both
  std::vector<Partial> exact_, estimated_;
  bool scanned_ = false;  // for some query
  uint64_t bytes_ = 0;
};

}  // namespace quarry

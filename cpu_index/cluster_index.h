// The clustered index: groups of keys that lie together, opened where queries look, estimated
// where they do not.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/key_codes.h"
#include "cpu_index/key_index.h"
#include "cpu_index/key_rows.h"
#include "cpu_index/node_level.h"
#include "cpu_index/value_rows.h"

namespace quarry {

// An index of one run, in levels: supers of 256 tokens, leaves of 16, tokens with 16-byte codes of
// their keys, and rows of 4 bits for each number of key and value. A query scores every super; it
// opens those whose estimate would spoil the answer, then leaves of these, then reads the rows of
// tokens that still would, and the keys and values themselves of the few that weigh most. All
// others are estimated: by their mean value, their spread, and how values go with keys inside a
// node. All queries of a block share what is opened. Immutable; thread-safe but for set_open_all.
class ClusterIndex final : public KeyIndex {
 public:
  // queries: [n][head_dim] sampled, scaled as scores are; may be empty.
  static absl::StatusOr<std::unique_ptr<ClusterIndex>> Build(const KvView& run,
                                                             std::span<const float> queries);

  // What Serialize made. DataLoss or InvalidArgument: anything else, and what was made of keys or
  // values so large that not all of its numbers are finite.
  static absl::StatusOr<std::unique_ptr<ClusterIndex>> Deserialize(
      std::span<const std::byte> bytes);
  // Equal runs and queries give equal bytes on machines with the same kernels.
  std::vector<std::byte> Serialize() const;

  std::string_view kind() const override { return "clusters"; }
  bool Fits(const KvView& run) const override {
    return run.tokens().size() == tokens() && run.head_dim == head_dim();
  }
  void AttendAll(const KvView& run, const QueryBlock& queries,
                 std::span<Partial> acc) const override;
  void Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const override;
  // What is not refined is merged into acc as an estimate. What one query has allotted counts for
  // all of the block.
  void Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
              const RunAllotment& allotment, std::span<Partial> acc) const override;

  // The tokens (within the run) that `query` attends exactly, in any order.
  void Selected(const CoarseScores& coarse, const RunAllotment& allotment, uint32_t query,
                std::vector<uint32_t>* out) const;

  // Whether every code is read, as heads need whose mass lies on single tokens that groups hide. Build
  // decides by the sampled queries; to be changed only while it is not searched.
  bool open_all() const { return open_all_; }
  void set_open_all(bool open_all) { open_all_ = open_all; }
  uint64_t memory_bytes() const;

 private:
  struct Search;
  // Tokens whose rows are read.
  struct Rows {
    std::vector<uint32_t> places;  // rising
    std::vector<float> score;      // [queries][places]; -infinity: not by its row, or not to be seen
    uint64_t bytes = 0;
  };
  // What the nodes of a level have inside, on average: tokens around their node's mean.
  struct Inside {
    std::vector<float> slope;       // [head_dim][head_dim] mean of value * (what its node misses
                                    // of its key)^T where queries look
    std::vector<float> covariance;  // [KeyCodes::kCoordinates]^2 mean of dy dy^T
    float variance = 0;             // of a typical query's scores
    float lost_variance = 0;        // the part of it that no coordinate has
    // The variance of this query's scores, by that of a typical one.
    float Breadth(std::span<const float> coordinates) const;
  };
  // How much more than usual a query's scores vary around what they are estimated by, and so errors:
  // factors of token_doubt_, leaf_doubt_ and super_doubt_.
  struct Unrest {
    float token = 1, leaf = 1, super = 1;
  };
  Unrest UnrestOf(std::span<const float> coordinates) const;
  enum class Depth { kSupers, kLeaves, kTokens, kAsNeeded };
  // What Build makes of a run.
  struct Parts {
    QueryBasis basis;               // of all head_dim coordinates
    float lost_variance;            // of a typical query's scores, outside the codes' coordinates
    std::vector<uint32_t> order;    // [tokens] within the run
    KeyCodes codes;                 // in that order, around their leaf's centre: a leaf is a block
    std::vector<uint16_t> scale;    // bf16 [keys_padded] of what each token's codes stand for
    KeyRows key_rows;               // the same of all coordinates
    ValueRows token_values;         // around their leaf's mean
    ValueRows leaf_values;          // the leaves' means, around their super's
    std::vector<uint16_t> super_values;  // bf16 [supers][head_dim]
    NodeLevel leaves, supers;
  };

  explicit ClusterIndex(Parts parts);

  uint32_t tokens() const { return static_cast<uint32_t>(p_.order.size()); }
  uint32_t head_dim() const { return p_.basis.head_dim; }
  // What coarse scores are of: the tokens of opened leaves, then closed leaves, then closed supers.
  struct Listed {
    std::span<const uint32_t> opened, leaves, supers;
    size_t tokens() const { return opened.size() * KeyCodes::kBlockKeys; }
    size_t nodes() const { return tokens() + leaves.size() + supers.size(); }
  };
  // The stretches of coarse scores; the last nodes may have fewer tokens than others.
  enum Stretch { kTokens, kFullLeaves, kLastLeaf, kFullSupers, kLastSuper, kStretches };
  static Listed NodesOf(const CoarseScores& coarse);
  // The places of tokens in the order that an entry stands for.
  TokenRange Places(const Listed& listed, size_t entry) const;

  // cluster_form.cc
  struct Form;

  // cluster_learn.cc
  static Inside LookInside(std::span<const float> rows, uint32_t node_rows, float lost_variance);
  std::vector<double> AttendedShare(const KvView& run, std::span<const float> queries) const;
  void LearnSlopes(const KvView& run, std::span<const float> queries);
  void LearnDoubts(const KvView& run, std::span<const float> queries);
  struct Sampled;
  // How many of each query's best tokens are refined, and whether from rows or exactly.
  struct Refined {
    uint32_t tokens = 0;
    bool exactly = true;
  };
  // [queries][head_dim]
  std::vector<float> Answers(const Sampled& sampled, const CoarseScores& coarse,
                             Refined refined) const;
  // Per query, the squared distance between two answers, by the square of the exact one's length.
  std::vector<double> Errors(const Sampled& sampled, std::span<const float> answers,
                             std::span<const float> wanted) const;
  void Calibrate(const Sampled& sampled);
  void ChooseDepth(const Sampled& sampled);
  std::vector<float> AnswersWithin(const Sampled& sampled, float tolerance) const;
  void CalibrateTokens(const Sampled& sampled, std::span<const Unrest> unrest);

  // cluster_search.cc
  void Look(const KvView& run, const QueryBlock& queries, Depth depth, CoarseScores* out) const;
  void ScoreSupers(const QueryBlock& queries, Search* s) const;
  float CodeVariance(std::span<const float> coordinates) const;
  // Leaves with a token that stands out by its code; rising.
  std::vector<uint32_t> FindOutliers(float tolerance, Search* s) const;
  float BestBy(std::span<const float> centre, const KeyCodes::Query& code, uint32_t count) const;
  void OpenSupers(float tolerance, std::span<const uint32_t> outliers, Search* s) const;
  void ScoreLeaves(Search* s) const;
  void OpenLeaves(float tolerance, std::span<const uint32_t> outliers, Search* s) const;
  // In log: how much more than the least that is refined a token has to weigh to be read exactly.
  float ExactAbove(float refined_doubt) const;
  static uint32_t LeafAt(const Search& s, size_t at);
  void ListNodes(const Search& s, CoarseScores* out) const;
  void ScoreClosed(const Search& s, CoarseScores* out) const;
  void Doubt(const Search& s, CoarseScores* out) const;
  void ScoreTokens(const Search& s, CoarseScores* out) const;
  void Rank(const KvView& run, const Search& s, CoarseScores* out) const;
  static void Bound(CoarseScores* out);
  void MaskTokens(const KvView& run, const QueryBlock& queries, CoarseScores* out) const;

  // cluster_refine.cc
  struct Weights;
  // The entries that some query was allotted, rising.
  static std::vector<uint32_t> Allotted(const CoarseScores& coarse, const RunAllotment& allotment);
  std::vector<uint32_t> PlacesOf(const CoarseScores& coarse, std::span<const uint32_t> taken) const;
  void ScoreRows(const KvView& run, const QueryBlock& queries, Rows* rows) const;
  void AttendExactly(const KvView& run, const QueryBlock& queries,
                     std::span<const uint32_t> places, std::span<Partial> acc) const;
  void Estimate(const QueryBlock& queries, const CoarseScores& coarse,
                std::span<const uint32_t> taken, const Rows& rows, std::span<Partial> acc) const;
  void ListLeaves(const Listed& listed, Weights* w) const;
  void WeighNodes(const CoarseScores& coarse, std::span<const uint32_t> taken, uint32_t query,
                  Weights* w) const;
  void AddValues(const QueryBlock& queries, const Weights& w, std::span<Partial> parts) const;
  void AddLeafValues(const QueryBlock& queries, const Weights& w, std::span<float> sums,
                     std::span<Partial> parts) const;
  void AddSlopes(const QueryBlock& queries, const Weights& w, std::span<Partial> parts) const;

  const Parts p_;
  std::vector<float> most_scale_;  // [leaves]
  Inside inside_leaf_, inside_super_;
  std::vector<float> token_slope_;  // as Inside::slope, of codes
  std::vector<float> code_error_;   // [rank] variance of what codes miss of each coordinate
  // Errors of estimates by the answer's length: of all supers, of all leaves, of all tokens what is
  // common to them, and of a single token; what is left of that when its rows are read.
  float super_doubt_ = 0.5f, leaf_doubt_ = 0.3f, common_doubt_ = 0.1f, token_doubt_ = 1.5f;
  float row_doubt_ = 0.2f;
  float log_length_ = 0;  // of a typical answer
  bool open_all_ = false;
};

}  // namespace quarry

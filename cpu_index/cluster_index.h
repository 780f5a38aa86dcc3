// The clustered index: groups of keys that lie together, opened where queries look, estimated
// where they do not.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/key_codes.h"
#include "cpu_index/key_index.h"
#include "cpu_index/node_level.h"
#include "cpu_index/value_codes.h"

namespace quarry {

// An index of one run, in three levels: supers of 256 tokens, leaves of 16, tokens with 16-byte
// codes. A query scores every super; it opens those whose estimate would spoil the answer, then
// leaves of these, then reads the keys and values of the tokens that still would. All others are
// estimated: by their mean value, their spread, and how values go with keys inside a node.
// All queries of a block share what is opened. Immutable; thread-safe but for set_open_all.
class ClusterIndex final : public KeyIndex {
 public:
  // queries: [n][head_dim] sampled, scaled as scores are; may be empty.
  static absl::StatusOr<std::unique_ptr<ClusterIndex>> Build(const KvView& run,
                                                             std::span<const float> queries);

  std::string_view kind() const override { return "clusters"; }
  void AttendAll(const KvView& run, const QueryBlock& queries,
                 std::span<Partial> acc) const override;
  void Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const override;
  // What is not refined is merged into acc as an estimate.
  void Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
              const RunAllotment& allotment, std::span<Partial> acc) const override;

  // The tokens (within the run) that `query` attends exactly, in any order.
  void Selected(const CoarseScores& coarse, const RunAllotment& allotment, uint32_t query,
                std::vector<uint32_t>* out) const;

  // Every code is read: for heads whose mass lies on single tokens. Not while it is searched.
  void set_open_all(bool open_all) { open_all_ = open_all; }
  uint64_t memory_bytes() const;

 private:
  struct Search;
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
  enum class Depth { kSupers, kLeaves, kTokens, kAsNeeded };

  ClusterIndex(QueryBasis basis, std::vector<uint32_t> order, KeyCodes codes, ValueCodes values,
               NodeLevel leaves, NodeLevel supers);
  void SetScales(std::vector<uint16_t> scale);

  uint32_t tokens() const { return static_cast<uint32_t>(order_.size()); }
  // Nodes of the lists: tokens by their place in the order, then leaves, then supers.
  uint32_t first_leaf() const { return codes_.keys_padded(); }
  uint32_t first_super() const { return first_leaf() + leaves_.nodes(); }
  TokenRange Places(uint32_t node) const;

  // cluster_learn.cc
  static Inside LookInside(std::span<const float> rows, uint32_t node_rows, float lost_variance);
  std::vector<double> AttendedShare(const KvView& run, std::span<const float> queries) const;
  void LearnSlopes(const KvView& run, std::span<const float> queries);
  void LearnDoubts(const KvView& run, std::span<const float> queries);
  struct Sampled;
  // Per query, the squared error of what is estimated where none but the `refined` best tokens of
  // each query are read, by the square of the answer's length.
  std::vector<double> Errors(const Sampled& sampled, const CoarseScores& coarse,
                             uint32_t refined) const;
  void Calibrate(const Sampled& sampled);

  // cluster_search.cc
  void Look(const KvView& run, const QueryBlock& queries, Depth depth, CoarseScores* out) const;
  void ScoreSupers(const QueryBlock& queries, Search* s) const;
  float CodeVariance(std::span<const float> coordinates) const;
  // Leaves with a token that stands out by its code; rising.
  std::vector<uint32_t> FindOutliers(const QueryBlock& queries, float tolerance, Search* s) const;
  void OpenSupers(float tolerance, std::span<const uint32_t> outliers, Search* s) const;
  void OpenLeaves(const QueryBlock& queries, float tolerance, std::span<const uint32_t> outliers,
                  Search* s) const;
  static uint32_t LeafAt(const Search& s, size_t at);
  void ScoreTokens(Search* s) const;
  void List(const KvView& run, const QueryBlock& queries, const Search& s, CoarseScores* out) const;

  // cluster_index.cc
  void Estimate(const QueryBlock& queries, const CoarseScores& coarse,
                const RunAllotment& allotment, std::span<Partial> acc) const;
  void AddTokens(const QueryBlock& queries, const float* q, std::span<const uint32_t> leaves,
                 std::span<const float> weight, std::span<Partial> parts) const;
  static void AddMeans(const NodeLevel& level, std::span<const float> weight,
                       std::span<const float> slope, std::span<const float> query, Partial* part);

  const QueryBasis basis_;
  std::vector<uint32_t> order_;    // [tokens] within the run
  KeyCodes codes_;                 // in that order, around their leaf's centre: a leaf is a block
  std::vector<uint16_t> scale_;    // bf16, of what each token's code stands for
  std::vector<float> most_scale_;  // [leaves]
  ValueCodes values_;              // the same of values, around their leaf's mean
  NodeLevel leaves_, supers_;
  Inside inside_leaf_, inside_super_;
  std::vector<float> token_slope_;  // as Inside::slope, of codes
  std::vector<float> code_error_;   // [rank] variance of what codes miss of each coordinate
  // Errors of estimates by the answer's length: of all supers, of all leaves, of all tokens what is
  // common to them, and of a single token.
  float super_doubt_ = 0.5f, leaf_doubt_ = 0.3f, common_doubt_ = 0.1f, token_doubt_ = 1.5f;
  float log_length_ = 0;  // of a typical answer
  bool open_all_ = false;
};

}  // namespace quarry

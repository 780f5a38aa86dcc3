// What the clustered indexes of one head have in common, however many runs its keys are cut into.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/index_form.h"
#include "cpu_index/key_codes.h"
#include "cpu_index/key_index.h"
#include "cpu_index/key_rows.h"
#include "cpu_index/query_basis.h"
#include "cpu_index/scan_history.h"

namespace quarry {

// The coordinates of keys, the quantisers, and what was learned of estimates: how they are made
// better, and how far they can be trusted. A query is made ready once for all runs of a model.
// Learned from runs of one head, good for later runs of the same head. Constant once calibrated,
// but for its history, and thread-safe then.
struct ClusterModel {
  // What the nodes of a level have inside, on average: tokens around their node's mean.
  struct Inside {
    std::vector<uint16_t> slope;    // bf16 [head_dim][head_dim] mean of value * (what its node
                                    // misses of its key)^T where queries look
    std::vector<float> covariance;  // [KeyCodes::kCoordinates]^2 mean of dy dy^T
    float variance = 0;             // of a typical query's scores
  };
  // How much more than usual a query's scores vary around what they are estimated by, and so errors:
  // factors of the doubts.
  struct Unrest {
    float token = 1, leaf = 1, super = 1;
  };

  QueryBasis basis;         // of all head_dim coordinates
  float lost_variance = 0;  // of a typical query's scores, outside the codes' coordinates
  std::vector<uint16_t> query_map;  // bf16 of the basis's, which queries are made ready by
  std::vector<float> centre_step;   // NodeLevel's, of leaves and supers alike
  // [head_dim] second moments of what tokens differ in from their leaf's centre, and the same after
  // each token was divided by its own length.
  std::vector<float> difference_variance, row_variance;
  std::vector<float> token_deviation, leaf_deviation;  // [head_dim] ValueRows' quantisers
  std::vector<float> code_error;      // [rank] variance of what codes miss of each coordinate
  Inside leaf, super;
  std::vector<uint16_t> token_slope;  // as Inside::slope, of codes

  // Errors of estimates by the answer's length: of all supers, of all leaves, of all tokens what is
  // common to them, and of a single token; what is left of that when its rows are read.
  float super_doubt = 0.5f, leaf_doubt = 0.3f, common_doubt = 0.1f, token_doubt = 1.5f;
  float row_doubt = 0.2f;
  // Errors that were tolerated when doubts were learned, and at each the log of what answers missed
  // by what the doubts promised. Nothing tells what estimates are worth where more than the first
  // is.
  static constexpr std::array<float, 3> kTried = {0.1f, 0.05f, 0.02f};
  static constexpr float kMostCorrection = 1.1f;
  std::array<float, kTried.size()> correction = {};
  // By how much more than predicted answers err in the mean square, of which large errors are the
  // most: predictions are right for most answers, and what is tolerated is asked for over this.
  float caution = 1;
  float log_length = 0;  // of a typical answer
  // Whether every code is read, as heads need whose mass lies on single tokens that groups hide.
  bool open_all = false;
  // Whether searches attend exactly where estimates are not expected to be clearly faster; not
  // while it is calibrated.
  bool scan_if_faster = false;
  // Of the rows that leaves' centres let expect, how many sampled queries needed: about all where
  // mass is spread. 0: nothing is expected, for it is not known, or mass lies on tokens that
  // centres hide.
  static constexpr float kMostNeededRows = 2;
  float needed_rows = 0;
  // The largest of kTried, but for the first, at which searches of sampled queries take longer than
  // is worth while; 0: none.
  float scans_from = 0;
  // The largest variance that a sampled query's scores have over the keys; infinite: not known.
  // Nothing learned tells what estimates are worth for queries that go much further.
  float largest_variance = std::numeric_limits<float>::infinity();
  uint32_t learned_queries = 0;  // that it was calibrated by; 0: its doubts are guesses
  uint32_t learned_tokens = 0;
  // Of searches that are told to use it; not written.
  mutable ScanHistory history;

  uint32_t head_dim() const { return basis.head_dim; }
  uint32_t rank() const;  // of the codes
  // Of the codes: all variances of differences, no maps.
  QueryBasis CodeBasis() const;
  // The variance of a query's scores inside nodes of a level, by that of a typical one: [queries].
  std::vector<float> Breadth(const Inside& inside, std::span<const float> coordinates,
                             uint32_t queries) const;
  // [queries] variance of a token's score around its code's. Weights count on no more than the
  // most: what few tokens with large errors weigh is not told by a variance.
  static constexpr float kMostCodeVariance = 4;
  std::vector<float> CodeVariance(std::span<const float> coordinates, uint32_t queries) const;
  // Of a query's scores over all keys. coordinates: [head_dim].
  float KeyVariance(std::span<const float> coordinates) const;
  // Whether estimates for it are worth what was learned.
  bool Trusts(std::span<const float> coordinates) const;
  Unrest UnrestOf(float code_variance, float leaf_breadth, float super_breadth) const;
  // The factor of all doubts where an error of `tolerance` of a query's own answer is tolerated.
  float CorrectionAt(float tolerance) const;
  // Read for each query block: maps, covariances, slopes.
  uint64_t query_bytes() const;
  uint64_t memory_bytes() const;

  void Write(IndexWriter* out) const;
  // Whether its numbers are ones that Read takes: keys or values may be too large or too small.
  absl::Status Check() const;
  // DataLoss: cut off, or numbers of no model.
  static absl::StatusOr<ClusterModel> Read(IndexReader* in);

 private:
  // Of a query's scores, by what codes have no coordinate for. coordinates: [head_dim].
  float LostVariance(std::span<const float> coordinates) const;
};

}  // namespace quarry

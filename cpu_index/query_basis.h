// The coordinates in which keys are coded and clustered: those that queries tell apart.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/index_form.h"
#include "cpu_index/key_index.h"

namespace quarry {

// A linear map of keys, and its dual of queries, with
//   q.k = q.mean + EncodeQuery(q).(key_map (k - mean)) + what the directions left out would add.
// The map makes a query of the sample's second moment white, then takes the principal directions of
// the keys: distances between encoded keys are differences of scores, for a typical query, and a
// bit spent on a coordinate of larger variance saves more error. Immutable; thread-safe.
struct QueryBasis {
  uint32_t head_dim = 0;
  uint32_t rank = 0;
  std::vector<float> mean;       // [head_dim], of the keys
  std::vector<float> key_map;    // [rank][head_dim]
  std::vector<float> query_map;  // [rank][head_dim]
  std::vector<float> variance;   // [rank] of each coordinate over the keys, falling
  float lost_variance = 0;       // of the scores, for a typical query, outside the rank

  // All of it; without the maps and the mean if it has none, as where only the variances are used.
  void Write(IndexWriter* out) const;
  // DataLoss: cut off, sizes or numbers of no basis.
  static absl::StatusOr<QueryBasis> Read(IndexReader* in);
  bool has_maps() const { return !key_map.empty(); }

  // out: [rank]. The query is [head_dim], scaled as its scores are.
  void EncodeQuery(std::span<const float> query, std::span<float> out) const;

  // All queries of a block: their coordinates [queries][rank], and the mean key's scores.
  struct Coordinates {
    std::vector<float> of;          // [queries][rank]
    std::vector<float> mean_score;  // [queries]
    std::span<const float> Row(uint32_t query) const {
      return std::span(of).subspan(of.size() / mean_score.size() * query,
                                   of.size() / mean_score.size());
    }
  };
  Coordinates EncodeQueries(const QueryBlock& queries) const;
};

// Maps keys to their first `width` coordinates, 0 beyond the basis' rank; width a multiple of 16.
// The map is rounded to bf16, which is far finer than what coordinates are used for. Not
// thread-safe.
class KeyProjection {
 public:
  KeyProjection(const QueryBasis& basis, uint32_t width, DType dtype);
  // keys: [count][head_dim] of the dtype; out: [count][width].
  void Project(const void* keys, uint32_t count, float* out);

 private:
  const uint32_t head_dim_, width_, taken_;  // taken: coordinates that the basis has of the width
  const DType dtype_;
  std::vector<float> map_;          // [taken][head_dim]
  std::vector<uint16_t> map_bf16_;  // the same
  std::vector<float> offset_;       // [taken] of the mean key
  std::vector<float> widened_;      // some keys
};

// [keys][width] of a run, in token order.
std::vector<float> ProjectKeys(const KvView& run, const QueryBasis& basis, uint32_t width);

// Fits a basis of `rank` (at most head_dim) to the keys of `run`, of which at most kBasisKeys are
// read, evenly spread, and to `queries` [n][head_dim], scaled as their scores are. With no queries
// every direction counts alike: the keys' principal components.
// InvalidArgument: no keys, a rank above head_dim, queries that are no whole rows.
// Cost: keys * head_dim^2 + queries * head_dim^2, and one eigendecomposition of head_dim^2.
inline constexpr uint32_t kBasisKeys = 2048;
absl::StatusOr<QueryBasis> FitQueryBasis(const KvView& run, std::span<const float> queries,
                                         uint32_t rank);

}  // namespace quarry

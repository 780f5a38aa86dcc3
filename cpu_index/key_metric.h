// How far keys are from each other, for a typical query, and which of them make good neighbours.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/key_index.h"

namespace quarry {

// Keys in the first kWidth coordinates of a query basis: squared distances are those of scores, for
// a typical query, so keys count as near that queries cannot tell apart. Immutable; thread-safe.
class KeyMetric {
 public:
  static constexpr uint32_t kWidth = 64;

  // queries: as FitQueryBasis takes them.
  static absl::StatusOr<KeyMetric> Fit(const KvView& run, std::span<const float> queries);

  uint32_t keys() const { return static_cast<uint32_t>(square_.size()); }
  // The keys' order in which consecutive 256 lie close together, see BisectRows.
  std::vector<uint32_t> Bisect() const;

 private:
  friend class KeyDistances;
  std::vector<uint16_t> rows_;  // [keys][kWidth] bf16
  std::vector<float> square_;   // [keys] of the rows' lengths
};

// Distances between keys that are at hand, and the rule by which a graph chooses neighbours. One
// per thread: it keeps its memory.
class KeyDistances {
 public:
  // The most candidates that Choose compares with each other: the nearest ones.
  static constexpr uint32_t kCompared = 96;

  explicit KeyDistances(const KeyMetric& metric) : metric_(metric) {}

  // Squared distances from one key, [others.size()].
  std::span<const float> From(uint32_t key, std::span<const uint32_t> others);
  // Among some keys: [n][n].
  std::span<const float> Among(std::span<const uint32_t> keys);

  // Leaves of `candidates` (any order, repetitions allowed) at most `most` neighbours of `key`,
  // the nearest first and without itself: a candidate stays unless one that stayed is nearer to it
  // than the key is; what room is left goes to the nearest others. RoarGraph's rule, and hnsw's.
  void Choose(uint32_t key, uint32_t most, std::vector<uint32_t>* candidates);

 private:
  void Gather(std::span<const uint32_t> keys);
  void Products(const float* q, const uint16_t* q_bf16, uint32_t queries, uint32_t keys);

  const KeyMetric& metric_;
  std::vector<uint16_t> bf16_;                 // [keys][kWidth] gathered
  std::vector<float> fp32_, own_, distance_;
};

}  // namespace quarry

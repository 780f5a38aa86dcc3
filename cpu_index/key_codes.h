// Keys in 16 bytes each: coordinates of a query basis, 4 bits for the first, 2 for the others.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/key_index.h"
#include "cpu_index/query_basis.h"

namespace quarry {

// The codes of one run, and scores from them alone. Uniform steps fitted to each coordinate's
// variance. Immutable; thread-safe.
class KeyCodes {
 public:
  static constexpr uint32_t kFineCoordinates = 16;   // of 4 bits
  static constexpr uint32_t kCoordinates = 48;       // all of them; the others have 2 bits
  static constexpr uint32_t kBytes = 16;             // per key
  static constexpr uint32_t kBlockKeys = 16;         // stored together, coordinates across

  // The basis may have fewer coordinates than kCoordinates, not more.
  static absl::StatusOr<KeyCodes> Encode(const KvView& run, QueryBasis basis);

  // A query made ready: integer weights of the coordinates, and what turns sums into scores.
  struct Query {
    int8_t weight[kCoordinates];
    float scale = 0, offset = 0;  // score = scale * sum + offset
  };
  Query Prepare(std::span<const float> query) const;  // [head_dim], scaled as its scores are

  // sums[i * keys_padded() + t]: query i and the run's t-th key. Every code is read once for all
  // queries.
  void Sum(std::span<const Query> queries, std::span<int32_t> sums) const;

  uint32_t keys() const { return keys_; }
  uint32_t keys_padded() const { return (keys_ + kBlockKeys - 1) / kBlockKeys * kBlockKeys; }
  uint64_t code_bytes() const { return codes_.size(); }
  uint64_t memory_bytes() const;
  const QueryBasis& basis() const { return basis_; }

 private:
  KeyCodes(QueryBasis basis, uint32_t keys);
  void Store(uint32_t key, std::span<const float> coordinates);

  QueryBasis basis_;
  uint32_t keys_ = 0;
  std::vector<float> step_;     // [rank]
  std::vector<uint8_t> codes_;  // blocks of kBlockKeys * kBytes, 64-byte lines
};

}  // namespace quarry

// Keys in 16 bytes each: coordinates of a query basis, 4 bits for the first, 2 for the others.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/index_form.h"
#include "cpu_index/key_index.h"
#include "cpu_index/query_basis.h"

namespace quarry {

// The codes of one run, and scores from them alone. Uniform steps fitted to each coordinate's
// variance. Immutable after the last Store; thread-safe then.
class KeyCodes {
 public:
  static constexpr uint32_t kFineCoordinates = 16;   // of 4 bits
  static constexpr uint32_t kCoordinates = 48;       // all of them; the others have 2 bits
  static constexpr uint32_t kBytes = 16;             // per key
  static constexpr uint32_t kBlockKeys = 16;         // stored together, coordinates across

  // Of keys that are yet to be stored.
  KeyCodes(QueryBasis basis, uint32_t keys);
  // rows: [count][stride], keys from `first` on, of which the first coordinates count; each key
  // once.
  void Store(uint32_t first, std::span<const float> rows, size_t stride);

  // The basis may have fewer coordinates than kCoordinates, not more.
  static absl::StatusOr<KeyCodes> Encode(const KvView& run, QueryBasis basis);
  // Of keys whose coordinates are known: [keys][kCoordinates], 0 beyond the basis' rank.
  static KeyCodes Encode(std::span<const float> coordinates, QueryBasis basis);

  void Write(IndexWriter* out) const;
  // DataLoss: cut off, sizes or numbers of no codes.
  static absl::StatusOr<KeyCodes> Read(IndexReader* in);

  // [rank] what a key's code stands for.
  void Decode(uint32_t key, std::span<float> coordinates) const;

  // A query made ready: integer weights of the coordinates, and what turns sums into scores.
  struct Query {
    int8_t weight[kCoordinates];
    float scale = 0, offset = 0;  // score = scale * sum + offset
  };
  // coordinates: [rank] of the query; mean_score: of the keys' mean.
  Query Prepare(std::span<const float> coordinates, float mean_score) const;

  // sums[i * keys_padded() + t]: query i and the run's t-th key. Every code is read once for all
  // queries.
  void Sum(std::span<const Query> queries, std::span<int32_t> sums) const;
  // [rank] mean square of what the codes miss of each coordinate, over some of the keys, given
  // what was stored.
  std::vector<float> ErrorVariance(std::span<const float> rows, size_t stride) const;

  uint32_t keys() const { return keys_; }
  uint32_t keys_padded() const { return (keys_ + kBlockKeys - 1) / kBlockKeys * kBlockKeys; }
  const uint8_t* data() const { return codes_.data(); }
  uint64_t code_bytes() const { return codes_.size(); }
  uint64_t memory_bytes() const;
  // Whether a query made ready for one can score the other.
  bool SameSteps(const KeyCodes& other) const { return step_ == other.step_; }
  const QueryBasis& basis() const { return basis_; }

 private:
  void SetStep(uint32_t c, float step);
  void StoreLevels(uint32_t key, const uint8_t* levels);  // [kCoordinates]

  QueryBasis basis_;
  uint32_t keys_ = 0;
  std::vector<float> step_;  // [rank]; 0 where keys do not vary
  // [kCoordinates] and half as many levels as there are: beyond the rank one, whose bits are 0.
  std::vector<float> inverse_step_, half_;
  std::vector<uint8_t> codes_;  // blocks of kBlockKeys * kBytes, 64-byte lines
};

}  // namespace quarry

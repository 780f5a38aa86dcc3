// Values in 4 bits a dimension, one row for each token or group of tokens.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/index_form.h"
#include "cpu_index/row_bytes.h"

namespace quarry {

// Uniform steps fitted to each dimension's deviation, and to each row's length: what is attended is
// often longer than the rest, and would be cut off. Immutable after the last Store; thread-safe
// then.
class ValueRows {
 public:
  // deviation: [head_dim] root mean square of what will be stored.
  ValueRows(uint32_t rows, std::span<const float> deviation);

  void Write(IndexWriter* out) const;
  // `rows` rows of head_dim numbers. DataLoss: cut off, or numbers of no rows.
  static absl::StatusOr<ValueRows> Read(IndexReader* in, uint32_t rows, uint32_t head_dim);

  // values: [count][head_dim], of rows from `first` on; rows in any order, each once.
  void Store(uint32_t first, std::span<const float> values);
  void Decode(uint32_t row, std::span<float> value) const;

  // sums[i * head_dim + d] += sum over r of weights[i * ld_weights + r] * row which[r].
  void AddWeighted(std::span<const uint32_t> which, const float* weights, size_t ld_weights,
                   uint32_t queries, std::span<float> sums) const;

  // Of the rows `which`, rising: every line once, and the rows' scales.
  uint64_t BytesOf(std::span<const uint32_t> which) const {
    return rows_.BytesOf(which) + which.size() * sizeof(uint16_t);
  }
  uint64_t memory_bytes() const { return rows_.bytes() + 2 * scale_.size() + 8 * step_.size(); }

 private:
  ValueRows(uint32_t rows, uint32_t head_dim);

  const uint32_t head_dim_;
  std::vector<float> step_, inverse_step_;  // [head_dim]
  std::vector<uint16_t> scale_;             // bf16 [rows] of each row's steps
  RowBytes rows_;                           // see ValueRowTile
};

}  // namespace quarry

// Keys in 4 bits a coordinate, one row for each: what is read of tokens that codes single out.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/coded_queries.h"
#include "cpu_index/index_form.h"
#include "cpu_index/row_bytes.h"

namespace quarry {

// Rows of head_dim / 2 bytes. Eight consecutive coordinates have one width in bits, more where they
// vary more, so that all of them err alike; uniform steps. Immutable after the last Store;
// thread-safe then.
class KeyRows {
 public:
  static constexpr uint32_t kGroup = 8;

  // variance: [coordinates] of what will be stored, a multiple of kGroup.
  KeyRows(uint32_t rows, std::span<const float> variance);

  void Write(IndexWriter* out) const;
  // `rows` rows of `coordinates` numbers, as the constructor wants them. DataLoss: cut off, or widths
  // or numbers of no rows.
  static absl::StatusOr<KeyRows> Read(IndexReader* in, uint32_t rows, uint32_t coordinates);

  // rows: [count][coordinates], those from `first` on; rows in any order, each once.
  void Store(uint32_t first, std::span<const float> rows);
  // What a row stands for.
  void Decode(uint32_t row, std::span<float> coordinates) const;

  // coordinates: [count][coordinates].
  CodedQueries Prepare(std::span<const float> coordinates, uint32_t count) const;

  // out[i * ld_out + r]: the product of query i and row which[r], by row_scale (bf16) of that row.
  void Score(const CodedQueries& queries, std::span<const uint32_t> which,
             std::span<const uint16_t> row_scale, float* out, size_t ld_out) const;

  // Of the rows `which`, rising: every line once.
  uint64_t BytesOf(std::span<const uint32_t> which) const { return rows_.BytesOf(which); }
  // The mean square of what rows miss, summed over the coordinates, where each has its variance.
  float error_variance() const { return error_variance_; }
  // Whether a query made ready for one can score the other.
  bool SameSteps(const KeyRows& other) const {
    return width_ == other.width_ && step_ == other.step_;
  }
  uint64_t memory_bytes() const { return rows_.bytes() + 4 * step_.size(); }

 private:
  KeyRows(uint32_t rows, uint32_t coordinates);
  // How rows are taken apart, by the groups' widths.
  void LayOut();
  void SetStep(uint32_t c, float step);

  const uint32_t coordinates_;
  std::vector<uint8_t> width_;              // [groups] bits of a coordinate
  std::vector<float> step_, inverse_step_;  // [coordinates]; 0 where nothing is stored
  std::vector<float> half_;                 // [coordinates] half as many levels as there are
  // [padded coordinates] how kernels take rows apart: see KeyRowTile.
  std::vector<uint8_t> from_, shift_, mask_;
  std::vector<uint16_t> part_;  // where each 64 coordinates begin, in bytes
  float error_variance_ = 0;
  RowBytes rows_;
};

}  // namespace quarry

// Rows of bytes in lines of 64, as memory moves them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace quarry {

// `rows` of `stride` bytes, zeroed, the first at the beginning of a line. Vectors of 64 bytes may be
// loaded from any row's beginning or middle: a line follows the last row.
class RowBytes {
 public:
  RowBytes(uint32_t rows, uint32_t stride)
      : rows_(rows), stride_(stride), lines_((size_t{rows} * stride + 63) / 64 + 1) {}

  uint8_t* Row(uint32_t row) { return lines_.front().byte + size_t{row} * stride_; }
  const uint8_t* Row(uint32_t row) const { return lines_.front().byte + size_t{row} * stride_; }
  const uint8_t* data() const { return lines_.front().byte; }
  uint32_t stride() const { return stride_; }
  // The rows, without the line behind them.
  std::span<uint8_t> all() { return {Row(0), size_t{rows_} * stride_}; }
  std::span<const uint8_t> all() const { return {Row(0), size_t{rows_} * stride_}; }
  uint64_t bytes() const { return lines_.size() * 64; }

  // Of the lines that hold the rows `which`, rising, each counted once.
  uint64_t BytesOf(std::span<const uint32_t> which) const {
    uint64_t lines = 0, next = 0;  // the first line that is not counted yet
    for (uint32_t row : which) {
      const uint64_t lo = size_t{row} * stride_ / 64;
      const uint64_t hi = (size_t{row} * stride_ + stride_ - 1) / 64 + 1;
      lines += hi - (lo > next ? lo : (next < hi ? next : hi));
      next = hi > next ? hi : next;
    }
    return lines * 64;
  }

 private:
  struct alignas(64) Line {
    uint8_t byte[64] = {};
  };
  const uint32_t rows_, stride_;
  std::vector<Line> lines_;
};

}  // namespace quarry

// Single keys or values of a run, widened.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu_index/key_index.h"
#include "proto/half.h"

namespace quarry {

// n numbers of a dtype as floats.
inline void WidenNumbers(const std::byte* data, size_t n, DType dtype, float* out) {
  if (dtype == DType::kBf16) {
    const auto* const bits = reinterpret_cast<const uint16_t*>(data);
    for (size_t i = 0; i < n; ++i) out[i] = Bf16ToFloat(bits[i]);
    return;
  }
  for (size_t i = 0; i < n; ++i) out[i] = LoadAsFloat(data, i, dtype);
}

// Finds keys or values by their token, counted from the run's first one, in any order. The run
// outlives it; thread-safe.
class RunRows {
 public:
  RunRows(const KvView& run, KvPart part)
      : run_(run),
        part_(part),
        first_(run.tokens().lo),
        row_bytes_(size_t{run.head_dim} * DTypeBytes(run.dtype)) {
    uint32_t at = 0;
    for (uint64_t t = first_; t < run.tokens().hi; t += kStep) {
      while (t >= run.segments[at].tokens.hi) ++at;
      segment_.push_back(at);
    }
  }

  size_t row_bytes() const { return row_bytes_; }
  const KvSegment& SegmentOf(uint32_t token) const {
    uint32_t at = segment_[token / kStep];
    while (first_ + token >= run_.segments[at].tokens.hi) ++at;
    return run_.segments[at];
  }
  // The token's key or value, [head_dim] of the run's dtype.
  const std::byte* At(uint32_t token) const {
    const KvSegment& segment = SegmentOf(token);
    const auto* const data =
        static_cast<const std::byte*>(part_ == KvPart::kKey ? segment.k : segment.v);
    return data + (first_ + token - segment.tokens.lo) * row_bytes_;
  }

  void Widen(uint32_t token, float* out) const {
    WidenNumbers(At(token), run_.head_dim, run_.dtype, out);
  }

 private:
  static constexpr uint32_t kStep = 64;  // tokens for which the first one's segment is noted

  const KvView& run_;
  const KvPart part_;
  const uint32_t first_;
  const size_t row_bytes_;
  std::vector<uint32_t> segment_;
};

}  // namespace quarry

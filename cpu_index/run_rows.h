// Single keys or values of a run, widened.
#pragma once

#include <algorithm>
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

// Finds keys or values by their token. The run outlives it; thread-safe.
class RunRows {
 public:
  RunRows(const KvView& run, KvPart part) : run_(run), part_(part), first_(run.tokens().lo) {
    for (const KvSegment& segment : run.segments) ends_.push_back(segment.tokens.hi);
  }

  // The token's key or value, [head_dim] of the run's dtype.
  const std::byte* At(uint32_t token) const {
    const uint32_t t = first_ + token;
    const size_t at = std::upper_bound(ends_.begin(), ends_.end(), t) - ends_.begin();
    const KvSegment& segment = run_.segments[at];
    const auto* const data =
        static_cast<const std::byte*>(part_ == KvPart::kKey ? segment.k : segment.v);
    return data + size_t{t - segment.tokens.lo} * run_.head_dim * DTypeBytes(run_.dtype);
  }

  void Widen(uint32_t token, float* out) const {
    WidenNumbers(At(token), run_.head_dim, run_.dtype, out);
  }

 private:
  const KvView& run_;
  const KvPart part_;
  const uint32_t first_;
  std::vector<uint32_t> ends_;
};

}  // namespace quarry

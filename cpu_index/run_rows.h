// Single keys or values of a run, widened.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu_index/key_index.h"
#include "proto/half.h"

namespace quarry {

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
    const std::byte* const data = At(token);
    if (run_.dtype == DType::kBf16) {
      const auto* const bits = reinterpret_cast<const uint16_t*>(data);
      for (uint32_t d = 0; d < run_.head_dim; ++d) out[d] = Bf16ToFloat(bits[d]);
      return;
    }
    for (uint32_t d = 0; d < run_.head_dim; ++d) out[d] = LoadAsFloat(data, d, run_.dtype);
  }

 private:
  const KvView& run_;
  const KvPart part_;
  const uint32_t first_;
  std::vector<uint32_t> ends_;
};

}  // namespace quarry

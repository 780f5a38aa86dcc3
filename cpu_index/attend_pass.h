// Attention over the segments of a run with the kernels that attend whole segments.
#pragma once

#include <cstddef>
#include <limits>
#include <span>
#include <vector>

#include "cpu_index/kernels.h"
#include "cpu_index/key_index.h"

namespace quarry {

// Tokens that at least one query wants.
inline TokenRange Hull(const QueryBlock& queries) {
  TokenRange hull{std::numeric_limits<uint32_t>::max(), 0};
  for (const TokenRange& r : queries.ranges) {
    if (r.empty()) continue;
    hull.lo = std::min(hull.lo, r.lo);
    hull.hi = std::max(hull.hi, r.hi);
  }
  return hull;
}

// One query block's attention, segment by segment. Belongs to one thread; the block outlives it.
class AttendPass {
 public:
  // kind: dtype or codec, as `attend` wants it in AttendRun.
  AttendPass(const QueryBlock& block, uint8_t kind,
             size_t (*scratch_bytes)(const kernels::AttendRun&),
             void (*attend)(const kernels::AttendRun&))
      : attend_(attend),
        max_(block.queries),
        sum_(block.queries),
        acc_(size_t{block.queries} * block.head_dim) {
    for (const TokenRange& range : block.ranges) {
      lo_.push_back(range.lo);
      hi_.push_back(range.hi);
    }
    run_.q = block.q;
    run_.queries = block.queries;
    run_.head_dim = block.head_dim;
    run_.dtype = kind;
    run_.q_parts = block.q_dtype == DType::kBf16 ? 1 : block.q_dtype == DType::kFp16 ? 2 : 3;
    run_.scale = block.scale;
    run_.lo = lo_.data();
    run_.hi = hi_.data();
    run_.max = max_.data();
    run_.sum = sum_.data();
    run_.acc = acc_.data();
    scratch_.resize(scratch_bytes(run_) / sizeof(Line) + 1);
    run_.scratch = scratch_.data();
  }

  // Attends a segment, of which `wanted` tokens are in some query's range, now or later.
  void Add(const kernels::AttendSegment& segment, uint32_t wanted, std::span<Partial> out) {
    if (tokens_ + wanted > kPassTokens) Finish(out);
    segments_.push_back(segment);
    tokens_ += wanted;
  }

  // Merges what was not yet attended into `out`.
  void Finish(std::span<Partial> out) {
    if (segments_.empty()) return;
    run_.segments = segments_.data();
    run_.segment_count = segments_.size();
    attend_(run_);
    for (size_t i = 0; i < out.size(); ++i) {
      Partial part;
      part.max = max_[i];
      part.sum = sum_[i];
      part.acc = std::span(acc_).subspan(i * run_.head_dim, run_.head_dim);
      out[i].Merge(part);
    }
    segments_.clear();
    tokens_ = 0;
  }

 private:
  // Tokens attended before their sums are merged: each sum adds this many numbers at most, so that
  // its rounding error stays near 3e-6 however long the run.
  static constexpr uint32_t kPassTokens = 8192;
  struct alignas(64) Line {
    std::byte bytes[64];
  };

  void (*const attend_)(const kernels::AttendRun&);
  kernels::AttendRun run_{};
  std::vector<kernels::AttendSegment> segments_;
  uint32_t tokens_ = 0;  // of segments_
  std::vector<uint32_t> lo_, hi_;
  std::vector<float> max_, sum_, acc_;
  std::vector<Line> scratch_;
};

}  // namespace quarry

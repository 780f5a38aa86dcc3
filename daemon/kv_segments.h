// KvSegments: what a kernel reads of consecutive blocks, for one layer and KV head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "cpu_index/key_index.h"
#include "daemon/held_block.h"
#include "proto/types.h"

namespace quarry {

// Borrows the blocks; `tokens` is not empty. Where one of them is paged, rows are read from the
// disk when they are wanted.
class KvSegments final : public RowFetcher {
 public:
  // blocks[0] is block number first_block of the sequence.
  KvSegments(const KvShape& shape, uint32_t layer, uint32_t kv_head, TokenRange tokens,
             const std::shared_ptr<HeldBlock>* blocks, uint32_t first_block)
      : blocks_(blocks),
        first_block_(first_block),
        row_bytes_(shape.vector_bytes()),
        k_offset_(shape.strip_offset(layer, KvPart::kKey, kv_head)),
        v_offset_(shape.strip_offset(layer, KvPart::kValue, kv_head)) {
    for (uint32_t lo = tokens.lo; lo < tokens.hi;) {
      const uint32_t block = lo / kBlockTokens;
      const uint32_t hi = std::min(tokens.hi, (block + 1) * kBlockTokens);
      const HeldBlock& held = *blocks[block - first_block];
      KvSegment& segment = segments_.emplace_back(KvSegment{nullptr, nullptr, {lo, hi}});
      if (held.paged() != nullptr) {
        view_.fetcher = this;
      } else {
        const std::byte* const data = held.data() + (lo % kBlockTokens) * row_bytes_;
        segment.k = data + k_offset_;
        segment.v = data + v_offset_;
      }
      lo = hi;
    }
    view_.segments = segments_;
    view_.head_dim = shape.head_dim;
    view_.dtype = shape.dtype;
  }
  KvSegments(const KvSegments&) = delete;
  KvSegments& operator=(const KvSegments&) = delete;

  // For who asks view().fetcher for rows, where there is one.
  const KvView& view() const { return view_; }

  bool Fetch(std::span<const uint32_t> tokens, std::byte* k, std::byte* v) override;
  // For all others. What it reads from the disk it reads once.
  const KvView* Whole() override;
  // Of the first read that failed.
  const absl::Status& status() const { return status_; }

 private:
  bool Note(const HeldBlock& block, const absl::Status& read);

  const std::shared_ptr<HeldBlock>* const blocks_;
  const uint32_t first_block_;
  const uint64_t row_bytes_, k_offset_, v_offset_;
  absl::InlinedVector<KvSegment, 36> segments_;  // a run of 8192 tokens touches 33 blocks
  KvView view_;
  // Of Whole, once it was asked.
  AlignedBuffer strips_;
  absl::InlinedVector<KvSegment, 36> whole_segments_;
  KvView whole_;
  absl::Status status_;
};

}  // namespace quarry

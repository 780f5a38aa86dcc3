// KvSegments: what a kernel reads of consecutive blocks, for one layer and KV head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "absl/container/inlined_vector.h"
#include "cpu_index/key_index.h"
#include "daemon/held_block.h"
#include "proto/types.h"

namespace quarry {

// Borrows the blocks; `tokens` is not empty.
class KvSegments {
 public:
  // blocks[0] is block number first_block of the sequence.
  KvSegments(const KvShape& shape, uint32_t layer, uint32_t kv_head, TokenRange tokens,
             const std::shared_ptr<HeldBlock>* blocks, uint32_t first_block) {
    const uint64_t k_offset = shape.strip_offset(layer, KvPart::kKey, kv_head);
    const uint64_t v_offset = shape.strip_offset(layer, KvPart::kValue, kv_head);
    for (uint32_t lo = tokens.lo; lo < tokens.hi;) {
      const uint32_t block = lo / kBlockTokens;
      const uint32_t hi = std::min(tokens.hi, (block + 1) * kBlockTokens);
      const std::byte* const data =
          blocks[block - first_block]->data() + (lo % kBlockTokens) * shape.vector_bytes();
      segments_.push_back({data + k_offset, data + v_offset, {lo, hi}});
      lo = hi;
    }
    view_.segments = segments_;
    view_.head_dim = shape.head_dim;
    view_.dtype = shape.dtype;
  }
  KvSegments(const KvSegments&) = delete;
  KvSegments& operator=(const KvSegments&) = delete;

  const KvView& view() const { return view_; }

 private:
  absl::InlinedVector<KvSegment, 36> segments_;  // a run of 8192 tokens touches 33 blocks
  KvView view_;
};

}  // namespace quarry

// Exact attention over K and V as a codec left them: what it reads from memory is the codes.
#pragma once

#include <cstddef>
#include <span>

#include "cpu_index/key_index.h"
#include "proto/kv_codec.h"

namespace quarry {

// Strips of K and V of consecutive tokens, each of CodedStrip::bytes. 64-byte aligned where it is
// to be fast; any alignment will do.
struct CodedSegment {
  std::span<const std::byte> k, v;
  TokenRange tokens;
};

// As KvView, of one (layer, kv_head). Bytes that come from elsewhere have passed CheckCodedStrip.
struct CodedView {
  std::span<const CodedSegment> segments;
  uint32_t head_dim = 0;
  KvCodec codec = KvCodec::kInt8;  // not kNone
  TokenRange tokens() const {
    return segments.empty() ? TokenRange{}
                            : TokenRange{segments.front().tokens.lo, segments.back().tokens.hi};
  }
};

// Attention over every token of run that lies in each query's range, merged into acc [queries]:
// what the exact scan gives over the decoded numbers, but for the rounding of sums. Partial::bytes
// are those of the codes and scales of the tiles that are read. One pass over K and V for all
// queries; any thread.
void AttendCoded(const CodedView& run, const QueryBlock& queries, std::span<Partial> acc);

}  // namespace quarry

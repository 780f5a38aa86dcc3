#include "cpu_index/coded_attend.h"

#include <algorithm>

#include "cpu_index/attend_pass.h"
#include "cpu_index/simd.h"
#include "proto/check.h"

namespace quarry {
namespace {

static_assert(coded::kKey == static_cast<uint8_t>(KvPart::kKey) &&
              coded::kValue == static_cast<uint8_t>(KvPart::kValue));

// Bytes of the tiles of a segment that tokens [lo, hi) of it touch.
uint64_t BytesRead(const CodedStrip& strip, TokenRange wanted) {
  const uint32_t first = wanted.lo / coded::kTileTokens;
  const uint64_t before = first * strip.whole_tile_bytes();
  CodedStrip until = strip;
  until.tokens = std::min(
      strip.tokens, (wanted.hi + coded::kTileTokens - 1) / coded::kTileTokens * coded::kTileTokens);
  return until.bytes() - before;
}

}  // namespace

void AttendCoded(const CodedView& run, const QueryBlock& queries, std::span<Partial> acc) {
  QUARRY_CHECK(acc.size() == queries.queries && queries.ranges.size() == queries.queries &&
               run.codec != KvCodec::kNone && run.head_dim == queries.head_dim);
  if (queries.queries == 0) return;
  AttendPass pass(queries, static_cast<uint8_t>(run.codec), Kernels().attend_coded_scratch_bytes,
                  Kernels().attend_coded);
  const TokenRange hull = Hull(queries);
  for (const CodedSegment& s : run.segments) {
    const TokenRange wanted = Intersect(s.tokens, hull);
    if (wanted.empty()) continue;
    const CodedStrip k{run.codec, KvPart::kKey, run.head_dim, s.tokens.size()};
    const CodedStrip v{run.codec, KvPart::kValue, run.head_dim, s.tokens.size()};
    QUARRY_CHECK(s.k.size() == k.bytes() && s.v.size() == v.bytes());
    pass.Add({s.k.data(), s.v.data(), s.tokens.lo, s.tokens.size()}, wanted.size(), acc);
    const TokenRange within{wanted.lo - s.tokens.lo, wanted.hi - s.tokens.lo};
    acc[0].bytes += BytesRead(k, within) + BytesRead(v, within);
  }
  pass.Finish(acc);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    acc[i].tokens += Intersect(queries.ranges[i], run.tokens()).size();
  }
}

}  // namespace quarry

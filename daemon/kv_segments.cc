#include "daemon/kv_segments.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "storage/page_cache.h"

namespace quarry {

bool KvSegments::Fetch(std::span<const uint32_t> tokens, std::byte* k, std::byte* v) {
  absl::InlinedVector<WantedBytes, 64> rows;
  for (size_t i = 0; i < tokens.size();) {
    const uint32_t number = tokens[i] / kBlockTokens;
    const HeldBlock& block = *blocks_[number - first_block_];
    size_t end = i;
    while (end < tokens.size() && tokens[end] / kBlockTokens == number) ++end;
    rows.clear();
    for (const auto& [strip, out] : {std::pair(k_offset_, k), std::pair(v_offset_, v)}) {
      for (size_t t = i; t < end; ++t) {
        rows.push_back(
            {strip + tokens[t] % kBlockTokens * row_bytes_, {out + t * row_bytes_, row_bytes_}});
      }
    }
    i = end;
    if (!Note(block, block.Copy(rows))) return false;
  }
  return true;
}

const KvView* KvSegments::Whole() {
  if (view_.fetcher == nullptr) return &view_;
  if (!whole_segments_.empty()) return &whole_;
  if (!status_.ok()) return nullptr;
  // Whole pages of each paged block's rows: they come right to where they are read.
  const auto first_row = [&](const KvSegment& segment, uint64_t strip) {
    return strip + segment.tokens.lo % kBlockTokens * row_bytes_;
  };
  const auto pages = [&](const KvSegment& segment, uint64_t strip) {
    return PagesAround(first_row(segment, strip), segment.tokens.size() * row_bytes_);
  };
  uint64_t bytes = 0;
  for (const KvSegment& segment : segments_) {
    if (segment.k != nullptr) continue;
    bytes += pages(segment, k_offset_).bytes + pages(segment, v_offset_).bytes;
  }
  strips_ = AlignedBuffer(bytes);
  std::byte* next = strips_.bytes().data();
  absl::InlinedVector<KvSegment, 36> whole(segments_.begin(), segments_.end());
  for (KvSegment& segment : whole) {
    if (segment.k != nullptr) continue;
    WantedBytes wanted[2];
    for (int part = 0; part < 2; ++part) {
      const uint64_t strip = part == 0 ? k_offset_ : v_offset_;
      const PageStretch stretch = pages(segment, strip);
      (part == 0 ? segment.k : segment.v) = next + (first_row(segment, strip) - stretch.offset);
      wanted[part] = {stretch.offset, {next, stretch.bytes}};
      next += stretch.bytes;
    }
    const HeldBlock& block = *blocks_[segment.tokens.lo / kBlockTokens - first_block_];
    if (!Note(block, block.paged()->CopyOnce(wanted))) return nullptr;
  }
  whole_segments_ = std::move(whole);
  whole_ = view_;
  whole_.segments = whole_segments_;
  whole_.fetcher = nullptr;
  return &whole_;
}

bool KvSegments::Note(const HeldBlock& block, const absl::Status& read) {
  if (read.ok()) return true;
  status_.Update(absl::Status(
      read.code(), absl::StrCat("block ", block.id().Hex(), ": ", std::string(read.message()))));
  return false;
}

}  // namespace quarry

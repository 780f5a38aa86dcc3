#include "storage/log/footer.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "storage/log/checksum.h"
#include "storage/log/frame_codec.h"
#include "storage/log/sectors.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

constexpr size_t kEntryBytes = 1 + 7 * 8 + 3 * 32 + 4;
// Of a segment's end, which most footers fit into.
constexpr uint64_t kTailBytes = 64ull << 10;

uint64_t EndOf(const Superblock& superblock, uint32_t segment) {
  return superblock.SegmentOffset(segment) + superblock.segment_bytes;
}

// Whether there can be such a frame at `at` or behind, before the entries of its footer; `at` is
// its end then.
bool CanFollow(const FooterEntry& entry, const FooterPlace& place, uint64_t* at) {
  const bool is_part = entry.kind == FrameKind::kPart;
  if (is_part ? !IsPart(entry.part_offset, entry.part_bytes, entry.block_bytes)
              : entry.kind != FrameKind::kPurge) {
    return false;
  }
  if (entry.tenant.empty() || entry.born > entry.sequence ||
      entry.sequence >= place.head.sequence || entry.offset % kSectorBytes != 0 ||
      entry.offset < *at || entry.offset > place.entries_offset || entry.frame_bytes == 0 ||
      entry.frame_bytes % kSectorBytes != 0 || entry.frame_bytes > kMaxFrameBytes) {
    return false;
  }
  const uint64_t payload = is_part ? RoundUp(entry.part_bytes, kSectorBytes) : 0;
  *at = entry.offset + entry.frame_bytes + payload;
  return *at <= place.entries_offset;
}

}  // namespace

FooterEntry EntryOf(const PartFrame& part) {
  FooterEntry entry;
  entry.kind = FrameKind::kPart;
  entry.born = part.born;
  entry.tenant = part.tenant;
  entry.id = part.key.id;
  entry.parent = part.key.parent;
  entry.name_space = part.key.name_space;
  entry.block_bytes = part.block_bytes;
  entry.part_offset = part.part_offset;
  entry.part_bytes = part.part_bytes;
  return entry;
}

FooterEntry EntryOf(const PurgeFrame& purge) {
  FooterEntry entry;
  entry.kind = FrameKind::kPurge;
  entry.born = purge.born;
  entry.part_offset = purge.copy;
  entry.tenant = purge.tenant;
  return entry;
}

uint64_t FooterEntryBytes(std::string_view tenant) { return kEntryBytes + tenant.size(); }
uint64_t FooterBytes(uint64_t entry_bytes) {
  return RoundUp(entry_bytes, kSectorBytes) + kSectorBytes;
}

AlignedBuffer EncodeFooter(const FramePlace& segment_end, uint64_t sequence,
                           std::span<const FooterEntry> entries) {
  uint64_t entry_bytes = 0;
  for (const FooterEntry& entry : entries) entry_bytes += FooterEntryBytes(entry.tenant);
  AlignedBuffer footer(FooterBytes(entry_bytes));
  const std::span<std::byte> list = footer.bytes().first(footer.size() - kSectorBytes);
  FrameWriter out(list);
  for (const FooterEntry& entry : entries) {
    out.Number(static_cast<uint8_t>(entry.kind));
    out.Number(entry.offset);
    out.Number(entry.frame_bytes);
    out.Number(entry.sequence);
    out.Number(entry.born);
    out.Digest(entry.id);
    out.Digest(entry.parent);
    out.Digest(entry.name_space);
    out.Number(entry.block_bytes);
    out.Number(entry.part_offset);
    out.Number(entry.part_bytes);
    out.Text(entry.tenant);
  }
  FramePlace place = segment_end;
  place.offset -= kSectorBytes;
  AlignedBuffer last = NewFrame(FrameKind::kFooter, place, sequence, 24);
  FrameWriter names(BodyOf(&last));
  names.Number(uint64_t{list.size()});
  names.Number(static_cast<uint32_t>(entries.size()));
  names.Number(Crc32c(list));
  last = FinishFrame(std::move(last));
  std::memcpy(footer.bytes().data() + list.size(), last.bytes().data(), kSectorBytes);
  return footer;
}

absl::StatusOr<FooterPlace> DecodeFooterPlace(std::span<const std::byte> sector) {
  FooterPlace out;
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          CheckedBody(sector, FrameKind::kFooter, &out.head));
  FrameReader in(body);
  out.entries_bytes = in.Number<uint64_t>();
  out.entries = in.Number<uint32_t>();
  out.crc = in.Number<uint32_t>();
  if (out.entries_bytes % kSectorBytes != 0 || out.entries_bytes > kMaxSegmentBytes ||
      out.entries_bytes > out.head.place.offset) {
    return MalformedFrame("footer");
  }
  out.entries_offset = out.head.place.offset - out.entries_bytes;
  return out;
}

absl::StatusOr<std::vector<FooterEntry>> DecodeFooter(const FooterPlace& place,
                                                      std::span<const std::byte> entries) {
  if (entries.size() != place.entries_bytes || Crc32c(entries) != place.crc) {
    return absl::DataLossError(absl::StrCat("the checksum of the ", place.entries,
                                            " entries of segment ", place.head.place.segment,
                                            " is wrong"));
  }
  std::vector<FooterEntry> out;
  FrameReader in(entries);
  uint64_t at = 0;
  for (uint32_t i = 0; i < place.entries; ++i) {
    FooterEntry& entry = out.emplace_back();
    entry.kind = static_cast<FrameKind>(in.Number<uint8_t>());
    entry.offset = in.Number<uint64_t>();
    entry.frame_bytes = in.Number<uint64_t>();
    entry.sequence = in.Number<uint64_t>();
    entry.born = in.Number<uint64_t>();
    in.Digest(&entry.id);
    in.Digest(&entry.parent);
    in.Digest(&entry.name_space);
    entry.block_bytes = in.Number<uint64_t>();
    entry.part_offset = in.Number<uint64_t>();
    entry.part_bytes = in.Number<uint64_t>();
    entry.tenant = in.Text();
    if (!in.ok() || !CanFollow(entry, place, &at)) return MalformedFrame("footer");
  }
  return out;
}

absl::StatusOr<Footer> ReadFooter(Disk* disk, const Superblock& superblock, uint32_t segment,
                                  std::optional<uint64_t> generation) {
  AlignedBuffer tail(
      std::min(kTailBytes, superblock.segment_bytes / 2 / kSectorBytes * kSectorBytes));
  const uint64_t end = EndOf(superblock, segment), tail_offset = end - tail.size();
  QUARRY_RETURN_IF_ERROR(ReadSectors(disk, tail_offset, &tail));
  QUARRY_ASSIGN_OR_RETURN(const FooterPlace place,
                          DecodeFooterPlace(tail.bytes().last(kSectorBytes)));
  const FramePlace& here = place.head.place;
  if (here.device != superblock.device || here.segment != segment ||
      here.offset != end - kSectorBytes ||
      here.generation != generation.value_or(here.generation) ||
      place.entries_offset < superblock.SegmentOffset(segment)) {
    return absl::DataLossError("a footer of another segment, or of an earlier use");
  }
  AlignedBuffer longer;
  std::span<const std::byte> entries;
  if (place.entries_offset >= tail_offset) {
    entries = tail.bytes().subspan(place.entries_offset - tail_offset, place.entries_bytes);
  } else {
    longer = AlignedBuffer(place.entries_bytes);
    QUARRY_RETURN_IF_ERROR(ReadSectors(disk, place.entries_offset, &longer));
    entries = longer.bytes();
  }
  Footer out{here.generation, place.head.sequence, {}};
  QUARRY_ASSIGN_OR_RETURN(out.entries, DecodeFooter(place, entries));
  if (!out.entries.empty() && out.entries.front().offset <= superblock.SegmentOffset(segment)) {
    return absl::DataLossError("a footer of frames of another segment");
  }
  return out;
}

absl::StatusOr<PurgeFrame> ReadPurge(Disk* disk, const FramePlace& place,
                                     const FooterEntry& entry) {
  AlignedBuffer frame(entry.frame_bytes);
  QUARRY_RETURN_IF_ERROR(ReadSectors(disk, place.offset, &frame));
  return DecodePurge(frame.bytes(), place, entry.sequence);
}

absl::StatusOr<uint64_t> WriteFooter(Disk* disk, const Superblock& superblock, uint32_t segment,
                                     const Footer& footer) {
  const uint64_t end = EndOf(superblock, segment);
  const AlignedBuffer bytes = EncodeFooter({superblock.device, segment, footer.generation, end},
                                           footer.sequence, footer.entries);
  const std::span<const std::byte> piece[] = {bytes.bytes()};
  QUARRY_RETURN_IF_ERROR(disk->Write(end - bytes.size(), piece));
  return bytes.size();
}

}  // namespace quarry

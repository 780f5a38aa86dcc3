#include "storage/log/footer.h"

#include <algorithm>

#include "proto/status_macros.h"
#include "storage/log/sectors.h"

namespace quarry {
namespace {

// Of a segment's end, which most footers fit into.
constexpr uint64_t kTailBytes = 64ull << 10;

uint64_t EndOf(const Superblock& superblock, uint32_t segment) {
  return superblock.SegmentOffset(segment) + superblock.segment_bytes;
}

}  // namespace

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
  Footer out{here.generation, place.head.sequence, {}};
  if (place.entries_offset >= tail_offset) {
    QUARRY_ASSIGN_OR_RETURN(
        out.entries, DecodeFooter(place, tail.bytes().subspan(place.entries_offset - tail_offset,
                                                              place.entries_bytes)));
    return out;
  }
  AlignedBuffer entries(place.entries_bytes);
  QUARRY_RETURN_IF_ERROR(ReadSectors(disk, place.entries_offset, &entries));
  QUARRY_ASSIGN_OR_RETURN(out.entries, DecodeFooter(place, entries.bytes()));
  return out;
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

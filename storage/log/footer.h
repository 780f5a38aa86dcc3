// The footers of sealed segments.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "storage/disk/disk.h"
#include "storage/log/frames.h"

namespace quarry {

// What a footer says of one frame of its segment; of a purge only where it is.
struct FooterEntry {
  FrameKind kind = FrameKind::kPart;
  uint64_t offset = 0;  // on the disk
  uint64_t frame_bytes = 0;
  uint64_t sequence = 0;
  uint64_t born = 0;
  std::string tenant;
  BlockId id, parent;
  NamespaceDigest name_space;
  uint64_t block_bytes = 0, part_offset = 0, part_bytes = 0;  // of a purge: 0, its copy, 0
};

// All but where it is.
FooterEntry EntryOf(const PartFrame& part);
FooterEntry EntryOf(const PurgeFrame& purge);

// Bytes of a footer, which ends with its segment: the entries and a last sector that names them.
uint64_t FooterBytes(uint64_t entry_bytes);
uint64_t FooterEntryBytes(std::string_view tenant);
AlignedBuffer EncodeFooter(const FramePlace& segment_end, uint64_t sequence,
                           std::span<const FooterEntry> entries);
struct FooterPlace {
  FrameHead head;
  uint64_t entries_offset = 0, entries_bytes = 0;  // on the disk, in whole sectors
  uint32_t entries = 0, crc = 0;
};
// By the last sector of its segment.
absl::StatusOr<FooterPlace> DecodeFooterPlace(std::span<const std::byte> sector);
absl::StatusOr<std::vector<FooterEntry>> DecodeFooter(const FooterPlace& place,
                                                      std::span<const std::byte> entries);

struct Footer {
  uint64_t generation = 0, sequence = 0;
  std::vector<FooterEntry> entries;
};

// Of the segment's use with this generation; none given: of any. DataLoss: there is none.
// Unavailable: whether there is one cannot be read.
absl::StatusOr<Footer> ReadFooter(Disk* disk, const Superblock& superblock, uint32_t segment,
                                  std::optional<uint64_t> generation);
// The purge that an entry names. DataLoss: it is not there.
absl::StatusOr<PurgeFrame> ReadPurge(Disk* disk, const FramePlace& place, const FooterEntry& entry);
// Returns the bytes written, which are not synced.
absl::StatusOr<uint64_t> WriteFooter(Disk* disk, const Superblock& superblock, uint32_t segment,
                                     const Footer& footer);

}  // namespace quarry

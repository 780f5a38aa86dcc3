#include "storage/log/read_block.h"

#include <algorithm>
#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/byte_digest.h"
#include "proto/status_macros.h"
#include "storage/log/checksum.h"
#include "storage/log/part_cipher.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

absl::Status CheckDigest(std::span<const std::byte> bytes, const ByteDigest& expected,
                         const LoggedPart& part) {
  const ByteDigest actual = DigestOf(bytes);
  if (actual == expected) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("bytes [", part.part_offset, ", +", part.part_bytes,
                                          ") in segment ", part.place.segment, ", offset ",
                                          part.place.offset, " have digest ", HexOf(actual),
                                          ", expected ", HexOf(expected)));
}

bool IsAligned(const std::byte* data) {
  return reinterpret_cast<uintptr_t>(data) % kSectorBytes == 0;
}

// A frame that is right, and what its sectors are decrypted with; null: they are not encrypted.
struct OpenedPart {
  PartFrame frame;
  std::shared_ptr<const SectorCipher> cipher;
};

std::string PlaceOf(const LoggedPart& part) {
  return absl::StrCat("segment ", part.place.segment, ", offset ", part.place.offset);
}

// Decrypts the frame's secret.
absl::Status OpenFrame(const TenantKeys& keys, std::span<const std::byte> frame,
                       const LoggedPart& part, OpenedPart* out) {
  const std::shared_ptr<const Secret> key = keys.Find(out->frame.seal.key);
  if (key == nullptr) {
    return absl::DataLossError(absl::StrCat("the key of tenant ", out->frame.tenant, " for ",
                                            PlaceOf(part), " is not there"));
  }
  auto part_key = std::make_shared<const Secret>(PartKey(*key, out->frame.seal));
  const absl::Status opened = OpenSealedFrame(frame, part.sequence, *part_key, &out->frame);
  if (!opened.ok()) {
    return absl::DataLossError(absl::StrCat(std::string(opened.message()), ", in ", PlaceOf(part)));
  }
  out->cipher = std::make_shared<SectorCipher>(part.place, part.sequence, std::move(part_key));
  return absl::OkStatus();
}

// The frame of a part, checked against where it is and what the index has of it.
absl::StatusOr<OpenedPart> CheckedPart(const TenantKeys* keys, std::span<const std::byte> frame,
                                       const LoggedBlock& block, const LoggedPart& part) {
  QUARRY_ASSIGN_OR_RETURN(PartFrame found, DecodePart(frame, part.place, part.sequence));
  const bool same = found.key.id == block.id && found.key.parent == block.parent &&
                    found.key.name_space == block.name_space && found.tenant == *block.tenant &&
                    found.born == block.born && found.block_bytes == block.bytes &&
                    found.part_offset == part.part_offset && found.part_bytes == part.part_bytes;
  if (!same) {
    return absl::DataLossError(absl::StrCat("a frame in ", PlaceOf(part), " is of block ",
                                            found.key.id.Hex(), ", born ", found.born, ", not ",
                                            block.id.Hex(), ", born ", block.born));
  }
  if (found.seal.sealed() != (keys != nullptr)) {
    return absl::DataLossError(
        absl::StrCat("a part in ", PlaceOf(part), " is ", found.seal.sealed() ? "" : "not ",
                     "encrypted, in a log that is ", found.seal.sealed() ? "not" : ""));
  }
  OpenedPart out{std::move(found), nullptr};
  if (keys != nullptr) QUARRY_RETURN_IF_ERROR(OpenFrame(*keys, frame, part, &out));
  return out;
}

// The sectors of an encrypted part from `first` on.
absl::Status Decrypt(const SectorCipher& cipher, std::span<const SealTag> tags,
                     const LoggedPart& part, uint64_t first, std::span<std::byte> sectors) {
  for (uint64_t at = 0; at < sectors.size(); at += kSectorBytes) {
    const uint64_t sector = first + at / kSectorBytes;
    if (cipher.Open(static_cast<uint32_t>(sector), tags[sector],
                    sectors.subspan(at, kSectorBytes))) {
      continue;
    }
    return absl::DataLossError(absl::StrCat("sector ", sector, " of bytes [", part.part_offset,
                                            ", +", part.part_bytes, ") in ", PlaceOf(part),
                                            " does not have the tag that was written with it"));
  }
  return absl::OkStatus();
}

// Takes what a frame says; not, if another one of the block says other things.
absl::Status Agree(const LoggedBlock& block, WrittenAs found, std::optional<WrittenAs>* origin) {
  if (origin->has_value() &&
      (found.key.full_key != (*origin)->key.full_key || found.digest != (*origin)->digest)) {
    return absl::DataLossError(
        absl::StrCat("parts of block ", block.id.Hex(), " have different keys or digests"));
  }
  *origin = std::move(found);
  return absl::OkStatus();
}

// Where one part's sectors go: into the block's memory, but for the frame and what is not whole
// sectors at aligned memory.
struct PartTarget {
  const LoggedPart* part = nullptr;
  std::span<std::byte> here;  // of the block
  uint64_t straight = 0;      // bytes that are read right there
  AlignedBuffer frame, rest;

  // `out` begins at the offset `first` of the block.
  PartTarget(const LoggedPart& p, uint64_t first, std::span<std::byte> out)
      : part(&p), here(out.subspan(p.part_offset - first, p.part_bytes)), frame(p.frame_bytes) {
    if (IsAligned(here.data())) straight = here.size() / kSectorBytes * kSectorBytes;
    rest = AlignedBuffer(RoundUp(here.size() - straight, kSectorBytes));
  }
  void AddPieces(std::vector<std::span<std::byte>>* pieces) {
    for (const auto piece : {frame.bytes(), here.first(straight), rest.bytes()}) {
      if (!piece.empty()) pieces->push_back(piece);
    }
  }
  absl::StatusOr<WrittenAs> Check(const TenantKeys* keys, const LoggedBlock& block) {
    QUARRY_ASSIGN_OR_RETURN(OpenedPart found, CheckedPart(keys, frame.bytes(), block, *part));
    if (found.cipher != nullptr) {
      const std::span<const SealTag> tags = found.frame.tags;
      QUARRY_RETURN_IF_ERROR(Decrypt(*found.cipher, tags, *part, 0, here.first(straight)));
      QUARRY_RETURN_IF_ERROR(
          Decrypt(*found.cipher, tags, *part, straight / kSectorBytes, rest.bytes()));
    }
    if (straight < here.size()) {
      std::memcpy(here.data() + straight, rest.bytes().data(), here.size() - straight);
    }
    // The digest is of all that the sums of sectors are of, and of more bits.
    QUARRY_RETURN_IF_ERROR(CheckDigest(here, found.frame.digest, *part));
    return WrittenAs{std::move(found.frame.key), found.frame.block_digest};
  }
};

// Parts that follow one another on the disk, and are read at once.
struct PartGroup {
  uint64_t offset = 0;
  std::vector<PartTarget> targets;
  std::vector<std::span<std::byte>> pieces;
  absl::Status Read(Disk* disk) const { return disk->Read(offset, pieces); }
};

// From `*part` on.
PartGroup NextGroup(uint64_t group_bytes, const LoggedBlock& block, std::span<std::byte> out,
                    std::vector<LoggedPart>::const_iterator* part) {
  PartGroup group;
  group.offset = (*part)->place.offset;
  uint64_t bytes = 0;
  for (; *part != block.parts.end() && (*part)->place.offset == group.offset + bytes; ++*part) {
    if (bytes >= group_bytes) break;
    group.targets.emplace_back(**part, block.parts.front().part_offset, out)
        .AddPieces(&group.pieces);
    bytes += (*part)->disk_bytes();
  }
  return group;
}

// By a thread of its own; right here, if none is to be had. The group outlives the answer.
std::future<absl::Status> ReadBeside(Disk* disk, const PartGroup& group) {
  const auto read = [disk, &group] { return group.Read(disk); };
  try {
    return std::async(std::launch::async, read);
  } catch (const std::system_error&) {
    return std::async(std::launch::deferred, read);
  }
}

}  // namespace

absl::Status PartSectors::Open(uint64_t first, std::span<std::byte> sectors) const {
  if (cipher != nullptr) return Decrypt(*cipher, tags, part, first, sectors);
  for (uint64_t at = 0; at < sectors.size(); at += kSectorBytes) {
    const uint64_t sector = first + at / kSectorBytes;
    if (Crc32c(sectors.subspan(at, kSectorBytes)) == sums[sector]) continue;
    return absl::DataLossError(absl::StrCat("sector ", sector, " of bytes [", part.part_offset,
                                            ", +", part.part_bytes, ") in ", PlaceOf(part),
                                            " does not have the sum that was written with it"));
  }
  return absl::OkStatus();
}

absl::StatusOr<BlockSectors> ReadFrames(const BlockSource& source, const LoggedBlock& block) {
  std::vector<AlignedBuffer> frames;
  std::vector<std::span<std::byte>> memory;
  for (const LoggedPart& part : block.parts) frames.emplace_back(part.frame_bytes);
  for (AlignedBuffer& frame : frames) memory.push_back(frame.bytes());
  std::vector<DiskRead> reads;
  for (size_t i = 0; i < frames.size(); ++i) {
    reads.push_back({block.parts[i].place.offset, ReadPieces(&memory[i], 1)});
  }
  QUARRY_RETURN_IF_ERROR(source.disk->ReadMany(reads));
  BlockSectors out;
  std::optional<WrittenAs> origin;
  for (size_t i = 0; i < frames.size(); ++i) {
    const LoggedPart& part = block.parts[i];
    QUARRY_ASSIGN_OR_RETURN(OpenedPart found, CheckedPart(source.keys, memory[i], block, part));
    QUARRY_RETURN_IF_ERROR(
        Agree(block, {std::move(found.frame.key), found.frame.block_digest}, &origin));
    out.parts.push_back(
        {part, std::move(found.frame.sums), std::move(found.frame.tags), std::move(found.cipher)});
  }
  out.written = *std::move(origin);
  return out;
}

absl::StatusOr<WrittenAs> ReadBlock(const BlockSource& source, const LoggedBlock& block,
                                    std::span<std::byte> out) {
  std::optional<WrittenAs> origin;
  auto part = block.parts.begin();
  PartGroup group = NextGroup(source.group_bytes, block, out, &part);
  absl::Status read = group.Read(source.disk);
  while (read.ok()) {
    // The next one is read while this one is decrypted and its digests are computed.
    PartGroup next;
    std::future<absl::Status> reading;
    if (part != block.parts.end()) {
      next = NextGroup(source.group_bytes, block, out, &part);
      reading = ReadBeside(source.disk, next);
    }
    for (PartTarget& target : group.targets) {
      QUARRY_ASSIGN_OR_RETURN(WrittenAs found, target.Check(source.keys, block));
      QUARRY_RETURN_IF_ERROR(Agree(block, std::move(found), &origin));
    }
    if (!reading.valid()) return *std::move(origin);
    read = reading.get();
    group = std::move(next);
  }
  return read;
}

}  // namespace quarry

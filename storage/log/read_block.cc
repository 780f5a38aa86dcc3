#include "storage/log/read_block.h"

#include <algorithm>
#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/byte_digest.h"
#include "proto/status_macros.h"
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

}  // namespace

absl::StatusOr<PartFrame> CheckedPart(std::span<const std::byte> frame, const LoggedBlock& block,
                                      const LoggedPart& part) {
  QUARRY_ASSIGN_OR_RETURN(PartFrame found, DecodePart(frame, part.place, part.sequence));
  const bool same = found.key.id == block.id && found.key.parent == block.parent &&
                    found.key.name_space == block.name_space && found.tenant == *block.tenant &&
                    found.born == block.born && found.block_bytes == block.bytes &&
                    found.part_offset == part.part_offset && found.part_bytes == part.part_bytes;
  if (same) return found;
  return absl::DataLossError(absl::StrCat(
      "a frame in segment ", part.place.segment, ", offset ", part.place.offset, " is of block ",
      found.key.id.Hex(), ", born ", found.born, ", not ", block.id.Hex(), ", born ", block.born));
}

namespace {

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
    QUARRY_ASSIGN_OR_RETURN(PartFrame found, CheckedPart(frame.bytes(), block, *part));
    if (straight < here.size()) {
      std::memcpy(here.data() + straight, rest.bytes().data(), here.size() - straight);
    }
    if (found.seal.sealed() != (keys != nullptr)) {
      return absl::DataLossError(
          absl::StrCat("a part in segment ", part->place.segment, ", offset ", part->place.offset,
                       " is ", found.seal.sealed() ? "" : "not ", "encrypted, in a log that is ",
                       found.seal.sealed() ? "not" : ""));
    }
    if (keys != nullptr) QUARRY_RETURN_IF_ERROR(Open(*keys, &found));
    QUARRY_RETURN_IF_ERROR(CheckDigest(here, found.digest, *part));
    return WrittenAs{std::move(found.key), found.block_digest};
  }
  absl::Status Open(const TenantKeys& keys, PartFrame* found) {
    const std::shared_ptr<const Secret> key = keys.Find(found->seal.key);
    if (key == nullptr) {
      return absl::DataLossError(absl::StrCat("the key of tenant ", found->tenant, " for segment ",
                                              part->place.segment, ", offset ", part->place.offset,
                                              " is not there"));
    }
    const absl::Status opened =
        OpenSealedPart(frame.bytes(), part->sequence, PartKey(*key, found->seal), here, found);
    if (opened.ok()) return opened;
    return absl::DataLossError(absl::StrCat(std::string(opened.message()), ", in segment ",
                                            part->place.segment, ", offset ", part->place.offset));
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
      if (origin.has_value() &&
          (found.key.full_key != origin->key.full_key || found.digest != origin->digest)) {
        return absl::DataLossError(
            absl::StrCat("parts of block ", block.id.Hex(), " have different keys or digests"));
      }
      origin = std::move(found);
    }
    if (!reading.valid()) return *std::move(origin);
    read = reading.get();
    group = std::move(next);
  }
  return read;
}

}  // namespace quarry

#include "storage/log/piece_reader.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/check.h"
#include "proto/status_macros.h"
#include "storage/log/checksum.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

// A block may be moved while it is read, once in a long while; more often in a row is the disk's
// fault.
constexpr int kTries = 4;

// A stretch of a part, and where its first sector is in it.
struct Stretch {
  const LoggedPart* part = nullptr;
  const std::vector<uint32_t>* sums = nullptr;
  uint64_t first_sector = 0;
  std::span<std::byte> out;
  uint64_t disk_offset() const {
    return part->place.offset + part->frame_bytes + first_sector * kSectorBytes;
  }
};

// The pieces, cut where parts end.
std::vector<Stretch> Cut(const BlockSums& sums, std::span<const PieceToRead> pieces) {
  std::vector<Stretch> stretches;
  const std::vector<LoggedPart>& parts = sums.block.parts;
  for (const PieceToRead& piece : pieces) {
    QUARRY_CHECK(piece.offset % kSectorBytes == 0 && piece.out.size() % kSectorBytes == 0);
    QUARRY_CHECK(piece.offset + piece.out.size() <= RoundUp(sums.block.bytes, kSectorBytes));
    size_t p = static_cast<size_t>(std::upper_bound(parts.begin(), parts.end(), piece.offset,
                                                    [](uint64_t offset, const LoggedPart& part) {
                                                      return offset < part.part_offset;
                                                    }) -
                                   parts.begin() - 1);
    for (uint64_t done = 0; done < piece.out.size(); ++p) {
      const uint64_t in_part = piece.offset + done - parts[p].part_offset;
      const uint64_t some =
          std::min(piece.out.size() - done, RoundUp(parts[p].part_bytes, kSectorBytes) - in_part);
      stretches.push_back(
          {&parts[p], &sums.of_parts[p], in_part / kSectorBytes, piece.out.subspan(done, some)});
      done += some;
    }
  }
  return stretches;
}

absl::Status CheckSums(const Stretch& stretch) {
  for (uint64_t s = 0; s < stretch.out.size() / kSectorBytes; ++s) {
    const uint32_t expected = (*stretch.sums)[stretch.first_sector + s];
    const uint32_t actual = Crc32c(stretch.out.subspan(s * kSectorBytes, kSectorBytes));
    if (actual == expected) continue;
    return absl::DataLossError(absl::StrCat(
        "the sector at offset ", stretch.disk_offset() + s * kSectorBytes, " in segment ",
        stretch.part->place.segment, ", sector ", stretch.first_sector + s, " of bytes [",
        stretch.part->part_offset, ", +", stretch.part->part_bytes, "), has sum ",
        absl::Hex(actual, absl::kZeroPad8), ", expected ", absl::Hex(expected, absl::kZeroPad8)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<BlockSums> ReadSums(Disk* disk, const LoggedBlock& block) {
  BlockSums sums{block, {}, {}};
  std::vector<AlignedBuffer> frames;
  std::vector<std::span<std::byte>> outs;
  std::vector<DiskRead> reads;
  for (const LoggedPart& part : block.parts) {
    outs.push_back(frames.emplace_back(part.frame_bytes).bytes());
  }
  for (size_t p = 0; p < block.parts.size(); ++p) {
    reads.push_back({block.parts[p].place.offset, {&outs[p], 1}});
  }
  QUARRY_RETURN_IF_ERROR(disk->ReadMany(reads));
  for (size_t p = 0; p < block.parts.size(); ++p) {
    QUARRY_ASSIGN_OR_RETURN(PartFrame frame, CheckedPart(outs[p], block, block.parts[p]));
    if (frame.seal.sealed()) {
      return absl::FailedPreconditionError(
          absl::StrCat("block ", block.id.Hex(), " is encrypted, and can only be read whole"));
    }
    if (p > 0 && (frame.key.full_key != sums.written.key.full_key ||
                  frame.block_digest != sums.written.digest)) {
      return absl::DataLossError(
          absl::StrCat("parts of block ", block.id.Hex(), " have different keys or digests"));
    }
    sums.of_parts.push_back(std::move(frame.sums));
    sums.written = {std::move(frame.key), frame.block_digest};
  }
  return sums;
}

absl::Status ReadSummed(Disk* disk, const BlockSums& sums, std::span<const PieceToRead> pieces) {
  const std::vector<Stretch> stretches = Cut(sums, pieces);
  std::vector<std::span<std::byte>> outs;
  for (const Stretch& stretch : stretches) outs.push_back(stretch.out);
  std::vector<DiskRead> reads;
  uint64_t end = 0;  // of the last read, on the disk
  for (size_t i = 0; i < stretches.size(); ++i) {
    const uint64_t offset = stretches[i].disk_offset();
    if (!reads.empty() && offset == end) {
      reads.back().out = {reads.back().out.data(), reads.back().out.size() + 1};
    } else {
      reads.push_back({offset, {&outs[i], 1}});
    }
    end = offset + outs[i].size();
  }
  QUARRY_RETURN_IF_ERROR(disk->ReadMany(reads));
  for (const Stretch& stretch : stretches) QUARRY_RETURN_IF_ERROR(CheckSums(stretch));
  return absl::OkStatus();
}

absl::Status PieceReader::Read(std::span<const PieceToRead> pieces) {
  uint64_t bytes = 0;
  for (const PieceToRead& piece : pieces) bytes += piece.out.size();
  absl::Status read;
  for (int tries = 0; tries < kTries; ++tries) {
    const std::shared_ptr<const BlockSums> sums = Sums();
    read = ReadSummed(disk_, *sums, pieces);
    // Its segment may have been used anew meanwhile: what was read is the block's if it is there
    // now, for it is moved away before.
    const std::optional<LoggedBlock> now = log_->Now(tenant_, id_);
    if (!now.has_value()) {
      return absl::NotFoundError("it is no longer in the log");
    }
    if (now->parts == sums->block.parts) {
      if (read.ok()) break;
      continue;
    }
    read = Follow(*now);
    if (absl::IsNotFound(read)) return read;
    if (read.ok()) read = absl::UnavailableError("the block was moved while it was read");
  }
  log_->CountPieces(bytes, read);
  if (absl::IsDataLoss(read)) log_->FoundBroken(Sums()->block, read);
  return read;
}

absl::Status PieceReader::Follow(const LoggedBlock& now) {
  QUARRY_ASSIGN_OR_RETURN(BlockSums moved, ReadSums(disk_, now));
  if (moved.written.digest != digest_ || now.bytes != bytes_) {
    return absl::NotFoundError("it was written anew");
  }
  auto sums = std::make_shared<const BlockSums>(std::move(moved));
  absl::MutexLock lock(&mutex_);
  sums_ = std::move(sums);
  return absl::OkStatus();
}

}  // namespace quarry

// How blocks are held, and read in pieces.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "storage/log/read_block.h"
#include "storage/log/segmented_log.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

// Sectors of one part that are read to one stretch of memory.
struct SectorRun {
  const PartSectors* part = nullptr;
  uint64_t first = 0;  // sector of the part
  std::span<std::byte> out;

  uint64_t offset() const {  // on the disk
    return part->part.place.offset + part->part.frame_bytes + first * kSectorBytes;
  }
};

// In the order of the disk.
std::vector<SectorRun> RunsOf(const BlockSectors& block, std::span<const PieceToRead> pieces) {
  std::vector<SectorRun> runs;
  for (const PieceToRead& piece : pieces) {
    uint64_t offset = piece.offset;
    std::span<std::byte> rest = piece.out;
    auto part =
        std::upper_bound(block.parts.begin(), block.parts.end(), offset,
                         [](uint64_t at, const PartSectors& p) { return at < p.part.part_offset; });
    for (--part; !rest.empty(); ++part) {
      const uint64_t within = offset - part->part.part_offset;
      const uint64_t bytes =
          std::min<uint64_t>(rest.size(), RoundUp(part->part.part_bytes, kSectorBytes) - within);
      runs.push_back({&*part, within / kSectorBytes, rest.first(bytes)});
      offset += bytes;
      rest = rest.subspan(bytes);
    }
  }
  std::sort(runs.begin(), runs.end(),
            [](const SectorRun& a, const SectorRun& b) { return a.offset() < b.offset(); });
  return runs;
}

// Those that adjoin on the disk are one read.
absl::Status ReadRuns(Disk* disk, std::span<const SectorRun> runs) {
  std::vector<std::span<std::byte>> memory;
  for (const SectorRun& run : runs) memory.push_back(run.out);
  std::vector<DiskRead> reads;
  uint64_t end = 0;
  for (size_t i = 0, first = 0; i < runs.size(); ++i) {
    if (i == 0 || runs[i].offset() != end) {
      first = i;
      reads.push_back({runs[i].offset(), {}});
    }
    reads.back().out = ReadPieces(memory).subspan(first, i + 1 - first);
    end = runs[i].offset() + runs[i].out.size();
  }
  return disk->ReadMany(reads);
}

absl::Status NoLongerThere(const BlockId& id) {
  return absl::NotFoundError(absl::StrCat("block ", id.Hex(), " is no longer in the log"));
}

}  // namespace

class SegmentedLog::BlockReader final : public LoggedBlockReader {
 public:
  // Lets go of what is held. `block` is held already.
  BlockReader(SegmentedLog* log, LoggedBlock block) : log_(log), opened_(std::move(block)) {}
  ~BlockReader() override {
    absl::MutexLock lock(&log_->mutex_);
    log_->index_.Release(opened_.tenant, opened_.id, opened_.origin);
  }

  // Before anything else. As BlockLog::OpenBlock.
  absl::Status Open(const BlockKey& key) {
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<const Frames> frames, FramesOf(opened_));
    const WrittenAs& written = frames->sectors.written;
    if (written.key.full_key != key.full_key || written.key.parent != key.parent ||
        written.key.name_space != key.name_space) {
      return absl::NotFoundError(
          absl::StrCat("block id ", key.id.Hex(), " names a block of another key"));
    }
    digest_ = written.digest;
    return absl::OkStatus();
  }

  uint64_t bytes() const override { return opened_.bytes; }
  const ByteDigest& digest() const override { return digest_; }

  absl::Status Read(std::span<const PieceToRead> pieces) override {
    for (const PieceToRead& piece : pieces) QUARRY_RETURN_IF_ERROR(CheckPiece(piece));
    // Once more for every time that it was moved meanwhile.
    for (;;) {
      const std::optional<LoggedBlock> block = Now();
      if (!block.has_value()) return NoLongerThere(opened_.id);
      QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<const Frames> frames, FramesOf(*block));
      const std::vector<SectorRun> runs = RunsOf(frames->sectors, pieces);
      absl::Status status = ReadRuns(log_->disk_.get(), runs);
      for (size_t i = 0; status.ok() && i < runs.size(); ++i) {
        status = runs[i].part->Open(runs[i].first, runs[i].out);
      }
      if (!IsAt(frames->born)) continue;  // another block's bytes may have been read, sums and all
      if (status.ok()) {
        for (const PieceToRead& piece : pieces) log_->read_bytes_ += piece.out.size();
        return status;
      }
      return Failed(*block, status);
    }
  }

 private:
  // What the frames say at one place of the block.
  struct Frames {
    uint64_t born = 0;
    BlockSectors sectors;
  };

  absl::Status CheckPiece(const PieceToRead& piece) const {
    const uint64_t end = RoundUp(opened_.bytes, kSectorBytes);
    if (piece.offset % kSectorBytes == 0 && piece.out.size() % kSectorBytes == 0 &&
        reinterpret_cast<uintptr_t>(piece.out.data()) % kSectorBytes == 0 && piece.offset <= end &&
        piece.out.size() <= end - piece.offset) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(
        absl::StrCat("piece [", piece.offset, ", +", piece.out.size(), ") of block ",
                     opened_.id.Hex(), " of ", opened_.bytes, " bytes is not in whole sectors of ",
                     kSectorBytes, " bytes, on the disk and in memory, or passes the end"));
  }

  // Where the block is, if it still is the same one.
  std::optional<LoggedBlock> Now() const {
    absl::MutexLock lock(&log_->mutex_);
    const LoggedBlock* const now = log_->index_.Find(opened_.tenant, opened_.id);
    if (now == nullptr || now->origin != opened_.origin) return std::nullopt;
    return *now;
  }
  bool IsAt(uint64_t born) const {
    absl::MutexLock lock(&log_->mutex_);
    const LoggedBlock* const now = log_->index_.Find(opened_.tenant, opened_.id);
    return now != nullptr && now->born == born;
  }

  // Of the block where it was a moment ago, or where it was moved to since.
  absl::StatusOr<std::shared_ptr<const Frames>> FramesOf(LoggedBlock block) {
    for (;;) {
      {
        absl::MutexLock lock(&mutex_);
        if (frames_ != nullptr && frames_->born == block.born) return frames_;
      }
      absl::StatusOr<BlockSectors> sectors = ReadFrames(log_->source_, block);
      if (IsAt(block.born)) {
        if (!sectors.ok()) return Failed(block, sectors.status());
        auto frames = std::make_shared<const Frames>(Frames{block.born, *std::move(sectors)});
        absl::MutexLock lock(&mutex_);
        frames_ = frames;
        return frames;
      }
      std::optional<LoggedBlock> now = Now();
      if (!now.has_value()) return NoLongerThere(opened_.id);
      block = *std::move(now);
    }
  }

  // Counts it; what is broken is gone from now on.
  absl::Status Failed(const LoggedBlock& block, const absl::Status& why) {
    if (absl::IsDataLoss(why)) {
      (void)log_->DropBroken(block, why);
    } else {
      ++log_->read_errors_;
    }
    return why;
  }

  SegmentedLog* const log_;
  const LoggedBlock opened_;
  ByteDigest digest_;
  absl::Mutex mutex_;
  std::shared_ptr<const Frames> frames_ ABSL_GUARDED_BY(mutex_);
};

absl::StatusOr<std::unique_ptr<LoggedBlockReader>> SegmentedLog::OpenBlock(std::string_view tenant,
                                                                           const BlockKey& key) {
  std::unique_ptr<BlockReader> reader;
  {
    absl::MutexLock lock(&mutex_);
    LoggedBlock* const found = index_.Find(tenants_.Find(tenant), key.id);
    if (found == nullptr)
      return absl::NotFoundError(absl::StrCat("block ", key.id.Hex(), " is not in the log"));
    const uint64_t most = segments_.size() * superblock_.segment_bytes / 2;
    const uint64_t more = found->held() ? 0 : found->disk_bytes();
    if (index_.held_bytes() + more > most) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "log of ", disk_->name(), ": blocks that are held take ", index_.held_bytes(),
          " bytes; of ", more, " more, together at most ", most, " are allowed"));
    }
    found->Use();
    index_.Hold(found);
    reader = std::make_unique<BlockReader>(this, *found);
  }
  QUARRY_RETURN_IF_ERROR(reader->Open(key));
  return reader;
}

}  // namespace quarry

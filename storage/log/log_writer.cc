#include "storage/log/log_writer.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "proto/byte_digest.h"
#include "proto/check.h"
#include "proto/status_macros.h"
#include "storage/crash_point.h"
#include "storage/log/part_cipher.h"
#include "storage/slot_size.h"

namespace quarry {

LogWriter::LogWriter(Disk* disk, const Superblock& superblock, const LogWriterOptions& options,
                     SegmentTable* table, absl::Mutex* table_mutex, TenantKeys* keys,
                     uint64_t next_sequence)
    : disk_(disk),
      superblock_(superblock),
      options_(options),
      table_(table),
      table_mutex_(table_mutex),
      keys_(keys),
      next_sequence_(next_sequence) {}

FramePlace LogWriter::PlaceHere() const {
  return {superblock_.device, open_->segment, open_->generation, open_->at};
}

uint64_t LogWriter::SegmentEnd() const {
  return superblock_.SegmentOffset(open_->segment) + superblock_.segment_bytes;
}

uint64_t LogWriter::RoomFor(std::string_view tenant) const {
  const uint64_t behind =
      kSectorBytes + FooterBytes(open_->entry_bytes + 2 * FooterEntryBytes(tenant));
  const uint64_t left = SegmentEnd() - open_->at;
  return left < behind ? 0 : left - behind;
}

uint64_t LogWriter::RoomOfEmpty(std::string_view tenant) const {
  // Two entries: a purge has two frames.
  const uint64_t around = 2 * kSectorBytes + FooterBytes(2 * FooterEntryBytes(tenant));
  return superblock_.segment_bytes - around;
}

absl::Status LogWriter::OpenNext(uint32_t reserved) {
  AwaitBehind();  // calls of the disk have an order
  OpenSegment next;
  next.generation = options_.random();
  {
    absl::MutexLock lock(table_mutex_);
    const std::optional<uint32_t> free = table_->Open(reserved, next.generation, next_sequence_);
    if (!free.has_value()) {
      return absl::ResourceExhaustedError(
          absl::StrCat("log of ", disk_->name(), ": ", table_->free(), " of ", table_->size(),
                       " segments are free, ", reserved, " of them kept for reclaiming"));
    }
    next.segment = *free;
  }
  CrashPoint("segment.chosen");
  next.at = superblock_.SegmentOffset(next.segment);
  const AlignedBuffer start = EncodeSegmentStart(
      {superblock_.device, next.segment, next.generation, next.at}, next_sequence_++);
  // Beside the start, what an earlier use left at its second sector and its end must not speak for
  // this one.
  const AlignedBuffer zeros(kSectorBytes);
  const std::span<const std::byte> first[] = {start.bytes(), zeros.bytes()};
  const std::span<const std::byte> last[] = {zeros.bytes()};
  absl::Status begun = disk_->Write(next.at, first);
  CrashPoint("segment.start-written");
  if (begun.ok()) {
    begun = disk_->Write(next.at + superblock_.segment_bytes - kSectorBytes, last);
    CrashPoint("segment.end-cleared");
  }
  if (begun.ok()) {
    begun = WriteNote(disk_, superblock_, next.segment, next.generation, next_sequence_++, {});
    CrashPoint("segment.note-written");
  }
  if (begun.ok()) {
    begun = disk_->Sync();
    CrashPoint("segment.synced");
    // It was to make more durable than the start: what was written behind, and is not to be trusted
    // whatever a later sync says.
    if (!pending_.empty()) behind_status_.Update(begun);
  }
  if (!begun.ok()) {
    absl::MutexLock lock(table_mutex_);
    table_->Move(next.segment, SegmentState::kFree);
    return begun;
  }
  written_bytes_ += 3 * kSectorBytes + kWrittenNoteBytes;
  next.at += start.size();
  // A hint: where the disk cannot forget, nothing is lost.
  (void)disk_->Discard(next.at + kSectorBytes, superblock_.segment_bytes - 3 * kSectorBytes);
  CrashPoint("segment.discarded");
  open_ = std::move(next);
  BeginBatch();
  pending_.back().starts = true;
  return absl::OkStatus();
}

void LogWriter::BeginBatch() {
  Pending& batch = pending_.emplace_back();
  batch.place = PlaceHere();
  batch.from = open_->at;
  batch.first = next_sequence_;
  unwritten_bytes_ = 0;
}

void LogWriter::CloseBatch(bool seals) {
  if (pending_.empty() || pending_.back().place.segment != open_->segment) {
    if (!seals) return;
    BeginBatch();
  }
  Pending& batch = pending_.back();
  if (batch.count > 0) {
    batch.place = PlaceHere();
    open_->at += kSectorBytes;
  }
  batch.seals = seals;
  if (seals) batch.entries = std::move(open_->entries);
}

absl::Status LogWriter::Ensure(std::string_view tenant, uint64_t bytes, uint32_t reserved) {
  if (bytes > RoomOfEmpty(tenant)) {
    return absl::InvalidArgumentError(absl::StrCat("log of ", disk_->name(), ": ", bytes,
                                                   " bytes do not fit into a segment of ",
                                                   superblock_.segment_bytes));
  }
  if (open_.has_value() && RoomFor(tenant) < bytes) {
    CloseBatch(true);
    open_.reset();
  }
  if (!open_.has_value()) {
    QUARRY_RETURN_IF_ERROR(OpenNext(reserved));
  }
  if (pending_.empty() || pending_.back().place.segment != open_->segment) BeginBatch();
  return absl::OkStatus();
}

void LogWriter::Place(AlignedBuffer frame, std::span<const std::byte> payload, FooterEntry entry) {
  Pending& batch = pending_.back();
  entry.offset = open_->at;
  entry.frame_bytes = frame.size();
  entry.sequence = next_sequence_++;
  ++batch.count;
  if (entry.kind == FrameKind::kPart) batch.oldest_born = std::min(batch.oldest_born, entry.born);
  const uint64_t whole = payload.size() / kSectorBytes * kSectorBytes;
  uint64_t bytes = frame.size() + whole;
  batch.pieces.push_back(frame.bytes());
  batch.buffers.push_back(std::move(frame));
  if (whole > 0) batch.pieces.push_back(payload.first(whole));
  if (whole < payload.size()) {
    AlignedBuffer tail(kSectorBytes);
    std::memcpy(tail.bytes().data(), payload.data() + whole, payload.size() - whole);
    batch.pieces.push_back(tail.bytes());
    batch.buffers.push_back(std::move(tail));
    bytes += kSectorBytes;
  }
  open_->at += bytes;
  pending_bytes_ += bytes;
  open_->entry_bytes += FooterEntryBytes(entry.tenant);
  open_->entries.push_back(std::move(entry));
  unwritten_bytes_ += bytes;
  if (unwritten_bytes_ >= options_.write_behind_bytes) WriteBehind();
}

void LogWriter::WriteBehind() {
  Pending& batch = pending_.back();
  AwaitBehind();
  for (const auto& piece : batch.pieces) written_bytes_ += piece.size();
  auto write = [disk = disk_, offset = batch.from, pieces = std::exchange(batch.pieces, {})] {
    return disk->Write(offset, pieces);
  };
  try {
    behind_ = std::async(std::launch::async, write);
  } catch (const std::system_error&) {
    behind_status_.Update(write());  // there is no thread to be had
  }
  CrashPoint("data.begun-behind");
  batch.from = open_->at;
  unwritten_bytes_ = 0;
}

void LogWriter::AwaitBehind() {
  if (!behind_.valid()) return;
  behind_status_.Update(behind_.get());
  CrashPoint("data.behind-done");
}

absl::StatusOr<LoggedPart> LogWriter::AddPart(PartFrame* part, std::span<const std::byte> rest,
                                              uint32_t reserved) {
  const uint64_t wanted = std::min<uint64_t>(rest.size(), options_.max_part_bytes);
  const Sealing sealing = keys_ == nullptr ? Sealing::kPlain : Sealing::kSealed;
  // Of a part that may turn out shorter: its frame has no more.
  const uint64_t most_frame_bytes = PartFrameBytes(part->tenant, part->key, wanted, sealing);
  const uint64_t least = std::min(RoundUp(wanted, kSectorBytes), options_.min_part_bytes);
  QUARRY_RETURN_IF_ERROR(Ensure(part->tenant, most_frame_bytes + least, reserved));
  const uint64_t room = (RoomFor(part->tenant) - most_frame_bytes) / kSectorBytes * kSectorBytes;
  const std::span<const std::byte> bytes = rest.first(std::min(wanted, room));
  part->part_bytes = bytes.size();
  part->digest = bytes.size() == part->block_bytes ? part->block_digest : DigestOf(bytes);
  if (part->born == 0) part->born = next_sequence_;
  const LoggedPart placed{PlaceHere(), next_sequence_,
                          PartFrameBytes(part->tenant, part->key, bytes.size(), sealing),
                          part->part_offset, bytes.size()};
  if (keys_ != nullptr) {
    QUARRY_RETURN_IF_ERROR(PlaceSealed(part, bytes));
  } else {
    part->sums = SectorSums(bytes);
    Place(EncodePart(placed.place, placed.sequence, *part), bytes, EntryOf(*part));
  }
  return placed;
}

absl::Status LogWriter::PlaceSealed(PartFrame* part, std::span<const std::byte> bytes) {
  std::optional<TenantKeys::Writing> with = keys_->ForWriting(part->tenant);
  if (!with.has_value()) {
    AwaitBehind();  // calls of the disk have an order
    QUARRY_ASSIGN_OR_RETURN(with, keys_->Draw(part->tenant, next_sequence_));
  }
  part->seal = with->seal;
  AlignedBuffer sealed(RoundUp(bytes.size(), kSectorBytes));
  AlignedBuffer frame = EncodeSealedPart(PlaceHere(), next_sequence_, with->part_key, bytes,
                                         sealed.bytes().data(), part);
  const std::span<const std::byte> payload = sealed.bytes();
  pending_.back().buffers.push_back(std::move(sealed));
  Place(std::move(frame), payload, EntryOf(*part));
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> LogWriter::AddPurge(PurgeFrame* purge) {
  const uint64_t bytes = EncodePurge({}, 0, *purge).size();
  QUARRY_RETURN_IF_ERROR(Ensure(purge->tenant, 2 * bytes, 0));
  if (purge->born == 0) {
    purge->born = next_sequence_;
    for (PurgedBlock& block : purge->blocks) block.born = next_sequence_;
  }
  for (const uint8_t copy : {0, 1}) {
    purge->copy = copy;
    Place(EncodePurge(PlaceHere(), next_sequence_, *purge), {}, EntryOf(*purge));
  }
  open_->note.Add(purge->tenant, purge->born);
  pending_.back().note = open_->note;
  return open_->segment;
}

absl::Status LogWriter::WriteData() {
  AwaitBehind();
  unwritten_bytes_ = 0;
  QUARRY_RETURN_IF_ERROR(std::exchange(behind_status_, absl::OkStatus()));
  for (Pending& batch : pending_) {
    if (!batch.pieces.empty()) {
      QUARRY_RETURN_IF_ERROR(disk_->Write(batch.from, batch.pieces));
      for (const auto& piece : batch.pieces) written_bytes_ += piece.size();
    }
    if (!batch.note.has_value()) continue;
    QUARRY_RETURN_IF_ERROR(WriteNote(disk_, superblock_, batch.place.segment,
                                     batch.place.generation, next_sequence_++, *batch.note));
    written_bytes_ += kWrittenNoteBytes;
    CrashPoint("data.note-written");
  }
  CrashPoint("data.written");
  return absl::OkStatus();
}

absl::Status LogWriter::WriteCommits() {
  for (Pending& batch : pending_) {
    if (batch.count > 0) {
      const AlignedBuffer commit =
          EncodeCommit(batch.place, next_sequence_++, {batch.first, batch.count});
      const std::span<const std::byte> piece[] = {commit.bytes()};
      QUARRY_RETURN_IF_ERROR(disk_->Write(batch.place.offset, piece));
      written_bytes_ += commit.size();
      CrashPoint("commit.frame-written");
    }
    if (!batch.seals) continue;
    CrashPoint("commit.footer-next");
    QUARRY_ASSIGN_OR_RETURN(
        const uint64_t bytes,
        WriteFooter(disk_, superblock_, batch.place.segment,
                    {batch.place.generation, next_sequence_++, std::move(batch.entries)}));
    written_bytes_ += bytes;
    CrashPoint("commit.footer-written");
  }
  CrashPoint("commit.written");
  return disk_->Sync();
}

void LogWriter::GiveUp() {
  absl::MutexLock lock(table_mutex_);
  for (const Pending& batch : pending_) {
    SegmentInfo& info = table_->at(batch.place.segment);
    info.oldest_born = std::min(info.oldest_born, batch.oldest_born);
    table_->Move(batch.place.segment,
                 batch.starts ? SegmentState::kFree : SegmentState::kCondemned);
    if (open_.has_value() && open_->segment == batch.place.segment) open_.reset();
  }
  pending_.clear();
  pending_bytes_ = 0;
}

absl::Status LogWriter::Commit() {
  if (pending_.empty()) return absl::OkStatus();
  if (open_.has_value()) CloseBatch(false);
  absl::Status status = WriteData();
  if (status.ok()) status = disk_->Sync();
  CrashPoint("commit.data-synced");
  if (status.ok()) status = WriteCommits();
  CrashPoint("commit.synced");
  if (!status.ok()) {
    GiveUp();
    return status;
  }
  absl::MutexLock lock(table_mutex_);
  for (const Pending& batch : pending_) {
    SegmentInfo& info = table_->at(batch.place.segment);
    info.oldest_born =
        batch.starts ? batch.oldest_born : std::min(info.oldest_born, batch.oldest_born);
    if (batch.seals) table_->Move(batch.place.segment, SegmentState::kSealed);
  }
  CrashPoint("commit.counted");
  pending_.clear();
  pending_bytes_ = 0;
  return absl::OkStatus();
}

}  // namespace quarry

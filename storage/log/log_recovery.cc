#include "storage/log/log_recovery.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include <spdlog/spdlog.h>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "storage/crash_point.h"
#include "storage/log/block_log.h"
#include "storage/log/footer.h"
#include "storage/log/purge_note.h"
#include "storage/log/sectors.h"
#include "storage/log/tenant_keys.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

// Superblocks last: a disk with one has all that belongs to it.
absl::Status Format(Disk* disk, const Superblock& superblock) {
  CrashPoint("format.begun");
  QUARRY_RETURN_IF_ERROR(WriteEmptyNotes(disk, superblock));
  QUARRY_RETURN_IF_ERROR(WriteNoKeys(disk, superblock));
  CrashPoint("format.areas-written");
  QUARRY_RETURN_IF_ERROR(disk->Sync());
  CrashPoint("format.areas-synced");
  for (int copy = 0; copy < LogLayout::kSuperblocks; ++copy) {
    const uint64_t offset = superblock.SuperblockOffset(copy);
    const AlignedBuffer frame = EncodeSuperblock(superblock, offset);
    const std::span<const std::byte> piece[] = {frame.bytes()};
    QUARRY_RETURN_IF_ERROR(disk->Write(offset, piece));
    CrashPoint("format.copy-written");
  }
  CrashPoint("format.written");
  return disk->Sync();
}

// Copies that are broken, or were not written when the disk was formatted, are written again: the
// good ones may break, too. One of another version is left as it is.
absl::Status MendSuperblocks(Disk* disk, const Superblock& superblock) {
  bool mended = false;
  AlignedBuffer sector(kSectorBytes);
  for (int copy = 0; copy < LogLayout::kSuperblocks; ++copy) {
    const uint64_t offset = superblock.SuperblockOffset(copy);
    if (!ReadSectors(disk, offset, &sector).ok()) continue;
    const absl::StatusOr<Superblock> found = DecodeSuperblock(sector.bytes(), offset);
    if (absl::IsFailedPrecondition(found.status()) || (found.ok() && *found == superblock)) {
      continue;
    }
    spdlog::warn("copy {} of the superblock of {} is broken, and written again", copy,
                 disk->name());
    const AlignedBuffer frame = EncodeSuperblock(superblock, offset);
    const std::span<const std::byte> piece[] = {frame.bytes()};
    QUARRY_RETURN_IF_ERROR(disk->Write(offset, piece));
    CrashPoint("recovery.superblock-mended");
    mended = true;
  }
  return mended ? disk->Sync() : absl::OkStatus();
}

absl::Status CheckKey(const std::string& disk, const Superblock& superblock,
                      const std::optional<LogKey>& key) {
  const bool encrypted = superblock.key_slots > 0;
  if (!key.has_value()) {
    if (!encrypted) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat(
        "the log on ", disk, " is encrypted, and no key is given; it is left as it is"));
  }
  if (!encrypted) {
    return absl::FailedPreconditionError(absl::StrCat("the log on ", disk,
                                                      " is not encrypted, and a key is given, in ",
                                                      key->origin, "; it is left as it is"));
  }
  if (KeyCheckOf(key->secret, superblock.device) == superblock.key_check) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "the key in ", key->origin, " is not that of the log on ", disk, "; it is left as it is"));
}

}  // namespace

absl::StatusOr<Superblock> OpenSuperblock(Disk* disk, uint64_t segment_bytes,
                                          const std::optional<LogKey>& key,
                                          const std::function<uint64_t()>& random) {
  const uint64_t least = key.has_value() ? EncryptedLogBytes(kLeastSegments, segment_bytes)
                                         : LogBytes(kLeastSegments, segment_bytes);
  if (disk->bytes() < least) {
    return absl::FailedPreconditionError(absl::StrCat("disk ", disk->name(), " has ", disk->bytes(),
                                                      " bytes; a log of segments of ",
                                                      segment_bytes, " needs ", least));
  }
  Superblock fresh;
  for (size_t i = 0; i < fresh.device.size(); i += 8) {
    const uint64_t number = random();
    std::memcpy(fresh.device.data() + i, &number, 8);
  }
  auto segments = static_cast<uint32_t>(disk->bytes() / segment_bytes);
  LogLayout& layout = fresh;
  do {
    layout = key.has_value() ? LogLayout::Encrypted(segment_bytes, segments)
                             : LogLayout{segment_bytes, segments};
    --segments;
  } while (layout.bytes() > disk->bytes());
  if (key.has_value()) fresh.key_check = KeyCheckOf(key->secret, fresh.device);
  // The place of the last copy is known from any other; on a disk that was formatted with another
  // size of segments the fresh one's has something else.
  bool blank = true;
  absl::Status trouble;
  AlignedBuffer sector(kSectorBytes);
  for (int copy = 0; copy < LogLayout::kSuperblocks; ++copy) {
    const uint64_t offset = fresh.SuperblockOffset(copy);
    if (absl::Status read = ReadSectors(disk, offset, &sector); !read.ok()) {
      trouble = read;  // above all else: what is there is not known
      blank = false;
      continue;
    }
    const absl::StatusOr<Superblock> found = DecodeSuperblock(sector.bytes(), offset);
    if (!found.ok()) {
      if (!IsBlank(sector.bytes())) {
        blank = false;
        trouble.Update(found.status());
      }
      continue;
    }
    if (found->bytes() > disk->bytes()) {
      return absl::FailedPreconditionError(absl::StrCat("the log on ", disk->name(), " has ",
                                                        found->bytes(), " bytes, the disk ",
                                                        disk->bytes()));
    }
    QUARRY_RETURN_IF_ERROR(CheckKey(disk->name(), *found, key));
    if (const absl::Status mended = MendSuperblocks(disk, *found); !mended.ok()) {
      spdlog::error("the superblock of {} stays broken: {}", disk->name(),
                    std::string(mended.message()));
    }
    return *found;
  }
  if (absl::IsUnavailable(trouble)) return trouble;
  if (!blank) {
    return absl::FailedPreconditionError(absl::StrCat(
        disk->name(), " is not blank, and no log of this version: ", std::string(trouble.message()),
        "; it is left as it is"));
  }
  QUARRY_RETURN_IF_ERROR(Format(disk, fresh));
  CrashPoint("format.synced");
  return fresh;
}

namespace {

// Reads a stretch of the disk from its start to its end, in large pieces. What cannot be read is
// zeros.
class SectorReader {
 public:
  SectorReader(Disk* disk, uint64_t end) : disk_(disk), end_(end) {}

  // Whether all could be read so far.
  bool complete() const { return complete_; }
  // Until the next call.
  std::span<const std::byte> At(uint64_t offset, uint64_t bytes) {
    if (offset < from_ || offset + bytes > from_ + window_.size()) Fill(offset, bytes);
    return window_.bytes().subspan(offset - from_, bytes);
  }

 private:
  static constexpr uint64_t kWindowBytes = 1ull << 20;

  void Fill(uint64_t offset, uint64_t bytes) {
    from_ = offset;
    window_ = AlignedBuffer(std::max(bytes, std::min(kWindowBytes, end_ - offset)));
    const std::vector<bool> read = ReadEachSector(disk_, offset, &window_);
    complete_ &= std::find(read.begin(), read.end(), false) == read.end();
  }

  Disk* const disk_;
  const uint64_t end_;
  uint64_t from_ = 0;
  AlignedBuffer window_;
  bool complete_ = true;
};

// More than any log writes from one start to the next.
constexpr uint64_t kUnreadSequences = 1ull << 40;

class Recovery {
 public:
  Recovery(Disk* disk, const Superblock& superblock, TenantNames* tenants)
      : disk_(disk),
        superblock_(superblock),
        tenants_(tenants),
        out_{superblock, LogIndex(superblock.segments), SegmentTable(superblock.segments),
             PurgeTable(superblock.segments)} {}

  absl::StatusOr<RecoveredLog> Run() {
    CrashPoint("recovery.begun");
    for (uint32_t s = 0; s < superblock_.segments; ++s) RecoverSegment(s);
    CrashPoint("recovery.segments-read");
    if (unreadable_ == superblock_.segments) {
      return absl::UnavailableError(absl::StrCat("none of the ", unreadable_, " segments of ",
                                                 disk_->name(), " can be read"));
    }
    ChooseBlocks();
    CrashPoint("recovery.blocks-chosen");
    // What could not be read may have any sequence up to there.
    if (incomplete_) out_.next_sequence += kUnreadSequences;
    if (out_.hidden_blocks > 0) {
      spdlog::error(
          "{} blocks on {} are not found until all segments can be read: they may have been purged",
          out_.hidden_blocks, disk_->name());
    }
    return std::move(out_);
  }

 private:
  using BlockName = std::pair<TenantName, BlockId>;

  void Saw(uint64_t sequence) { out_.next_sequence = std::max(out_.next_sequence, sequence + 1); }

  void RecoverSegment(uint32_t s) {
    SegmentInfo info;
    bool complete = true;  // all that there may be has been read
    const std::optional<FrameHead> start = FindStart(s, &complete);
    std::optional<uint64_t> generation;
    if (start.has_value()) {
      generation = start->place.generation;
      info.first_sequence = start->sequence;
      CrashPoint("recovery.start-read");
    }
    absl::StatusOr<Footer> footer = ReadFooter(disk_, superblock_, s, generation);
    const bool sealed = footer.ok();
    if (sealed) {
      Saw(footer->sequence);
    } else {
      complete &= !absl::IsUnavailable(footer.status());
      footer = Footer{generation.value_or(0), 0, {}};
      if (generation.has_value()) {
        ++out_.scanned_segments;
        footer->entries = Scan(s, *generation, &complete);
        CrashPoint("recovery.scanned");
      } else if (!complete) {
        ++unreadable_;
      }
    }
    info.generation = footer->generation;
    for (const FooterEntry& entry : footer->entries) {
      Saw(entry.sequence);
      if (entry.kind != FrameKind::kPart) continue;
      info.oldest_born = std::min(info.oldest_born, entry.born);
    }
    PurgeNote note;
    complete &= TakePurges(s, *footer, &note);
    absl::Status usable;
    if (!complete) {
      info.oldest_born = 0;
      incomplete_ = true;
      HideWhatMayBePurged(s, sealed ? footer->generation : generation);
      usable = absl::UnavailableError("something of it cannot be read");
    } else if (!sealed && !footer->entries.empty()) {
      usable = Seal(s, note, &*footer);
    }
    info.state = SegmentState::kSealed;
    if (footer->entries.empty()) info.state = SegmentState::kFree;
    if (!usable.ok()) {
      info.state = SegmentState::kCondemned;
      spdlog::error("segment {} of {} is not written any more: {}", s, disk_->name(),
                    std::string(usable.message()));
    }
    out_.segments.Set(s, info);
    for (const FooterEntry& entry : footer->entries) {
      if (entry.kind != FrameKind::kPart) continue;
      TakePart({superblock_.device, s, info.generation, entry.offset}, entry);
    }
  }

  // The note too: purges count that were never committed, and then its own may be of before.
  absl::Status Seal(uint32_t s, const PurgeNote& note, Footer* footer) {
    QUARRY_RETURN_IF_ERROR(
        WriteNote(disk_, superblock_, s, footer->generation, out_.next_sequence++, note));
    CrashPoint("recovery.note-written");
    footer->sequence = out_.next_sequence++;
    QUARRY_RETURN_IF_ERROR(WriteFooter(disk_, superblock_, s, *footer).status());
    CrashPoint("recovery.footer-written");
    QUARRY_RETURN_IF_ERROR(disk_->Sync());
    CrashPoint("recovery.sealed");
    return absl::OkStatus();
  }

  // The start of a segment, or the frame behind it where that is broken; nothing where neither is
  // one of this segment, or not `complete`, where they cannot be read.
  std::optional<FrameHead> FindStart(uint32_t s, bool* complete) {
    const uint64_t start = superblock_.SegmentOffset(s);
    AlignedBuffer sector(kSectorBytes);
    for (const uint64_t at : {start, start + kSectorBytes}) {
      if (!ReadSectors(disk_, at, &sector).ok()) {
        *complete = false;
        continue;
      }
      const absl::StatusOr<FrameHead> head =
          at == start ? DecodeSegmentStart(sector.bytes()) : PeekFrame(sector.bytes());
      if (!head.ok() || head->place.device != superblock_.device || head->place.segment != s ||
          head->place.offset != at) {
        continue;
      }
      Saw(head->sequence);
      *complete = true;  // it is known which use of the segment this is
      return *head;
    }
    return std::nullopt;
  }

  // What was committed in a segment without a footer. Where a frame is broken, or cannot be read,
  // the next one is looked for; a purge counts whether it was committed or not.
  std::vector<FooterEntry> Scan(uint32_t s, uint64_t generation, bool* complete) {
    const uint64_t end = superblock_.SegmentOffset(s) + superblock_.segment_bytes;
    std::vector<FooterEntry> committed, pending;
    SectorReader sectors(disk_, end);
    for (uint64_t at = superblock_.SegmentOffset(s) + kSectorBytes; at < end;) {
      const FramePlace place{superblock_.device, s, generation, at};
      const absl::StatusOr<FrameHead> head = PeekFrame(sectors.At(at, kSectorBytes));
      if (!head.ok() || head->place != place || head->bytes > end - at) {
        at += kSectorBytes;
        continue;
      }
      const std::span<const std::byte> frame = sectors.At(at, head->bytes);
      if (head->kind == FrameKind::kCommit) {
        const auto commit = DecodeCommit(frame, place, head->sequence);
        if (!commit.ok()) {
          at += kSectorBytes;
          continue;
        }
        for (FooterEntry& entry : pending) {
          if (entry.sequence - commit->first < commit->count) {
            committed.push_back(std::move(entry));
          }
        }
        pending.clear();
        Saw(head->sequence);
        at += head->bytes;
        continue;
      }
      std::optional<FooterEntry> entry = EntryAt(frame, place, *head);
      const uint64_t payload = entry.has_value() ? RoundUp(entry->part_bytes, kSectorBytes) : 0;
      if (!entry.has_value() || payload > end - at - head->bytes) {
        at += kSectorBytes;
        continue;
      }
      (entry->kind == FrameKind::kPurge ? committed : pending).push_back(*std::move(entry));
      Saw(head->sequence);
      at += head->bytes + payload;
    }
    *complete &= sectors.complete();
    // A purge counts before the parts in front of it do; a footer has them as they lie.
    std::sort(committed.begin(), committed.end(),
              [](const FooterEntry& a, const FooterEntry& b) { return a.offset < b.offset; });
    return committed;
  }

  std::optional<FooterEntry> EntryAt(std::span<const std::byte> frame, const FramePlace& place,
                                     const FrameHead& head) {
    FooterEntry entry;
    if (head.kind == FrameKind::kPart) {
      const absl::StatusOr<PartFrame> part = DecodePart(frame, place, head.sequence);
      if (!part.ok()) return std::nullopt;
      entry = EntryOf(*part);
    } else if (head.kind == FrameKind::kPurge) {
      const absl::StatusOr<PurgeFrame> purge = DecodePurge(frame, place, head.sequence);
      if (!purge.ok()) return std::nullopt;
      entry = EntryOf(*purge);
    } else {
      return std::nullopt;
    }
    entry.offset = place.offset;
    entry.frame_bytes = head.bytes;
    entry.sequence = head.sequence;
    return entry;
  }

  // The purges of a segment, each by either of its copies. False: one cannot be read now.
  bool TakePurges(uint32_t s, const Footer& footer, PurgeNote* note) {
    bool complete = true;
    absl::flat_hash_map<uint64_t, absl::Status> read;  // by sequence
    for (const FooterEntry& entry : footer.entries) {
      if (entry.kind != FrameKind::kPurge) continue;
      const FramePlace place{superblock_.device, s, footer.generation, entry.offset};
      const absl::StatusOr<PurgeFrame> purge = ReadPurge(disk_, place, entry);
      read[entry.sequence] = purge.status();
      if (!purge.ok()) continue;
      const TenantName tenant = tenants_->Intern(purge->tenant);
      note->Add(purge->tenant, purge->born);
      out_.purges.Add(tenant, *purge, s);
      if (!purge->destroys_keys) continue;
      uint64_t& before = out_.destroyed_keys[tenant];
      before = std::max(before, purge->born);
    }
    for (const FooterEntry& entry : footer.entries) {
      if (entry.kind != FrameKind::kPurge || read[entry.sequence].ok()) continue;
      const auto other =
          read.find(entry.part_offset == 0 ? entry.sequence + 1 : entry.sequence - 1);
      if (other != read.end() && other->second.ok()) continue;
      if (absl::IsDataLoss(read[entry.sequence])) {
        if (other != read.end() && !absl::IsDataLoss(other->second)) continue;
        note->Add(entry.tenant, entry.born);
        ReplaceBrokenPurge(s, entry, read[entry.sequence]);
      } else {
        complete = false;
      }
    }
    return complete;
  }

  // Of a purge that is broken in both places it is known whose it was: better that too much of the
  // tenant's is gone.
  void ReplaceBrokenPurge(uint32_t s, const FooterEntry& entry, const absl::Status& why) {
    spdlog::error(
        "a purge of tenant {} on {} is broken: all that the tenant had before is dropped ({})",
        entry.tenant, disk_->name(), std::string(why.message()));
    PurgeFrame all;
    all.tenant = entry.tenant;
    all.born = entry.born;
    out_.purges.Add(tenants_->Intern(all.tenant), all, s);
  }

  // Without a note that is anything of anybody's.
  void HideWhatMayBePurged(uint32_t s, std::optional<uint64_t> generation) {
    const absl::StatusOr<PurgeNote> note = ReadNote(disk_, superblock_, s, generation);
    if (note.ok()) {
      unread_purges_.Add(*note);
    } else {
      unread_purges_.AddAny(~0ull);
      spdlog::error("what was purged in segment {} of {} is not known: {}", s, disk_->name(),
                    std::string(note.status().message()));
    }
  }

  // Blocks by id and birth.
  void TakePart(const FramePlace& place, const FooterEntry& entry) {
    LoggedBlock& block = found_[{tenants_->Intern(entry.tenant), entry.id}][entry.born];
    if (block.parts.empty()) {
      block.tenant = tenants_->Intern(entry.tenant);
      block.id = entry.id;
      block.parent = entry.parent;
      block.name_space = entry.name_space;
      block.bytes = entry.block_bytes;
      block.born = entry.born;
    }
    block.parts.push_back(
        {place, entry.sequence, entry.frame_bytes, entry.part_offset, entry.part_bytes});
  }

  static bool IsWhole(LoggedBlock* block) {
    std::sort(
        block->parts.begin(), block->parts.end(),
        [](const LoggedPart& a, const LoggedPart& b) { return a.part_offset < b.part_offset; });
    uint64_t next = 0;
    for (const LoggedPart& part : block->parts) {
      if (part.part_offset != next) return false;
      next += part.part_bytes;
    }
    return next == block->bytes && next > 0;
  }

  void ChooseBlocks() {
    for (auto& [name, births] : found_) {
      for (auto birth = births.rbegin(); birth != births.rend(); ++birth) {
        LoggedBlock& block = birth->second;
        if (out_.purges.Covers(block)) break;  // and so are older ones
        if (!IsWhole(&block)) {
          ++out_.incomplete_blocks;
          continue;
        }
        if (incomplete_ && block.born < unread_purges_.BoundOf(*block.tenant)) {
          Hide(block);
          break;  // and so would be older ones
        }
        out_.index.Add(std::move(block));
        break;
      }
      births.clear();
    }
  }

  void Hide(const LoggedBlock& block) {
    ++out_.hidden_blocks;
    for (const LoggedPart& part : block.parts) {
      out_.segments.at(part.place.segment).hidden_bytes += part.disk_bytes();
    }
  }

  Disk* const disk_;
  const Superblock superblock_;
  TenantNames* const tenants_;
  RecoveredLog out_;
  uint32_t unreadable_ = 0;
  absl::flat_hash_map<BlockName, std::map<uint64_t, LoggedBlock>> found_;  // by birth
  PurgeNote unread_purges_;  // of segments that are not complete
  bool incomplete_ = false;
};

}  // namespace

absl::StatusOr<RecoveredLog> RecoverLog(Disk* disk, const Superblock& superblock,
                                        TenantNames* tenants) {
  return Recovery(disk, superblock, tenants).Run();
}

}  // namespace quarry

// How segments are used anew: what is moved, what is dropped, and in which order.
#include <algorithm>
#include <utility>

#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "storage/crash_point.h"
#include "storage/log/footer.h"
#include "storage/log/read_block.h"
#include "storage/log/segmented_log.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

// Segments that may turn out not to be reclaimable in one call.
constexpr uint32_t kMostFailed = 2;
constexpr int kReadTries = 3;

}  // namespace

absl::Status SegmentedLog::FreeSegments(uint32_t wanted) {
  absl::Status trouble;
  uint32_t failed = 0;
  bool looked_again = false;
  for (uint32_t tries = 0; tries <= 2 * superblock_.segments && failed <= kMostFailed; ++tries) {
    {
      absl::MutexLock lock(&mutex_);
      if (segments_.free() >= wanted) return absl::OkStatus();
    }
    const std::optional<uint32_t> victim = ChooseVictim();
    if (!victim.has_value()) {
      if (passed_over_.empty() || looked_again) break;
      looked_again = true;
      passed_over_.clear();
      continue;
    }
    CrashPoint("reclaim.chosen");
    const absl::Status reclaimed = Reclaim(*victim);
    if (reclaimed.ok()) {
      tried_before_.erase(*victim);
      continue;
    }
    if (absl::IsCancelled(reclaimed)) {
      passed_over_.insert(*victim);
      trouble = reclaimed;
      continue;
    }
    if (!absl::IsAborted(reclaimed)) return reclaimed;
    spdlog::error("segment {} of {} cannot be reclaimed: {}", *victim, disk_->name(),
                  std::string(reclaimed.message()));
    passed_over_.insert(*victim);
    tried_before_.insert(*victim);
    trouble = reclaimed;
    ++failed;
  }
  // Where one after the other cannot be read, it is the disk.
  if (failed > kMostFailed) return absl::UnavailableError(trouble.message());
  absl::MutexLock lock(&mutex_);
  return absl::ResourceExhaustedError(
      absl::StrCat("log of ", disk_->name(), ": ", segments_.free(), " of ", segments_.size(),
                   " segments are free, ", wanted, " are wanted, and none can be reclaimed (",
                   segments_.condemned(), " are condemned) ", std::string(trouble.message())));
}

std::optional<uint32_t> SegmentedLog::ChooseVictim() const {
  std::optional<uint32_t> emptiest, oldest, least_held;
  uint64_t least = 0;
  absl::MutexLock lock(&mutex_);
  for (uint32_t s = 0; s < segments_.size(); ++s) {
    if (segments_.at(s).state != SegmentState::kSealed || passed_over_.contains(s)) continue;
    if (index_.held_bytes(s) > 0) {
      if (!least_held.has_value() || index_.held_bytes(s) < index_.held_bytes(*least_held)) {
        least_held = s;
      }
      continue;
    }
    const uint64_t kept = index_.live_bytes(s) + segments_.at(s).hidden_bytes + purges_.bytes(s);
    if (!emptiest.has_value() || kept < least) {
      emptiest = s;
      least = kept;
    }
    if (!oldest.has_value() ||
        segments_.at(s).first_sequence < segments_.at(*oldest).first_sequence) {
      oldest = s;
    }
  }
  if (!oldest.has_value()) return least_held;
  // Little to move, or else what was written longest ago.
  return emptiest.has_value() && least < superblock_.segment_bytes / 4 ? emptiest : oldest;
}

absl::Status SegmentedLog::Reclaim(uint32_t segment) {
  uint64_t generation;
  {
    absl::MutexLock lock(&mutex_);
    generation = segments_.at(segment).generation;
  }
  const absl::StatusOr<Footer> footer = ReadFooter(disk_.get(), superblock_, segment, generation);
  if (absl::IsDataLoss(footer.status())) {
    spdlog::error(
        "segment {} of {} has lost its footer: what it has is read, and it is not "
        "written any more ({})",
        segment, disk_->name(), std::string(footer.status().message()));
    absl::MutexLock lock(&mutex_);
    segments_.Move(segment, SegmentState::kCondemned);
    return absl::OkStatus();
  }
  if (!footer.ok()) {
    ++read_errors_;
    return absl::AbortedError(footer.status().message());
  }
  CrashPoint("reclaim.footer-read");
  QUARRY_RETURN_IF_ERROR(MoveOrDrop(segment, footer->entries));
  CrashPoint("reclaim.dropped");
  absl::MutexLock lock(&mutex_);
  segments_.Move(segment, SegmentState::kFree);
  CrashPoint("reclaim.freed");
  return absl::OkStatus();
}

bool SegmentedLog::Keeps(const LoggedBlock& block) const {
  if (options_.keep == nullptr) return block.uses > 0;
  return options_.keep({*block.tenant, block.id, block.bytes, block.uses});
}

std::vector<LoggedBlock> SegmentedLog::TakeStock(uint32_t segment,
                                                 std::span<const FooterEntry> entries) const {
  std::vector<LoggedBlock> live;
  absl::flat_hash_set<std::pair<TenantName, BlockId>> seen;
  absl::MutexLock lock(&mutex_);
  for (const FooterEntry& entry : entries) {
    if (entry.kind != FrameKind::kPart) continue;
    const TenantName tenant = tenants_.Find(entry.tenant);
    const LoggedBlock* const block = index_.Find(tenant, entry.id);
    if (block == nullptr || seen.contains({tenant, entry.id})) continue;
    const bool here =
        std::any_of(block->parts.begin(), block->parts.end(),
                    [&](const LoggedPart& part) { return part.place.segment == segment; });
    if (!here) continue;
    seen.insert({tenant, entry.id});
    live.push_back(*block);
  }
  std::stable_sort(live.begin(), live.end(), [](const LoggedBlock& a, const LoggedBlock& b) {
    return std::pair(a.held(), a.uses) > std::pair(b.held(), b.uses);
  });
  return live;
}

absl::Status SegmentedLog::MoveBlock(const LoggedBlock& block, std::vector<Moved>* moved) {
  Moved one{block, {}, AlignedBuffer(RoundUp(block.bytes, kSectorBytes))};
  const std::span<std::byte> bytes = one.bytes.bytes().first(block.bytes);
  writer_.AwaitBehind();
  absl::StatusOr<WrittenAs> origin = ReadBlock(source_, block, bytes);
  for (int tries = 1; tries < kReadTries && absl::IsUnavailable(origin.status()); ++tries) {
    origin = ReadBlock(source_, block, bytes);
  }
  if (!origin.ok()) {
    absl::IsDataLoss(origin.status()) ? ++broken_blocks_ : ++read_errors_;
    spdlog::error("block {} cannot be moved: {}", block.id.Hex(),
                  std::string(origin.status().message()));
    if (absl::IsDataLoss(origin.status())) return origin.status();
    return absl::AbortedError(origin.status().message());
  }
  CrashPoint("reclaim.block-read");
  PartFrame frame;
  frame.tenant = *block.tenant;
  frame.key = std::move(origin->key);
  frame.block_digest = origin->digest;
  const absl::Status placed = Place(frame, bytes, 0, &one.to);
  one.to.uses = block.uses / 2;
  one.whole = placed.ok();
  moved->push_back(std::move(one));
  CrashPoint("reclaim.block-added");
  return placed;
}

absl::Status SegmentedLog::HandOver(std::span<const LoggedBlock> live, bool again,
                                    MovedPurges* purges, std::vector<Moved>* moved,
                                    std::vector<Dropped>* dropped) {
  QUARRY_RETURN_IF_ERROR(CheckRoomForHeld(live));
  for (size_t i = 0; i < purges->frames.size(); ++i) {
    absl::StatusOr<uint32_t> place = writer_.AddPurge(&purges->frames[i]);
    if (absl::IsResourceExhausted(place.status())) {
      return absl::AbortedError(place.status().message());
    }
    QUARRY_ASSIGN_OR_RETURN(purges->places[i], std::move(place));
    CrashPoint("reclaim.purges-added");
  }
  uint64_t room = superblock_.segment_bytes / 4 * 3;
  room -= std::min(room, writer_.pending_bytes());
  {
    // Without a segment to move to, dropping is what makes one.
    absl::MutexLock lock(&mutex_);
    if (segments_.free() == 0) room = 0;
  }
  for (const LoggedBlock& block : live) {
    const uint64_t bytes = block.disk_bytes();
    const bool wanted = Keeps(block);
    if (!block.held() && (!wanted || bytes > room)) {
      dropped->push_back({block, Why::kUnwanted});
      continue;
    }
    const absl::Status kept = MoveBlock(block, moved);
    if (kept.ok()) {
      room -= std::min(room, bytes);
    } else if (absl::IsDataLoss(kept)) {
      dropped->push_back({block, Why::kBroken});
    } else if (again && absl::IsAborted(kept) && !block.held()) {
      dropped->push_back({block, Why::kUnwanted});
    } else if (block.held() && absl::IsResourceExhausted(kept)) {
      return absl::CancelledError(kept.message());
    } else {
      return kept;
    }
  }
  return absl::OkStatus();
}

absl::Status SegmentedLog::CheckRoomForHeld(std::span<const LoggedBlock> live) const {
  uint64_t wanted = 0;
  for (const LoggedBlock& block : live) wanted += block.held() ? block.disk_bytes() : 0;
  absl::MutexLock lock(&mutex_);
  const uint64_t room = segments_.free() * (superblock_.segment_bytes / 4 * 3);
  if (wanted <= room) return absl::OkStatus();
  return absl::CancelledError(
      absl::StrCat("blocks of it that are held take ", wanted, " bytes, and ", room, " are free"));
}

absl::Status SegmentedLog::MoveOrDrop(uint32_t segment, std::span<const FooterEntry> entries) {
  uint64_t oldest;
  {
    absl::MutexLock lock(&mutex_);
    oldest = segments_.OldestBornExcept(segment);
  }
  MovedPurges purges;
  purges.frames = purges_.Take(segment, oldest, PurgeFrame::MostBlocks(superblock_.segment_bytes));
  purges.places.resize(purges.frames.size(), segment);
  CrashPoint("reclaim.purges-taken");
  std::vector<Moved> moved;
  std::vector<Dropped> dropped;
  absl::Status status = HandOver(TakeStock(segment, entries), tried_before_.contains(segment),
                                 &purges, &moved, &dropped);
  // Also where it failed: nothing may stay pending that borrows what ends here.
  CrashPoint("reclaim.handed-over");
  status.Update(Commit());
  CrashPoint("reclaim.committed");
  absl::MutexLock lock(&mutex_);
  for (size_t i = 0; i < purges.frames.size(); ++i) {
    purges_.Add(tenants_.Intern(purges.frames[i].tenant), purges.frames[i],
                status.ok() ? purges.places[i] : segment);
  }
  QUARRY_RETURN_IF_ERROR(status);
  for (Moved& one : moved) {
    const LoggedBlock* const now = index_.Find(one.from.tenant, one.from.id);
    // It may have been found broken meanwhile.
    if (!one.whole || now == nullptr || now->born != one.from.born) continue;
    moved_bytes_ += one.from.bytes;
    index_.Move(std::move(one.to));
    CrashPoint("reclaim.indexed");
  }
  for (const auto& [block, why] : dropped) {
    const LoggedBlock* const now = index_.Find(block.tenant, block.id);
    if (now == nullptr || now->born != block.born) continue;  // found broken meanwhile
    if (why == Why::kUnwanted && now->held()) {
      status = absl::CancelledError("a block of it is held since it was looked at");
      continue;
    }
    ++dropped_blocks_;
    dropped_bytes_ += block.bytes;
    index_.Remove(block.tenant, block.id);
  }
  return status;
}

}  // namespace quarry

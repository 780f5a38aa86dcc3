// How the log is looked through: segment by segment, part by part.
#include <algorithm>
#include <utility>

#include <spdlog/spdlog.h>

#include "storage/log/footer.h"
#include "storage/log/read_block.h"
#include "storage/log/segmented_log.h"
#include "storage/slot_size.h"

namespace quarry {

ScrubStep SegmentedLog::ScrubNext() {
  if (!scrub_.parts.empty()) {
    const LoggedBlock part = std::move(scrub_.parts.back());
    scrub_.parts.pop_back();
    return {ScrubPart(part), false};
  }
  if (scrub_.segment < superblock_.segments) {
    scrubbed_segments_ = scrub_.segment + 1;
    return {ScrubSegment(scrub_.segment++), false};
  }
  scrub_.segment = 0;
  ++scrub_passes_;
  return {0, true};
}

std::optional<uint64_t> SegmentedLog::SealedGeneration(uint32_t segment) const {
  absl::MutexLock lock(&mutex_);
  const SegmentInfo& info = segments_.at(segment);
  if (info.state != SegmentState::kSealed) return std::nullopt;
  return info.generation;
}

void SegmentedLog::FoundByScrub(uint32_t segment, uint64_t generation, const std::string& what,
                                const absl::Status& why) {
  if (!absl::IsDataLoss(why)) {
    ++scrub_read_errors_;  // the next pass tries again
    return;
  }
  if (SealedGeneration(segment) != generation) return;  // it was used anew meanwhile
  ++scrub_broken_;
  spdlog::error("{} of segment {} on {} is broken: {}", what, segment, disk_->name(),
                std::string(why.message()));
}

uint64_t SegmentedLog::ScrubSegment(uint32_t segment) {
  const std::optional<uint64_t> generation = SealedGeneration(segment);
  if (!generation.has_value()) return 0;
  const absl::StatusOr<Footer> footer = ReadFooter(disk_.get(), superblock_, segment, *generation);
  if (!footer.ok()) {
    FoundByScrub(segment, *generation, "the footer", footer.status());
    return kSectorBytes;
  }
  uint64_t bytes = 0, entry_bytes = 0;
  for (const FooterEntry& entry : footer->entries) {
    entry_bytes += FooterEntryBytes(entry.tenant);
    if (entry.kind != FrameKind::kPurge) continue;
    const FramePlace place{superblock_.device, segment, *generation, entry.offset};
    const absl::StatusOr<PurgeFrame> purge = ReadPurge(disk_.get(), place, entry);
    bytes += entry.frame_bytes;
    if (!purge.ok()) {
      FoundByScrub(segment, *generation, "a copy of a purge of tenant " + entry.tenant,
                   purge.status());
    }
  }
  for (const LoggedBlock& block : TakeStock(segment, footer->entries)) {
    for (const LoggedPart& part : block.parts) {
      if (part.place.segment != segment) continue;
      LoggedBlock& one = scrub_.parts.emplace_back(block);
      one.parts = {part};
    }
  }
  // The last is taken first.
  std::sort(scrub_.parts.begin(), scrub_.parts.end(),
            [](const LoggedBlock& a, const LoggedBlock& b) {
              return a.parts[0].place.offset > b.parts[0].place.offset;
            });
  bytes += FooterBytes(entry_bytes);
  scrubbed_bytes_ += bytes;
  return bytes;
}

uint64_t SegmentedLog::ScrubPart(const LoggedBlock& part) {
  const uint64_t bytes = part.parts[0].part_bytes;
  if (scrub_.memory.size() < bytes) scrub_.memory = AlignedBuffer(RoundUp(bytes, kSectorBytes));
  const absl::Status read = ReadBlock(source_, part, scrub_.memory.bytes().first(bytes)).status();
  const uint64_t read_bytes = part.parts[0].disk_bytes();
  scrubbed_bytes_ += read_bytes;
  if (read.ok()) return read_bytes;
  if (!absl::IsDataLoss(read)) {
    ++scrub_read_errors_;  // the block stays: the next pass tries again
  } else if (DropBroken(part, read)) {
    ++scrub_broken_;
  }
  return read_bytes;
}

}  // namespace quarry

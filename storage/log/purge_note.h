// What is known of a segment's purges where the segment itself cannot be read: storage/FORMAT.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/disk/disk.h"
#include "storage/log/frames.h"
#include "storage/log/log_layout.h"

namespace quarry {

// For each tenant a bound: purges in the segment mean none of its blocks that were born later. Not
// thread-safe.
class PurgeNote {
 public:
  // Beyond so many a bound is of all tenants.
  static constexpr size_t kMaxTenants = 160;

  void Add(std::string_view tenant, uint64_t bound);
  void Add(const PurgeNote& other);
  // That purges mean none of any tenant's that were born later is all that is known.
  void AddAny(uint64_t bound);
  // A block of the tenant that was born before may have been purged. 0: none was.
  uint64_t BoundOf(std::string_view tenant) const;

  // A frame in one sector; place.offset is the note's own.
  AlignedBuffer Encode(const FramePlace& place, uint64_t sequence) const;

 private:
  friend absl::StatusOr<std::pair<FrameHead, PurgeNote>> DecodeNote(std::span<const std::byte>);
  using TenantDigest = std::pair<uint64_t, uint64_t>;

  void Add(const TenantDigest& tenant, uint64_t bound);

  absl::flat_hash_map<TenantDigest, uint64_t> bounds_;
  uint64_t any_ = 0;
};

absl::StatusOr<std::pair<FrameHead, PurgeNote>> DecodeNote(std::span<const std::byte> frame);

// In both areas; neither is synced.
absl::Status WriteNote(Disk* disk, const Superblock& superblock, uint32_t segment,
                       uint64_t generation, uint64_t sequence, const PurgeNote& note);
constexpr uint64_t kWrittenNoteBytes = LogLayout::kAreas * kSectorBytes;
// Of all segments, as nothing is in them. Not synced.
absl::Status WriteEmptyNotes(Disk* disk, const Superblock& superblock);
// Of the segment's use with this generation; none given: of any. What any area has counts.
// DataLoss: neither has one.
absl::StatusOr<PurgeNote> ReadNote(Disk* disk, const Superblock& superblock, uint32_t segment,
                                   std::optional<uint64_t> generation);

}  // namespace quarry

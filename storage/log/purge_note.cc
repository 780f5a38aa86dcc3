#include "storage/log/purge_note.h"

#include <algorithm>
#include <cstring>
#include <span>

#include "absl/strings/str_cat.h"
#include "proto/byte_digest.h"
#include "proto/status_macros.h"
#include "storage/crash_point.h"
#include "storage/log/frame_codec.h"
#include "storage/log/sectors.h"

namespace quarry {
namespace {

constexpr size_t kBoundBytes = 3 * 8;
static_assert(kFrameHeadBytes + 8 + 4 + PurgeNote::kMaxTenants * kBoundBytes <= kSectorBytes);

}  // namespace

void PurgeNote::Add(const TenantDigest& tenant, uint64_t bound) {
  const auto known = bounds_.find(tenant);
  if (known != bounds_.end()) {
    known->second = std::max(known->second, bound);
  } else if (bounds_.size() < kMaxTenants) {
    bounds_.emplace(tenant, bound);
  } else {
    AddAny(bound);
  }
}

void PurgeNote::Add(std::string_view tenant, uint64_t bound) {
  const ByteDigest digest = DigestOf(std::as_bytes(std::span(tenant)));
  Add(TenantDigest(digest.low, digest.high), bound);
}

void PurgeNote::Add(const PurgeNote& other) {
  for (const auto& [tenant, bound] : other.bounds_) Add(tenant, bound);
  AddAny(other.any_);
}

void PurgeNote::AddAny(uint64_t bound) { any_ = std::max(any_, bound); }

uint64_t PurgeNote::BoundOf(std::string_view tenant) const {
  const ByteDigest digest = DigestOf(std::as_bytes(std::span(tenant)));
  const auto known = bounds_.find(TenantDigest(digest.low, digest.high));
  return known == bounds_.end() ? any_ : std::max(any_, known->second);
}

AlignedBuffer PurgeNote::Encode(const FramePlace& place, uint64_t sequence) const {
  AlignedBuffer frame =
      NewFrame(FrameKind::kNote, place, sequence, 8 + 4 + bounds_.size() * kBoundBytes);
  FrameWriter out(BodyOf(&frame));
  out.Number(any_);
  out.Number(static_cast<uint32_t>(bounds_.size()));
  for (const auto& [tenant, bound] : bounds_) {
    out.Number(tenant.first);
    out.Number(tenant.second);
    out.Number(bound);
  }
  return FinishFrame(std::move(frame));
}

absl::StatusOr<std::pair<FrameHead, PurgeNote>> DecodeNote(std::span<const std::byte> frame) {
  std::pair<FrameHead, PurgeNote> out;
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          CheckedBody(frame, FrameKind::kNote, &out.first));
  FrameReader in(body);
  out.second.any_ = in.Number<uint64_t>();
  const auto tenants = in.Number<uint32_t>();
  if (tenants > PurgeNote::kMaxTenants) return MalformedFrame("note");
  for (uint32_t i = 0; i < tenants; ++i) {
    PurgeNote::TenantDigest tenant;
    tenant.first = in.Number<uint64_t>();
    tenant.second = in.Number<uint64_t>();
    out.second.Add(tenant, in.Number<uint64_t>());
  }
  return out;
}

absl::Status WriteNote(Disk* disk, const Superblock& superblock, uint32_t segment,
                       uint64_t generation, uint64_t sequence, const PurgeNote& note) {
  for (int area = 0; area < LogLayout::kAreas; ++area) {
    const uint64_t offset = superblock.NoteOffset(area, segment);
    const AlignedBuffer frame =
        note.Encode({superblock.device, segment, generation, offset}, sequence);
    const std::span<const std::byte> piece[] = {frame.bytes()};
    QUARRY_RETURN_IF_ERROR(disk->Write(offset, piece));
    CrashPoint("note.copy-written");
  }
  return absl::OkStatus();
}

absl::Status WriteEmptyNotes(Disk* disk, const Superblock& superblock) {
  constexpr uint32_t kAtOnce = 1024;
  for (int area = 0; area < LogLayout::kAreas; ++area) {
    for (uint32_t first = 0; first < superblock.segments; first += kAtOnce) {
      const uint32_t count = std::min(kAtOnce, superblock.segments - first);
      AlignedBuffer notes(count * kSectorBytes);
      for (uint32_t i = 0; i < count; ++i) {
        const AlignedBuffer note = PurgeNote().Encode(
            {superblock.device, first + i, 0, superblock.NoteOffset(area, first + i)}, 0);
        std::memcpy(notes.bytes().data() + i * kSectorBytes, note.bytes().data(), kSectorBytes);
      }
      const std::span<const std::byte> piece[] = {notes.bytes()};
      QUARRY_RETURN_IF_ERROR(disk->Write(superblock.NoteOffset(area, first), piece));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<PurgeNote> ReadNote(Disk* disk, const Superblock& superblock, uint32_t segment,
                                   std::optional<uint64_t> generation) {
  std::optional<PurgeNote> out;
  AlignedBuffer sector(kSectorBytes);
  for (int area = 0; area < LogLayout::kAreas; ++area) {
    const uint64_t offset = superblock.NoteOffset(area, segment);
    if (!ReadSectors(disk, offset, &sector).ok()) continue;
    const auto note = DecodeNote(sector.bytes());
    if (!note.ok()) continue;
    const FramePlace& place = note->first.place;
    const FramePlace here{superblock.device, segment, generation.value_or(place.generation),
                          offset};
    if (place != here) continue;
    if (!out.has_value()) out.emplace();
    out->Add(note->second);
  }
  if (out.has_value()) return *std::move(out);
  return absl::DataLossError(absl::StrCat("no area has a note of segment ", segment));
}

}  // namespace quarry

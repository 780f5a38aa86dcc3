#include "storage/log/frames.h"

#include <utility>

#include "proto/status_macros.h"
#include "storage/log/checksum.h"
#include "storage/log/frame_codec.h"
#include "storage/slot_size.h"

namespace quarry {

// ---- The disk and its segments.

AlignedBuffer EncodeSuperblock(const Superblock& superblock, uint64_t offset) {
  AlignedBuffer frame = NewFrame(FrameKind::kSuperblock, {superblock.device, 0, 0, offset}, 0,
                                 8 + 2 * 4 + superblock.key_check.size());
  FrameWriter out(BodyOf(&frame));
  out.Number(superblock.segment_bytes);
  out.Number(superblock.segments);
  out.Number(superblock.key_slots);
  out.Bytes(superblock.key_check.data(), superblock.key_check.size());
  return FinishFrame(std::move(frame));
}

absl::StatusOr<Superblock> DecodeSuperblock(std::span<const std::byte> frame, uint64_t offset) {
  FrameHead head;
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          CheckedBody(frame, FrameKind::kSuperblock, &head));
  Superblock out;
  FrameReader in(body);
  out.device = head.place.device;
  out.segment_bytes = in.Number<uint64_t>();
  out.segments = in.Number<uint32_t>();
  out.key_slots = in.Number<uint32_t>();
  in.Bytes(out.key_check.data(), out.key_check.size());
  if (head.place.offset != offset || out.segment_bytes % kSectorBytes != 0 ||
      out.segment_bytes < kMinSegmentBytes || out.segment_bytes > kMaxSegmentBytes ||
      out.segments == 0 || out.key_slots > LogLayout::kMostKeySlots) {
    return MalformedFrame("superblock");
  }
  return out;
}

AlignedBuffer EncodeSegmentStart(const FramePlace& place, uint64_t sequence) {
  return FinishFrame(NewFrame(FrameKind::kSegment, place, sequence, 0));
}

absl::StatusOr<FrameHead> DecodeSegmentStart(std::span<const std::byte> frame) {
  FrameHead head;
  QUARRY_RETURN_IF_ERROR(CheckedBody(frame, FrameKind::kSegment, &head).status());
  return head;
}

// ---- Parts of blocks.

namespace {

// Tag, key and salt, three digests, four numbers, two lengths.
constexpr size_t kPartFixedBytes = 3 * 16 + 3 * 32 + 4 * 8 + 2 * 4;
constexpr size_t kPartDigestBytes = 2 * 16;

uint64_t TableBytes(uint64_t part_bytes, Sealing sealing) {
  return RoundUp(part_bytes, kSectorBytes) / kSectorBytes *
         (sealing == Sealing::kSealed ? sizeof(SealTag) : sizeof(uint32_t));
}

}  // namespace

uint64_t PartFrameBytes(std::string_view tenant, const BlockKey& key, uint64_t part_bytes,
                        Sealing sealing) {
  return RoundUp(kFrameHeadBytes + kPartFixedBytes + tenant.size() + kPartDigestBytes +
                     key.full_key.size() + TableBytes(part_bytes, sealing),
                 kSectorBytes);
}

uint64_t AllPartFrameBytes(std::string_view tenant, const BlockKey& key, uint64_t block_bytes,
                           uint64_t least, uint64_t most, Sealing sealing) {
  const uint64_t parts = block_bytes / least + 1;
  const uint64_t of_largest =
      parts * PartFrameBytes(tenant, key, std::min(block_bytes, most), sealing);
  // The tables together have the block's sectors, and each may begin one sector of a frame more.
  const uint64_t of_tables = parts * (PartFrameBytes(tenant, key, 0, sealing) + kSectorBytes) +
                             TableBytes(block_bytes, sealing);
  return std::min(of_largest, of_tables);
}

std::vector<uint32_t> SectorSums(std::span<const std::byte> bytes) {
  static constexpr std::byte kZeros[kSectorBytes] = {};
  std::vector<uint32_t> sums;
  sums.reserve(RoundUp(bytes.size(), kSectorBytes) / kSectorBytes);
  while (!bytes.empty()) {
    const auto sector = bytes.first(std::min<size_t>(kSectorBytes, bytes.size()));
    const uint32_t sum = Crc32c(sector);
    sums.push_back(Crc32c(std::span(kZeros).subspan(sector.size()), sum));
    bytes = bytes.subspan(sector.size());
  }
  return sums;
}

size_t PartSecretOffset(const PartFrame& part) {
  return kFrameHeadBytes + kPartFixedBytes + part.tenant.size();
}
size_t PartSecretBytes(const PartFrame& part) {
  return kPartDigestBytes + part.key.full_key.size();
}

size_t PartTableOffset(const PartFrame& part) {
  return PartSecretOffset(part) + PartSecretBytes(part);
}
size_t PartTableBytes(const PartFrame& part) {
  return TableBytes(part.part_bytes, part.seal.sealed() ? Sealing::kSealed : Sealing::kPlain);
}

bool IsPart(uint64_t part_offset, uint64_t part_bytes, uint64_t block_bytes) {
  return part_bytes > 0 && part_bytes <= kMaxPartBytes && part_offset % kSectorBytes == 0 &&
         part_offset <= block_bytes && part_bytes <= block_bytes - part_offset;
}

absl::Status DecodePartSecret(std::span<const std::byte> secret, PartFrame* part) {
  FrameReader in(secret);
  in.Digest(&part->block_digest);
  in.Digest(&part->digest);
  in.Bytes(part->key.full_key.data(), part->key.full_key.size());
  if (part->part_bytes == part->block_bytes && part->digest != part->block_digest) {
    return MalformedFrame("block part");
  }
  return absl::OkStatus();
}

AlignedBuffer EncodePart(const FramePlace& place, uint64_t sequence, const PartFrame& part) {
  QUARRY_CHECK(part.sums.size() * sizeof(uint32_t) + part.tags.size() * sizeof(SealTag) ==
               PartTableBytes(part));
  AlignedBuffer frame = NewFrame(FrameKind::kPart, place, sequence,
                                 PartTableOffset(part) + PartTableBytes(part) - kFrameHeadBytes);
  FrameWriter out(BodyOf(&frame));
  static_assert(kPartTagOffset == kFrameHeadBytes);
  out.Bytes(part.seal.tag.data(), part.seal.tag.size());
  out.Bytes(part.seal.key.data(), part.seal.key.size());
  out.Bytes(part.seal.salt.data(), part.seal.salt.size());
  out.Digest(part.key.id);
  out.Digest(part.key.parent);
  out.Digest(part.key.name_space);
  out.Number(part.block_bytes);
  out.Number(part.part_offset);
  out.Number(part.part_bytes);
  out.Number(part.born);
  out.Number(static_cast<uint32_t>(part.key.full_key.size()));
  out.Text(part.tenant);
  out.Digest(part.block_digest);
  out.Digest(part.digest);
  out.Bytes(part.key.full_key.data(), part.key.full_key.size());
  for (const uint32_t sum : part.sums) out.Number(sum);
  for (const SealTag& tag : part.tags) out.Bytes(tag.data(), tag.size());
  return FinishFrame(std::move(frame));
}

absl::StatusOr<PartFrame> DecodePart(std::span<const std::byte> frame, const FramePlace& place,
                                     uint64_t sequence) {
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          BodyAt(frame, FrameKind::kPart, place, sequence));
  PartFrame out;
  FrameReader in(body);
  in.Bytes(out.seal.tag.data(), out.seal.tag.size());
  in.Bytes(out.seal.key.data(), out.seal.key.size());
  in.Bytes(out.seal.salt.data(), out.seal.salt.size());
  in.Digest(&out.key.id);
  in.Digest(&out.key.parent);
  in.Digest(&out.key.name_space);
  out.block_bytes = in.Number<uint64_t>();
  out.part_offset = in.Number<uint64_t>();
  out.part_bytes = in.Number<uint64_t>();
  out.born = in.Number<uint64_t>();
  const auto key_bytes = in.Number<uint32_t>();
  out.tenant = in.Text();
  if (!in.ok() || out.tenant.empty() || out.born > sequence ||
      !IsPart(out.part_offset, out.part_bytes, out.block_bytes) || key_bytes > frame.size() ||
      PartTableOffset(out) + key_bytes + PartTableBytes(out) > frame.size()) {
    return MalformedFrame("block part");
  }
  out.key.full_key.resize(key_bytes);
  if (!out.seal.sealed()) {
    QUARRY_RETURN_IF_ERROR(
        DecodePartSecret(frame.subspan(PartSecretOffset(out), PartSecretBytes(out)), &out));
  }
  FrameReader table(frame.subspan(PartTableOffset(out)));
  if (out.seal.sealed()) {
    out.tags.resize(PartTableBytes(out) / sizeof(SealTag));
    for (SealTag& tag : out.tags) table.Bytes(tag.data(), tag.size());
  } else {
    out.sums.resize(PartTableBytes(out) / sizeof(uint32_t));
    for (uint32_t& sum : out.sums) sum = table.Number<uint32_t>();
  }
  return out;
}

// ---- Purges and commits.

AlignedBuffer EncodePurge(const FramePlace& place, uint64_t sequence, const PurgeFrame& purge) {
  QUARRY_CHECK(purge.blocks.size() <= PurgeFrame::kMaxBlocks);
  const size_t bytes = 8 + 3 + 32 + 2 * 4 + purge.tenant.size() + purge.blocks.size() * (32 + 8);
  AlignedBuffer frame = NewFrame(FrameKind::kPurge, place, sequence, bytes);
  FrameWriter out(BodyOf(&frame));
  out.Number(purge.born);
  out.Number(purge.copy);
  out.Number(static_cast<uint8_t>(purge.has_name_space));
  out.Number(static_cast<uint8_t>(purge.destroys_keys));
  out.Digest(purge.name_space);
  out.Text(purge.tenant);
  out.Number(static_cast<uint32_t>(purge.blocks.size()));
  for (const PurgedBlock& block : purge.blocks) {
    out.Digest(block.id);
    out.Number(block.born);
  }
  return FinishFrame(std::move(frame));
}

absl::StatusOr<PurgeFrame> DecodePurge(std::span<const std::byte> frame, const FramePlace& place,
                                       uint64_t sequence) {
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          BodyAt(frame, FrameKind::kPurge, place, sequence));
  PurgeFrame out;
  FrameReader in(body);
  out.born = in.Number<uint64_t>();
  out.copy = in.Number<uint8_t>();
  out.has_name_space = in.Number<uint8_t>() != 0;
  out.destroys_keys = in.Number<uint8_t>() != 0;
  in.Digest(&out.name_space);
  out.tenant = in.Text();
  const auto blocks = in.Number<uint32_t>();
  if (!in.ok() || out.tenant.empty() || out.copy > 1 || blocks > PurgeFrame::kMaxBlocks ||
      out.born > sequence) {
    return MalformedFrame("purge");
  }
  out.blocks.resize(blocks);
  for (PurgedBlock& block : out.blocks) {
    in.Digest(&block.id);
    block.born = in.Number<uint64_t>();
  }
  if (!in.ok()) return MalformedFrame("purge");
  return out;
}

AlignedBuffer EncodeCommit(const FramePlace& place, uint64_t sequence, const CommitFrame& commit) {
  AlignedBuffer frame = NewFrame(FrameKind::kCommit, place, sequence, 12);
  FrameWriter out(BodyOf(&frame));
  out.Number(commit.first);
  out.Number(commit.count);
  return FinishFrame(std::move(frame));
}

absl::StatusOr<CommitFrame> DecodeCommit(std::span<const std::byte> frame, const FramePlace& place,
                                         uint64_t sequence) {
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          BodyAt(frame, FrameKind::kCommit, place, sequence));
  CommitFrame out;
  FrameReader in(body);
  out.first = in.Number<uint64_t>();
  out.count = in.Number<uint32_t>();
  if (!in.ok() || out.first > sequence || out.count > sequence - out.first) {
    return MalformedFrame("commit");
  }
  return out;
}

}  // namespace quarry

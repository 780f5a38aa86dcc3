#include "storage/log/frames.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "proto/check.h"
#include "proto/status_macros.h"
#include "storage/log/checksum.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

static_assert(std::endian::native == std::endian::little, "the log is little-endian");

constexpr size_t kHeadBytes = 64, kCrcOffset = 12;
// In the order of FrameKind.
constexpr std::string_view kMagics[] = {"QRYSUPER", "QRYSEGMT", "QRYBLOCK",
                                        "QRYPURGE", "QRYCOMIT", "QRYFOOTR"};

class Writer {
 public:
  explicit Writer(std::span<std::byte> out) : out_(out) {}

  void Bytes(const void* data, size_t n) {
    QUARRY_CHECK(n <= out_.size() - at_);
    std::memcpy(out_.data() + at_, data, n);
    at_ += n;
  }
  template <typename T>
  void Number(T value) {
    static_assert(std::is_integral_v<T>);
    Bytes(&value, sizeof(value));
  }
  template <typename Tag>
  void Digest(const quarry::Digest<Tag>& digest) {
    Bytes(digest.bytes.data(), digest.bytes.size());
  }
  void Digest(const ByteDigest& digest) {
    Number(digest.low);
    Number(digest.high);
  }
  // The length first, 4 bytes.
  void Text(std::string_view text) {
    Number(static_cast<uint32_t>(text.size()));
    Bytes(text.data(), text.size());
  }
  size_t at() const { return at_; }

 private:
  std::span<std::byte> out_;
  size_t at_ = 0;
};

// Past the end all is zero, and ok() false.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> in) : in_(in) {}

  void Bytes(void* out, size_t n) {
    ok_ &= n <= in_.size() - at_;
    if (!ok_) {
      std::memset(out, 0, n);
      return;
    }
    std::memcpy(out, in_.data() + at_, n);
    at_ += n;
  }
  template <typename T>
  T Number() {
    T value;
    Bytes(&value, sizeof(value));
    return value;
  }
  template <typename Tag>
  void Digest(quarry::Digest<Tag>* digest) {
    Bytes(digest->bytes.data(), digest->bytes.size());
  }
  void Digest(ByteDigest* digest) {
    digest->low = Number<uint64_t>();
    digest->high = Number<uint64_t>();
  }
  std::string Text() {
    const auto n = Number<uint32_t>();
    ok_ &= n <= in_.size() - at_;
    if (!ok_) return {};
    std::string text(n, '\0');
    Bytes(text.data(), n);
    return text;
  }
  bool ok() const { return ok_; }

 private:
  std::span<const std::byte> in_;
  size_t at_ = 0;
  bool ok_ = true;
};

uint32_t CrcOf(std::span<const std::byte> frame) {
  constexpr std::byte kNone[4] = {};
  uint32_t crc = Crc32c(frame.first(kCrcOffset));
  crc = Crc32c(kNone, crc);
  return Crc32c(frame.subspan(kCrcOffset + sizeof(crc)), crc);
}

// A frame with room for a body of so many bytes, and its head.
AlignedBuffer NewFrame(FrameKind kind, const FramePlace& place, uint64_t sequence,
                       size_t body_bytes) {
  AlignedBuffer frame(RoundUp(kHeadBytes + body_bytes, kSectorBytes));
  QUARRY_CHECK(frame.size() <= kMaxFrameBytes);
  Writer out(frame.bytes());
  out.Bytes(kMagics[static_cast<int>(kind)].data(), 8);
  out.Number(kLogVersion);
  out.Number(uint32_t{0});  // the checksum
  out.Number(static_cast<uint32_t>(frame.size()));
  out.Number(place.segment);
  out.Bytes(place.device.data(), place.device.size());
  out.Number(place.generation);
  out.Number(place.offset);
  out.Number(sequence);
  QUARRY_CHECK(out.at() == kHeadBytes);
  return frame;
}
std::span<std::byte> Body(AlignedBuffer* frame) { return frame->bytes().subspan(kHeadBytes); }
AlignedBuffer Finish(AlignedBuffer frame) {
  const uint32_t crc = CrcOf(frame.bytes());
  std::memcpy(frame.bytes().data() + kCrcOffset, &crc, sizeof(crc));
  return frame;
}

// The frame's body, once all that its head says is as it should be.
absl::StatusOr<std::span<const std::byte>> CheckedBody(std::span<const std::byte> frame,
                                                       FrameKind kind, FrameHead* head) {
  if (frame.size() < kSectorBytes) {
    return absl::DataLossError(absl::StrCat("a frame of ", frame.size(), " bytes"));
  }
  QUARRY_ASSIGN_OR_RETURN(*head, PeekFrame(frame.first(kSectorBytes)));
  if (head->kind != kind) {
    return absl::DataLossError(absl::StrCat("a frame of kind ", static_cast<int>(head->kind),
                                            ", not ", static_cast<int>(kind)));
  }
  if (head->bytes != frame.size()) {
    return absl::DataLossError(
        absl::StrCat("a frame of ", head->bytes, " bytes in ", frame.size()));
  }
  uint32_t crc;
  std::memcpy(&crc, frame.data() + kCrcOffset, sizeof(crc));
  if (const uint32_t actual = CrcOf(frame); actual != crc) {
    return absl::DataLossError(
        absl::StrCat("a frame's checksum is ", absl::Hex(actual), ", not ", absl::Hex(crc)));
  }
  if (head->version != kLogVersion) {
    const std::string other =
        absl::StrCat("a frame of version ", head->version, "; this program knows ", kLogVersion);
    // In a log of this version there are none; a disk may have one of another.
    return kind == FrameKind::kSuperblock ? absl::FailedPreconditionError(other)
                                          : absl::DataLossError(other);
  }
  return frame.subspan(kHeadBytes);
}

// The same of a frame that must say that it is here.
absl::StatusOr<std::span<const std::byte>> BodyAt(std::span<const std::byte> frame, FrameKind kind,
                                                  const FramePlace& place, uint64_t sequence) {
  FrameHead head;
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body, CheckedBody(frame, kind, &head));
  if (head.place == place && head.sequence == sequence) return body;
  return absl::DataLossError(absl::StrCat(
      "a frame of segment ", head.place.segment, ", offset ", head.place.offset, ", sequence ",
      head.sequence, " at segment ", place.segment, ", offset ", place.offset, ", sequence ",
      sequence, head.place.generation == place.generation ? "" : ", of another generation",
      head.place.device == place.device ? "" : ", of another device"));
}

absl::Status Malformed(std::string_view what) {
  return absl::DataLossError(absl::StrCat("a malformed ", std::string(what)));
}

}  // namespace

absl::StatusOr<FrameHead> PeekFrame(std::span<const std::byte> sector) {
  QUARRY_CHECK(sector.size() == kSectorBytes);
  const std::string_view magic(reinterpret_cast<const char*>(sector.data()), 8);
  const auto* const found = std::find(std::begin(kMagics), std::end(kMagics), magic);
  if (found == std::end(kMagics)) return absl::DataLossError("no frame begins here");
  FrameHead head;
  head.kind = static_cast<FrameKind>(found - std::begin(kMagics));
  Reader in(sector.subspan(magic.size()));
  head.version = in.Number<uint32_t>();
  in.Number<uint32_t>();  // the checksum
  head.bytes = in.Number<uint32_t>();
  head.place.segment = in.Number<uint32_t>();
  in.Bytes(head.place.device.data(), head.place.device.size());
  head.place.generation = in.Number<uint64_t>();
  head.place.offset = in.Number<uint64_t>();
  head.sequence = in.Number<uint64_t>();
  if (head.bytes == 0 || head.bytes % kSectorBytes != 0 || head.bytes > kMaxFrameBytes) {
    return absl::DataLossError(absl::StrCat("a frame of ", head.bytes, " bytes"));
  }
  return head;
}

// ---- The disk and its segments.

AlignedBuffer EncodeSuperblock(const Superblock& superblock, uint64_t offset) {
  AlignedBuffer frame = NewFrame(FrameKind::kSuperblock, {superblock.device, 0, 0, offset}, 0, 12);
  Writer out(Body(&frame));
  out.Number(superblock.segment_bytes);
  out.Number(superblock.segments);
  return Finish(std::move(frame));
}

absl::StatusOr<Superblock> DecodeSuperblock(std::span<const std::byte> frame, uint64_t offset) {
  FrameHead head;
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          CheckedBody(frame, FrameKind::kSuperblock, &head));
  Superblock out;
  Reader in(body);
  out.device = head.place.device;
  out.segment_bytes = in.Number<uint64_t>();
  out.segments = in.Number<uint32_t>();
  if (head.place.offset != offset || out.segment_bytes % kSectorBytes != 0 ||
      out.segment_bytes < kMinSegmentBytes || out.segment_bytes > kMaxSegmentBytes ||
      out.segments == 0) {
    return Malformed("superblock");
  }
  return out;
}

AlignedBuffer EncodeSegmentStart(const FramePlace& place, uint64_t sequence) {
  return Finish(NewFrame(FrameKind::kSegment, place, sequence, 0));
}

absl::StatusOr<FrameHead> DecodeSegmentStart(std::span<const std::byte> frame) {
  FrameHead head;
  QUARRY_RETURN_IF_ERROR(CheckedBody(frame, FrameKind::kSegment, &head).status());
  return head;
}

// ---- Parts of blocks.

namespace {

constexpr size_t kPartBodyBytes = 3 * 32 + 2 * 16 + 4 * 8 + 2 * 4;

}  // namespace

uint64_t PartFrameBytes(std::string_view tenant, const BlockKey& key) {
  return RoundUp(kHeadBytes + kPartBodyBytes + tenant.size() + key.full_key.size(), kSectorBytes);
}

AlignedBuffer EncodePart(const FramePlace& place, uint64_t sequence, const PartFrame& part) {
  AlignedBuffer frame = NewFrame(FrameKind::kPart, place, sequence,
                                 kPartBodyBytes + part.tenant.size() + part.key.full_key.size());
  Writer out(Body(&frame));
  out.Digest(part.key.id);
  out.Digest(part.key.parent);
  out.Digest(part.key.name_space);
  out.Digest(part.block_digest);
  out.Digest(part.digest);
  out.Number(part.block_bytes);
  out.Number(part.part_offset);
  out.Number(part.part_bytes);
  out.Number(part.born);
  out.Text(part.tenant);
  out.Text(part.key.full_key);
  return Finish(std::move(frame));
}

absl::StatusOr<PartFrame> DecodePart(std::span<const std::byte> frame, const FramePlace& place,
                                     uint64_t sequence) {
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          BodyAt(frame, FrameKind::kPart, place, sequence));
  PartFrame out;
  Reader in(body);
  in.Digest(&out.key.id);
  in.Digest(&out.key.parent);
  in.Digest(&out.key.name_space);
  in.Digest(&out.block_digest);
  in.Digest(&out.digest);
  out.block_bytes = in.Number<uint64_t>();
  out.part_offset = in.Number<uint64_t>();
  out.part_bytes = in.Number<uint64_t>();
  out.born = in.Number<uint64_t>();
  out.tenant = in.Text();
  out.key.full_key = in.Text();
  if (!in.ok() || out.tenant.empty() || out.part_bytes == 0 ||
      out.part_offset % kSectorBytes != 0 || out.part_offset > out.block_bytes ||
      out.part_bytes > out.block_bytes - out.part_offset) {
    return Malformed("block part");
  }
  return out;
}

// ---- Purges and commits.

AlignedBuffer EncodePurge(const FramePlace& place, uint64_t sequence, const PurgeFrame& purge) {
  QUARRY_CHECK(purge.blocks.size() <= PurgeFrame::kMaxBlocks);
  const size_t bytes = 8 + 2 + 32 + 2 * 4 + purge.tenant.size() + purge.blocks.size() * (32 + 8);
  AlignedBuffer frame = NewFrame(FrameKind::kPurge, place, sequence, bytes);
  Writer out(Body(&frame));
  out.Number(purge.born);
  out.Number(purge.copy);
  out.Number(static_cast<uint8_t>(purge.has_name_space));
  out.Digest(purge.name_space);
  out.Text(purge.tenant);
  out.Number(static_cast<uint32_t>(purge.blocks.size()));
  for (const PurgedBlock& block : purge.blocks) {
    out.Digest(block.id);
    out.Number(block.born);
  }
  return Finish(std::move(frame));
}

absl::StatusOr<PurgeFrame> DecodePurge(std::span<const std::byte> frame, const FramePlace& place,
                                       uint64_t sequence) {
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          BodyAt(frame, FrameKind::kPurge, place, sequence));
  PurgeFrame out;
  Reader in(body);
  out.born = in.Number<uint64_t>();
  out.copy = in.Number<uint8_t>();
  out.has_name_space = in.Number<uint8_t>() != 0;
  in.Digest(&out.name_space);
  out.tenant = in.Text();
  const auto blocks = in.Number<uint32_t>();
  if (!in.ok() || out.tenant.empty() || out.copy > 1 || blocks > PurgeFrame::kMaxBlocks) {
    return Malformed("purge");
  }
  out.blocks.resize(blocks);
  for (PurgedBlock& block : out.blocks) {
    in.Digest(&block.id);
    block.born = in.Number<uint64_t>();
  }
  if (!in.ok()) return Malformed("purge");
  return out;
}

AlignedBuffer EncodeCommit(const FramePlace& place, uint64_t sequence, const CommitFrame& commit) {
  AlignedBuffer frame = NewFrame(FrameKind::kCommit, place, sequence, 12);
  Writer out(Body(&frame));
  out.Number(commit.first);
  out.Number(commit.count);
  return Finish(std::move(frame));
}

absl::StatusOr<CommitFrame> DecodeCommit(std::span<const std::byte> frame, const FramePlace& place,
                                         uint64_t sequence) {
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          BodyAt(frame, FrameKind::kCommit, place, sequence));
  CommitFrame out;
  Reader in(body);
  out.first = in.Number<uint64_t>();
  out.count = in.Number<uint32_t>();
  if (!in.ok() || out.first > sequence || out.count > sequence - out.first) {
    return Malformed("commit");
  }
  return out;
}

// ---- Footers.

namespace {

constexpr size_t kEntryBytes = 1 + 6 * 8 + 3 * 32 + 16 + 8 + 4;

}  // namespace

FooterEntry EntryOf(const PartFrame& part) {
  FooterEntry entry;
  entry.kind = FrameKind::kPart;
  entry.born = part.born;
  entry.tenant = part.tenant;
  entry.id = part.key.id;
  entry.parent = part.key.parent;
  entry.name_space = part.key.name_space;
  entry.block_digest = part.block_digest;
  entry.block_bytes = part.block_bytes;
  entry.part_offset = part.part_offset;
  entry.part_bytes = part.part_bytes;
  return entry;
}

FooterEntry EntryOf(const PurgeFrame& purge) {
  FooterEntry entry;
  entry.kind = FrameKind::kPurge;
  entry.born = purge.born;
  entry.part_offset = purge.copy;
  entry.tenant = purge.tenant;
  return entry;
}

uint64_t FooterEntryBytes(std::string_view tenant) { return kEntryBytes + tenant.size(); }
uint64_t FooterBytes(uint64_t entry_bytes) {
  return RoundUp(entry_bytes, kSectorBytes) + kSectorBytes;
}

AlignedBuffer EncodeFooter(const FramePlace& segment_end, uint64_t sequence,
                           std::span<const FooterEntry> entries) {
  uint64_t entry_bytes = 0;
  for (const FooterEntry& entry : entries) entry_bytes += FooterEntryBytes(entry.tenant);
  AlignedBuffer footer(FooterBytes(entry_bytes));
  const std::span<std::byte> list = footer.bytes().first(footer.size() - kSectorBytes);
  Writer out(list);
  for (const FooterEntry& entry : entries) {
    out.Number(static_cast<uint8_t>(entry.kind));
    out.Number(entry.offset);
    out.Number(entry.frame_bytes);
    out.Number(entry.sequence);
    out.Number(entry.born);
    out.Digest(entry.id);
    out.Digest(entry.parent);
    out.Digest(entry.name_space);
    out.Digest(entry.block_digest);
    out.Number(entry.block_bytes);
    out.Number(entry.part_offset);
    out.Number(entry.part_bytes);
    out.Text(entry.tenant);
  }
  FramePlace place = segment_end;
  place.offset -= kSectorBytes;
  AlignedBuffer last = NewFrame(FrameKind::kFooter, place, sequence, 24);
  Writer names(Body(&last));
  names.Number(uint64_t{list.size()});
  names.Number(static_cast<uint32_t>(entries.size()));
  names.Number(Crc32c(list));
  last = Finish(std::move(last));
  std::memcpy(footer.bytes().data() + list.size(), last.bytes().data(), kSectorBytes);
  return footer;
}

absl::StatusOr<FooterPlace> DecodeFooterPlace(std::span<const std::byte> sector) {
  FooterPlace out;
  QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                          CheckedBody(sector, FrameKind::kFooter, &out.head));
  Reader in(body);
  out.entries_bytes = in.Number<uint64_t>();
  out.entries = in.Number<uint32_t>();
  out.crc = in.Number<uint32_t>();
  if (out.entries_bytes % kSectorBytes != 0 || out.entries_bytes > kMaxSegmentBytes ||
      out.entries_bytes > out.head.place.offset) {
    return Malformed("footer");
  }
  out.entries_offset = out.head.place.offset - out.entries_bytes;
  return out;
}

absl::StatusOr<std::vector<FooterEntry>> DecodeFooter(const FooterPlace& place,
                                                      std::span<const std::byte> entries) {
  if (entries.size() != place.entries_bytes || Crc32c(entries) != place.crc) {
    return absl::DataLossError(absl::StrCat("the checksum of the ", place.entries,
                                            " entries of segment ", place.head.place.segment,
                                            " is wrong"));
  }
  std::vector<FooterEntry> out;
  Reader in(entries);
  for (uint32_t i = 0; i < place.entries && in.ok(); ++i) {
    FooterEntry& entry = out.emplace_back();
    entry.kind = static_cast<FrameKind>(in.Number<uint8_t>());
    entry.offset = in.Number<uint64_t>();
    entry.frame_bytes = in.Number<uint64_t>();
    entry.sequence = in.Number<uint64_t>();
    entry.born = in.Number<uint64_t>();
    in.Digest(&entry.id);
    in.Digest(&entry.parent);
    in.Digest(&entry.name_space);
    in.Digest(&entry.block_digest);
    entry.block_bytes = in.Number<uint64_t>();
    entry.part_offset = in.Number<uint64_t>();
    entry.part_bytes = in.Number<uint64_t>();
    entry.tenant = in.Text();
  }
  if (!in.ok()) return Malformed("footer");
  return out;
}

}  // namespace quarry

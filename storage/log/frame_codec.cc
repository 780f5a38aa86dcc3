#include "storage/log/frame_codec.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "storage/log/checksum.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

// Those that follow it do not come round to 0.
constexpr uint64_t kMaxSequence = 1ull << 63;
// In the order of FrameKind.
constexpr std::string_view kMagics[] = {"QRYSUPER", "QRYSEGMT", "QRYBLOCK", "QRYPURGE",
                                        "QRYCOMIT", "QRYFOOTR", "QRYNOTES", "QRYTNKEY"};

uint32_t CrcOf(std::span<const std::byte> frame) {
  constexpr std::byte kNone[kFrameCrcBytes] = {};
  uint32_t crc = Crc32c(frame.first(kFrameCrcOffset));
  crc = Crc32c(kNone, crc);
  return Crc32c(frame.subspan(kFrameCrcOffset + sizeof(crc)), crc);
}

}  // namespace

AlignedBuffer NewFrame(FrameKind kind, const FramePlace& place, uint64_t sequence,
                       size_t body_bytes) {
  AlignedBuffer frame(RoundUp(kFrameHeadBytes + body_bytes, kSectorBytes));
  QUARRY_CHECK(frame.size() <= kMaxFrameBytes);
  FrameWriter out(frame.bytes());
  out.Bytes(kMagics[static_cast<int>(kind)].data(), 8);
  out.Number(kLogVersion);
  out.Number(uint32_t{0});  // the checksum
  out.Number(static_cast<uint32_t>(frame.size()));
  out.Number(place.segment);
  out.Bytes(place.device.data(), place.device.size());
  out.Number(place.generation);
  out.Number(place.offset);
  out.Number(sequence);
  QUARRY_CHECK(out.at() == kFrameHeadBytes);
  return frame;
}

AlignedBuffer FinishFrame(AlignedBuffer frame) {
  const uint32_t crc = CrcOf(frame.bytes());
  std::memcpy(frame.bytes().data() + kFrameCrcOffset, &crc, sizeof(crc));
  return frame;
}

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
  std::memcpy(&crc, frame.data() + kFrameCrcOffset, sizeof(crc));
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
  return frame.subspan(kFrameHeadBytes);
}

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

absl::Status MalformedFrame(std::string_view what) {
  return absl::DataLossError(absl::StrCat("a malformed ", std::string(what)));
}

absl::StatusOr<FrameHead> PeekFrame(std::span<const std::byte> sector) {
  QUARRY_CHECK(sector.size() == kSectorBytes);
  const std::string_view magic(reinterpret_cast<const char*>(sector.data()), 8);
  const auto* const found = std::find(std::begin(kMagics), std::end(kMagics), magic);
  if (found == std::end(kMagics)) return absl::DataLossError("no frame begins here");
  FrameHead head;
  head.kind = static_cast<FrameKind>(found - std::begin(kMagics));
  FrameReader in(sector.subspan(magic.size()));
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
  if (head.sequence > kMaxSequence) {
    return absl::DataLossError(absl::StrCat("a frame of sequence ", head.sequence));
  }
  return head;
}

}  // namespace quarry

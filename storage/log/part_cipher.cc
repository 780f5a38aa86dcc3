#include "storage/log/part_cipher.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "storage/log/frame_codec.h"

namespace quarry {
namespace {

// The message that is the frame's own secret; parts have far fewer sectors.
constexpr uint32_t kSecretMessage = ~0u;

SealNonce NonceOf(uint64_t sequence, uint32_t message) {
  SealNonce nonce;
  static_assert(sizeof(nonce) == sizeof(sequence) + sizeof(message));
  std::memcpy(nonce.data(), &sequence, sizeof(sequence));
  std::memcpy(nonce.data() + sizeof(sequence), &message, sizeof(message));
  return nonce;
}

// What a frame says in the clear, but for its checksum and tag.
struct ClearText {
  std::span<const std::byte> before_checksum, before_tag, before_secret, table;

  ClearText(std::span<const std::byte> frame, const PartFrame& part) {
    constexpr size_t kChecksumEnd = kFrameCrcOffset + kFrameCrcBytes;
    constexpr size_t kTagEnd = kPartTagOffset + sizeof(SealTag);
    before_checksum = frame.first(kFrameCrcOffset);
    before_tag = frame.subspan(kChecksumEnd, kPartTagOffset - kChecksumEnd);
    before_secret = frame.subspan(kTagEnd, PartSecretOffset(part) - kTagEnd);
    table = frame.subspan(PartTableOffset(part), PartTableBytes(part));
  }
};

}  // namespace

Secret PartKey(const Secret& tenant_key, const PartSeal& seal) {
  return tenant_key.Derive("quarry parts", seal.salt);
}

SectorCipher::SectorCipher(const FramePlace& place, uint64_t sequence,
                           std::shared_ptr<const Secret> part_key)
    : part_key_(std::move(part_key)), sequence_(sequence) {
  FrameWriter out(context_);
  out.Bytes(place.device.data(), place.device.size());
  out.Number(place.segment);
  out.Number(place.generation);
  out.Number(place.offset);
}

SealTag SectorCipher::Seal(uint32_t sector, std::span<const std::byte> in, std::byte* out) const {
  return quarry::Seal(*part_key_, NonceOf(sequence_, sector), {context_}, {{in, out}});
}

bool SectorCipher::Open(uint32_t sector, const SealTag& tag, std::span<std::byte> bytes) const {
  return Unseal(*part_key_, NonceOf(sequence_, sector), {context_}, {{bytes, bytes.data()}}, tag);
}

AlignedBuffer EncodeSealedPart(const FramePlace& place, uint64_t sequence,
                               const std::shared_ptr<const Secret>& part_key,
                               std::span<const std::byte> bytes, std::byte* out, PartFrame* part) {
  const SectorCipher cipher(place, sequence, part_key);
  part->tags.clear();
  for (size_t at = 0; at < bytes.size(); at += kSectorBytes) {
    std::span<const std::byte> sector =
        bytes.subspan(at, std::min<size_t>(kSectorBytes, bytes.size() - at));
    if (sector.size() < kSectorBytes) {
      std::memcpy(out + at, sector.data(), sector.size());
      std::memset(out + at + sector.size(), 0, kSectorBytes - sector.size());
      sector = {out + at, kSectorBytes};
    }
    part->tags.push_back(cipher.Seal(static_cast<uint32_t>(part->tags.size()), sector, out + at));
  }
  AlignedBuffer frame = EncodePart(place, sequence, *part);
  const std::span<std::byte> secret =
      frame.bytes().subspan(PartSecretOffset(*part), PartSecretBytes(*part));
  const ClearText clear(frame.bytes(), *part);
  part->seal.tag = Seal(*part_key, NonceOf(sequence, kSecretMessage),
                        {clear.before_checksum, clear.before_tag, clear.before_secret, clear.table},
                        {{secret, secret.data()}});
  std::memcpy(frame.bytes().data() + kPartTagOffset, part->seal.tag.data(), part->seal.tag.size());
  return FinishFrame(std::move(frame));
}

absl::Status OpenSealedFrame(std::span<const std::byte> frame, uint64_t sequence,
                             const Secret& part_key, PartFrame* part) {
  const std::span<const std::byte> sealed =
      frame.subspan(PartSecretOffset(*part), PartSecretBytes(*part));
  std::vector<std::byte> secret(sealed.size());
  const ClearText clear(frame, *part);
  if (!Unseal(part_key, NonceOf(sequence, kSecretMessage),
              {clear.before_checksum, clear.before_tag, clear.before_secret, clear.table},
              {{sealed, secret.data()}}, part->seal.tag)) {
    return absl::DataLossError(absl::StrCat("the frame of bytes [", part->part_offset, ", +",
                                            part->part_bytes, ") of block ", part->key.id.Hex(),
                                            " does not have the tag that was written with it"));
  }
  return DecodePartSecret(secret, part);
}

}  // namespace quarry

#include "storage/log/part_cipher.h"

#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "storage/log/frame_codec.h"

namespace quarry {
namespace {

SealNonce NonceOf(uint64_t sequence) {
  SealNonce nonce{};
  std::memcpy(nonce.data() + nonce.size() - sizeof(sequence), &sequence, sizeof(sequence));
  return nonce;
}

// What a frame says in the clear, but for its checksum and tag.
struct ClearText {
  std::span<const std::byte> before_checksum, before_tag, before_secret;

  ClearText(std::span<const std::byte> frame, const PartFrame& part) {
    constexpr size_t kChecksumEnd = kFrameCrcOffset + kFrameCrcBytes;
    constexpr size_t kTagEnd = kPartTagOffset + sizeof(SealTag);
    before_checksum = frame.first(kFrameCrcOffset);
    before_tag = frame.subspan(kChecksumEnd, kPartTagOffset - kChecksumEnd);
    before_secret = frame.subspan(kTagEnd, PartSecretOffset(part) - kTagEnd);
  }
};

}  // namespace

Secret PartKey(const Secret& tenant_key, const PartSeal& seal) {
  return tenant_key.Derive("quarry parts", seal.salt);
}

AlignedBuffer EncodeSealedPart(const FramePlace& place, uint64_t sequence, const Secret& part_key,
                               std::span<const std::byte> bytes, std::byte* out, PartFrame* part) {
  AlignedBuffer frame = EncodePart(place, sequence, *part);
  const std::span<std::byte> secret =
      frame.bytes().subspan(PartSecretOffset(*part), PartSecretBytes(*part));
  const ClearText clear(frame.bytes(), *part);
  part->seal.tag = Seal(part_key, NonceOf(sequence),
                        {clear.before_checksum, clear.before_tag, clear.before_secret},
                        {{secret, secret.data()}, {bytes, out}});
  std::memcpy(frame.bytes().data() + kPartTagOffset, part->seal.tag.data(), part->seal.tag.size());
  return FinishFrame(std::move(frame));
}

absl::Status OpenSealedPart(std::span<const std::byte> frame, uint64_t sequence,
                            const Secret& part_key, std::span<std::byte> bytes, PartFrame* part) {
  const std::span<const std::byte> sealed =
      frame.subspan(PartSecretOffset(*part), PartSecretBytes(*part));
  std::vector<std::byte> secret(sealed.size());
  const ClearText clear(frame, *part);
  if (!Unseal(part_key, NonceOf(sequence),
              {clear.before_checksum, clear.before_tag, clear.before_secret},
              {{sealed, secret.data()}, {bytes, bytes.data()}}, part->seal.tag)) {
    return absl::DataLossError(absl::StrCat("bytes [", part->part_offset, ", +", bytes.size(),
                                            ") of block ", part->key.id.Hex(),
                                            " do not have the tag that was written with them"));
  }
  return DecodePartSecret(secret, part);
}

}  // namespace quarry

// How a part of a block is encrypted: storage/FORMAT.md, "Encryption".
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/log/frames.h"
#include "storage/log/sealing.h"
#include "storage/log/secret.h"

namespace quarry {

// Of what one start writes with a tenant's key, or reads of what another one wrote.
Secret PartKey(const Secret& tenant_key, const PartSeal& seal);

// The sectors of one part, each a message of its own.
class SectorCipher {
 public:
  // Of the part whose frame is here.
  SectorCipher(const FramePlace& place, uint64_t sequence, std::shared_ptr<const Secret> part_key);

  // A whole sector, the `sector`th of the part, into as many bytes at `out`. At most once each.
  SealTag Seal(uint32_t sector, std::span<const std::byte> in, std::byte* out) const;
  // In place. False: it is not what was sealed as this sector; its bytes are to be used by nobody.
  bool Open(uint32_t sector, const SealTag& tag, std::span<std::byte> bytes) const;

 private:
  const std::shared_ptr<const Secret> part_key_;
  const uint64_t sequence_;
  std::array<std::byte, sizeof(DeviceId) + 4 + 8 + 8> context_{};  // where the frame is
};

// The frame of a part, and its bytes encrypted to `out`, in whole sectors. part->seal says with
// which key; its tag and the table of tags are set here. A frame is sealed at most once with one
// sequence.
AlignedBuffer EncodeSealedPart(const FramePlace& place, uint64_t sequence,
                               const std::shared_ptr<const Secret>& part_key,
                               std::span<const std::byte> bytes, std::byte* out, PartFrame* part);
// Decrypts what the decoded frame lacks. Then what it says is right, the table of tags too.
// DataLoss: it is not what was sealed.
absl::Status OpenSealedFrame(std::span<const std::byte> frame, uint64_t sequence,
                             const Secret& part_key, PartFrame* part);

}  // namespace quarry

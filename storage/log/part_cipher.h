// How a part of a block is encrypted: storage/FORMAT.md, "Encryption".
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/log/frames.h"
#include "storage/log/secret.h"

namespace quarry {

// Of what one start writes with a tenant's key, or reads of what another one wrote.
Secret PartKey(const Secret& tenant_key, const PartSeal& seal);

// The frame of a part, and its bytes encrypted to `out`. part->seal says with which key; its tag is
// set here. A frame is sealed at most once with one sequence.
AlignedBuffer EncodeSealedPart(const FramePlace& place, uint64_t sequence, const Secret& part_key,
                               std::span<const std::byte> bytes, std::byte* out, PartFrame* part);
// Decrypts the bytes in place, and what the decoded frame lacks. DataLoss: any of both is not what
// was sealed.
absl::Status OpenSealedPart(std::span<const std::byte> frame, uint64_t sequence,
                            const Secret& part_key, std::span<std::byte> bytes, PartFrame* part);

}  // namespace quarry

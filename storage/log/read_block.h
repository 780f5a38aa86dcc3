// Reading blocks, and checking that they are what the index says.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "storage/disk/disk.h"
#include "storage/log/frames.h"
#include "storage/log/log_index.h"
#include "storage/log/part_cipher.h"
#include "storage/log/tenant_keys.h"

namespace quarry {

// What a block was written with.
struct WrittenAs {
  BlockKey key;
  ByteDigest digest;
};

struct BlockSource {
  Disk* disk = nullptr;
  uint64_t group_bytes = 0;
  const TenantKeys* keys = nullptr;  // of a log that is encrypted
};

// A part of which any sector can be checked by itself.
struct PartSectors {
  LoggedPart part;
  std::vector<uint32_t> sums;
  std::vector<SealTag> tags;
  std::shared_ptr<const SectorCipher> cipher;  // null: it is not encrypted, and has sums

  // Decrypts the sectors from the `first`th of the part on, where they are encrypted, and checks
  // them. DataLoss.
  absl::Status Open(uint64_t first, std::span<std::byte> sectors) const;
};

// What a block's frames say of it.
struct BlockSectors {
  WrittenAs written;
  std::vector<PartSectors> parts;  // as the block's
};

// Reads frames only, all at once. DataLoss, Unavailable.
absl::StatusOr<BlockSectors> ReadFrames(const BlockSource& source, const LoggedBlock& block);

// The whole block into `out`, every part decrypted and checked; or, of one that is given with some
// of its parts, which follow one another, these. DataLoss, Unavailable. Large ones
// are read group by group of so many bytes, each while the one before is decrypted and checked.
absl::StatusOr<WrittenAs> ReadBlock(const BlockSource& source, const LoggedBlock& block,
                                    std::span<std::byte> out);

// Of a log's reads and writes that go on beside digests.
inline uint64_t GroupBytes(const Superblock& superblock) {
  return std::min<uint64_t>(8ull << 20, superblock.segment_bytes / 8);
}

}  // namespace quarry

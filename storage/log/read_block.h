// Reading blocks, and checking that they are what the index says.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "storage/disk/disk.h"
#include "storage/log/frames.h"
#include "storage/log/log_index.h"
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

// The frame of a part, checked against where it is and what the index has of it. DataLoss.
absl::StatusOr<PartFrame> CheckedPart(std::span<const std::byte> frame, const LoggedBlock& block,
                                      const LoggedPart& part);

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

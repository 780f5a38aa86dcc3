// Reading blocks, and checking that they are what the index says.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "storage/disk/disk.h"
#include "storage/log/frames.h"
#include "storage/log/log_index.h"

namespace quarry {

// The whole block into `out`, every part checked. Returns the key that it was written with.
// DataLoss, Unavailable. Large ones are read group by group of so many bytes, each while the one
// before is checked.
absl::StatusOr<BlockKey> ReadBlock(Disk* disk, uint64_t group_bytes, const LoggedBlock& block,
                                   std::span<std::byte> out);

// Of a log's reads and writes that go on beside digests.
inline uint64_t GroupBytes(const Superblock& superblock) {
  return std::min<uint64_t>(8ull << 20, superblock.segment_bytes / 8);
}

}  // namespace quarry

// Reading blocks, and checking that they are what the index says.
#pragma once

#include <span>

#include "absl/status/statusor.h"
#include "storage/disk/disk.h"
#include "storage/log/frames.h"
#include "storage/log/log_index.h"

namespace quarry {

// The whole block into `out`, every part checked. Returns the key that it was written with.
// DataLoss, Unavailable.
absl::StatusOr<BlockKey> ReadBlock(Disk* disk, const LoggedBlock& block, std::span<std::byte> out);

}  // namespace quarry

// Reading what the log says of itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/disk/disk.h"

namespace quarry {

// Tries again where a read fails, for what fails now and then would cost a segment.
absl::Status ReadSectors(Disk* disk, uint64_t offset, AlignedBuffer* out);
// All that can be read, each sector by itself where need be. Those that cannot are zeros, and
// false.
std::vector<bool> ReadEachSector(Disk* disk, uint64_t offset, AlignedBuffer* out);
// Nothing but zeros.
bool IsBlank(std::span<const std::byte> bytes);

}  // namespace quarry

// Reading what the log says of itself.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/disk/disk.h"

namespace quarry {

// Tries again where a read fails, for what fails now and then would cost a segment.
absl::Status ReadSectors(Disk* disk, uint64_t offset, AlignedBuffer* out);

}  // namespace quarry

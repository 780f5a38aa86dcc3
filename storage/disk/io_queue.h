// How a disk's reads and writes are handed to the system.
#pragma once

#include <span>

#include "absl/status/status.h"
#include "storage/disk/disk_io.h"

namespace quarry {

// Thread-safe.
class IoQueue {
 public:
  virtual ~IoQueue() = default;

  // Runs all of one call, several at a time, and returns when none is in flight any more. After a
  // first failure, which is the answer, no further one is begun. `ios` are used up.
  virtual absl::Status Run(IoDirection direction, std::span<DiskIo> ios) = 0;
};

}  // namespace quarry

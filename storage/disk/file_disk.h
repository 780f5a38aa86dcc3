// A disk in a file or on a block device.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "storage/disk/disk.h"

namespace quarry {

struct FileDiskOptions {
  // A block device, or a regular file, which is created where there is none.
  std::string path;
  // A multiple of kSectorBytes. 0 is all of a block device. A file is preallocated: a shorter one
  // grows, a longer one keeps its length and is used up to here.
  uint64_t bytes = 0;
  // kAuto: threads where io_uring is not allowed.
  enum class Io { kAuto, kUring, kThreads } io = Io::kAuto;
  uint32_t queue_depth = 8;        // I/Os in flight, of each call; 1 to 1024
  uint64_t io_bytes = 1ull << 20;  // of one I/O at most; a multiple of kSectorBytes, to 1 GiB
};

// Holds an exclusive flock of it, so that it is nobody else's, and goes around the page cache where
// the file system lets it. Discard is for block devices; a file keeps its room.
// NotFound: no such directory. PermissionDenied. InvalidArgument: the options, or more than the
// device or any file of its system has. FailedPrecondition: in use by another for the 250 ms that
// are left to a killed one, a device that is mounted, or kUring where io_uring is not allowed.
// ResourceExhausted: no room to preallocate, and then a file that was not there is not there again,
// or no descriptor or memory. Else Unavailable.
absl::StatusOr<std::unique_ptr<Disk>> OpenFileDisk(const FileDiskOptions& options);

}  // namespace quarry

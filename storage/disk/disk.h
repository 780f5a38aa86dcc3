// The seam to a disk: one flat range of bytes, read and written in whole sectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/status/status.h"

namespace quarry {

// What offsets, lengths and the addresses of buffers are multiples of.
inline constexpr uint64_t kSectorBytes = 4096;

using ReadPieces = std::span<const std::span<std::byte>>;
using WritePieces = std::span<const std::span<const std::byte>>;
// One stretch of the disk from `offset` on, into the pieces in their order.
struct DiskRead {
  uint64_t offset = 0;
  ReadPieces out;
};

// Thread-safe; calls block. A call that returns OK has done all that it was asked; any other may
// have done any part of it, in any order. Errors name the operation, the bytes, the offset and the
// disk: ResourceExhausted where the file system or a quota is full, Unavailable for all else that
// the disk says, InvalidArgument for what is not in whole sectors or passes the end.
class Disk {
 public:
  virtual ~Disk() = default;

  virtual uint64_t bytes() const = 0;
  // For messages.
  virtual const std::string& name() const = 0;

  // One stretch of the disk from `offset` on, into or from the pieces in their order. Pieces are in
  // whole sectors each, at addresses that are multiples of kSectorBytes.
  virtual absl::Status Read(uint64_t offset, ReadPieces out) = 0;
  // As Read, each of them, in any order; as many at once as the disk's queue is deep. A disk
  // without a queue reads one after the other.
  virtual absl::Status ReadMany(std::span<const DiskRead> reads) {
    for (const DiskRead& read : reads) {
      if (absl::Status status = Read(read.offset, read.out); !status.ok()) return status;
    }
    return absl::OkStatus();
  }
  // Reads see it at once. It survives a crash from when a Sync that began afterwards has succeeded;
  // until then any of its sectors may.
  virtual absl::Status Write(uint64_t offset, WritePieces pieces) = 0;
  // Once it has failed, nothing that was written before it is known to be there, and trying again
  // would not tell: file systems forget the error with the pages.
  virtual absl::Status Sync() = 0;
  // The bytes are wanted no more: they read as anything from now on. A disk that cannot forget says
  // Unimplemented, and nothing is lost by that.
  virtual absl::Status Discard(uint64_t offset, uint64_t bytes) = 0;
};

}  // namespace quarry

// The reads and writes that one call of a disk is cut into.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace quarry {

enum class IoDirection { kRead, kWrite };

// What is left of one read or write: one stretch of the disk and the memory of its bytes.
struct DiskIo {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  std::span<iovec> pieces;  // of `bytes` in all, IOV_MAX at most
};

// All of one call, in the order of the disk.
struct DiskIoList {
  std::vector<iovec> pieces;  // the ios' memory: not touched while they are in use
  std::vector<DiskIo> ios;
};

// Pieces and io_bytes are in whole sectors; so is each I/O, of io_bytes at most.
DiskIoList CutIntoIos(uint64_t offset, std::span<const iovec> pieces, uint64_t io_bytes);

// Takes from `io` what the system has done of it: `result` is a number of bytes or a negative
// errno. OK with bytes left means that it is to be issued again.
absl::Status TakeResult(const std::string& disk, IoDirection direction, int64_t result, DiskIo* io);

// "disk PATH: read of N bytes at offset M", for messages.
std::string DescribeIo(const std::string& disk, IoDirection direction, uint64_t bytes,
                       uint64_t offset);

}  // namespace quarry

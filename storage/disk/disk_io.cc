#include "storage/disk/disk_io.h"

#include <limits.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/str_cat.h"
#include "storage/disk/disk.h"
#include "storage/disk/disk_error.h"

namespace quarry {
namespace {

void Advance(uint64_t bytes, DiskIo* io) {
  io->offset += bytes;
  io->bytes -= bytes;
  while (bytes > 0) {
    iovec& piece = io->pieces.front();
    const uint64_t taken = std::min<uint64_t>(bytes, piece.iov_len);
    piece.iov_base = static_cast<std::byte*>(piece.iov_base) + taken;
    piece.iov_len -= taken;
    bytes -= taken;
    if (piece.iov_len == 0) io->pieces = io->pieces.subspan(1);
  }
}

}  // namespace

DiskIoList CutIntoIos(uint64_t offset, std::span<const iovec> pieces, uint64_t io_bytes) {
  uint64_t bytes = 0;
  for (const iovec& piece : pieces) bytes += piece.iov_len;
  DiskIoList list;
  list.pieces.reserve(pieces.size() + bytes / io_bytes);  // never moved: the ios point into it
  DiskIo io{.offset = offset};
  size_t first = 0;
  const auto finish = [&] {
    io.pieces = std::span(list.pieces).subspan(first);
    list.ios.push_back(io);
    first = list.pieces.size();
    io = {.offset = io.offset + io.bytes};
  };
  for (iovec piece : pieces) {
    while (piece.iov_len > 0) {
      const uint64_t taken = std::min<uint64_t>(piece.iov_len, io_bytes - io.bytes);
      list.pieces.push_back({.iov_base = piece.iov_base, .iov_len = taken});
      piece.iov_base = static_cast<std::byte*>(piece.iov_base) + taken;
      piece.iov_len -= taken;
      io.bytes += taken;
      if (io.bytes == io_bytes || list.pieces.size() - first == IOV_MAX) finish();
    }
  }
  if (io.bytes > 0) finish();
  return list;
}

absl::Status TakeResult(const std::string& disk, IoDirection direction, int64_t result,
                        DiskIo* io) {
  if (result == -EINTR || result == -EAGAIN) return absl::OkStatus();
  // In whole sectors, so that what is left is too.
  const int64_t done = result - result % static_cast<int64_t>(kSectorBytes);
  if (done > 0) {
    Advance(static_cast<uint64_t>(done), io);
    return absl::OkStatus();
  }
  const std::string what = DescribeIo(disk, direction, io->bytes, io->offset);
  if (result < 0) return DiskError(DiskCall::kTransfer, static_cast<int>(-result), what);
  return absl::UnavailableError(absl::StrCat(
      what, direction == IoDirection::kRead ? ": the disk ends there" : ": nothing was written"));
}

std::string DescribeIo(const std::string& disk, IoDirection direction, uint64_t bytes,
                       uint64_t offset) {
  return absl::StrCat("disk ", disk, direction == IoDirection::kRead ? ": read" : ": write", " of ",
                      bytes, " bytes at offset ", offset);
}

}  // namespace quarry

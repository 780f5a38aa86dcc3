#include "storage/disk/file_disk.h"

#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <utility>
#include <vector>

#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "storage/disk/disk_error.h"
#include "storage/disk/disk_file.h"
#include "storage/disk/disk_io.h"
#include "storage/disk/thread_queue.h"
#include "storage/disk/uring_queue.h"

namespace quarry {
namespace {

constexpr uint32_t kMaxQueueDepth = 1024;
constexpr uint64_t kMaxIoBytes = 1ull << 30;

absl::Status Validate(const FileDiskOptions& options) {
  if (options.queue_depth == 0 || options.queue_depth > kMaxQueueDepth) {
    return absl::InvalidArgumentError(absl::StrCat("disk ", options.path, ": queue_depth is ",
                                                   options.queue_depth, "; 1 to ", kMaxQueueDepth,
                                                   " are allowed"));
  }
  if (options.io_bytes == 0 || options.io_bytes > kMaxIoBytes ||
      options.io_bytes % kSectorBytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("disk ", options.path, ": io_bytes is ", options.io_bytes, "; multiples of ",
                     kSectorBytes, " to ", kMaxIoBytes, " are allowed"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<IoQueue>> MakeQueue(const FileDiskOptions& options,
                                                   const DiskFile& file) {
  if (options.io != FileDiskOptions::Io::kThreads) {
    auto rings = UringQueue::Create(file, options.queue_depth);
    if (rings.ok()) return *std::move(rings);
    if (options.io == FileDiskOptions::Io::kUring) return rings.status();
    spdlog::info("{}: threads instead", std::string(rings.status().message()));
  }
  return std::make_unique<ThreadQueue>(file, options.queue_depth);
}

class FileDisk : public Disk {
 public:
  FileDisk(std::unique_ptr<DiskFile> file, std::unique_ptr<IoQueue> queue, uint64_t io_bytes)
      : io_bytes_(io_bytes), file_(std::move(file)), queue_(std::move(queue)) {}

  uint64_t bytes() const override { return file_->bytes(); }
  const std::string& name() const override { return file_->path(); }

  absl::Status Read(uint64_t offset, ReadPieces out) override {
    return Transfer(IoDirection::kRead, offset, out);
  }
  absl::Status ReadMany(std::span<const DiskRead> reads) override;
  absl::Status Write(uint64_t offset, WritePieces pieces) override {
    return Transfer(IoDirection::kWrite, offset, pieces);
  }
  absl::Status Sync() override;
  absl::Status Discard(uint64_t offset, uint64_t bytes) override;

 private:
  // InvalidArgument: as Disk says.
  template <typename Pieces>
  absl::StatusOr<DiskIoList> Cut(IoDirection direction, uint64_t offset, Pieces pieces) const;
  template <typename Pieces>
  absl::Status Transfer(IoDirection direction, uint64_t offset, Pieces pieces);
  absl::Status CheckRange(const std::string& what, uint64_t offset, uint64_t bytes) const;

  const uint64_t io_bytes_;
  const std::unique_ptr<DiskFile> file_;
  const std::unique_ptr<IoQueue> queue_;  // last: it uses the file
};

absl::Status FileDisk::CheckRange(const std::string& what, uint64_t offset, uint64_t bytes) const {
  if (offset % kSectorBytes != 0 || bytes % kSectorBytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": not in whole sectors of ", kSectorBytes, " bytes"));
  }
  if (offset > file_->bytes() || bytes > file_->bytes() - offset) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": the disk has ", file_->bytes(), " bytes"));
  }
  return absl::OkStatus();
}

template <typename Pieces>
absl::StatusOr<DiskIoList> FileDisk::Cut(IoDirection direction, uint64_t offset,
                                         Pieces pieces) const {
  uint64_t bytes = 0;
  for (const auto& piece : pieces) bytes += piece.size();
  const std::string what = DescribeIo(name(), direction, bytes, offset);
  QUARRY_RETURN_IF_ERROR(CheckRange(what, offset, bytes));
  std::vector<iovec> memory;
  memory.reserve(pieces.size());
  for (const auto& piece : pieces) {
    const auto address = reinterpret_cast<uintptr_t>(piece.data());
    if (address % kSectorBytes != 0 || piece.size() % kSectorBytes != 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          what, ": piece ", memory.size(), " has ", piece.size(), " bytes at address 0x",
          absl::Hex(address), ", not in whole sectors of ", kSectorBytes, " bytes"));
    }
    memory.push_back({.iov_base = const_cast<std::byte*>(piece.data()), .iov_len = piece.size()});
  }
  return CutIntoIos(offset, memory, io_bytes_);
}

template <typename Pieces>
absl::Status FileDisk::Transfer(IoDirection direction, uint64_t offset, Pieces pieces) {
  QUARRY_ASSIGN_OR_RETURN(DiskIoList list, Cut(direction, offset, pieces));
  return queue_->Run(direction, list.ios);
}

absl::Status FileDisk::ReadMany(std::span<const DiskRead> reads) {
  std::vector<DiskIoList> lists;  // whose memory the ios point into
  std::vector<DiskIo> ios;
  lists.reserve(reads.size());
  for (const DiskRead& read : reads) {
    QUARRY_ASSIGN_OR_RETURN(DiskIoList list, Cut(IoDirection::kRead, read.offset, read.out));
    ios.insert(ios.end(), list.ios.begin(), list.ios.end());
    lists.push_back(std::move(list));
  }
  return queue_->Run(IoDirection::kRead, ios);
}

absl::Status FileDisk::Sync() {
  while (fdatasync(file_->fd()) != 0) {
    const int error = errno;
    if (error == EINTR) continue;
    // Also of a full file system: what was written is not known to be there.
    return absl::UnavailableError(
        DiskError(DiskCall::kTransfer, error, absl::StrCat("disk ", name(), ": sync")).message());
  }
  return absl::OkStatus();
}

absl::Status FileDisk::Discard(uint64_t offset, uint64_t bytes) {
  const std::string what =
      absl::StrCat("disk ", name(), ": discard of ", bytes, " bytes at offset ", offset);
  QUARRY_RETURN_IF_ERROR(CheckRange(what, offset, bytes));
  if (!file_->is_device()) {
    return absl::UnimplementedError(absl::StrCat(what, ": a file keeps its room"));
  }
  if (bytes == 0) return absl::OkStatus();
  uint64_t range[2] = {offset, bytes};
  if (ioctl(file_->fd(), BLKDISCARD, range) == 0) return absl::OkStatus();
  const int error = errno;
  const absl::Status status = DiskError(DiskCall::kTransfer, error, what);
  return error == EOPNOTSUPP ? absl::UnimplementedError(status.message()) : status;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Disk>> OpenFileDisk(const FileDiskOptions& options) {
  QUARRY_RETURN_IF_ERROR(Validate(options));
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<DiskFile> file,
                          DiskFile::Open(options.path, options.bytes));
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<IoQueue> queue, MakeQueue(options, *file));
  return std::make_unique<FileDisk>(std::move(file), std::move(queue), options.io_bytes);
}

}  // namespace quarry

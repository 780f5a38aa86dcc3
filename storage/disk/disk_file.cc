#include "storage/disk/disk_file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/status_macros.h"
#include "storage/crash_point.h"
#include "storage/disk/disk.h"
#include "storage/disk/disk_error.h"

namespace quarry {
namespace {

constexpr uint64_t kStatBlockBytes = 512;  // the unit of st_blocks, whatever the file system's is
// What a killed process had in flight keeps its lock until it is done, a little beyond its end:
// until then its writes could still come over ours. Who restarts it at once is not refused.
constexpr absl::Duration kKilledHolderWait = absl::Milliseconds(250);

}  // namespace

absl::StatusOr<std::unique_ptr<DiskFile>> DiskFile::Open(const std::string& path, uint64_t bytes) {
  if (bytes % kSectorBytes != 0) {
    return absl::InvalidArgumentError(absl::StrCat("disk ", path, ": bytes is ", bytes,
                                                   "; a multiple of ", kSectorBytes, " is needed"));
  }
  std::unique_ptr<DiskFile> file(new DiskFile(path));
  QUARRY_RETURN_IF_ERROR(file->Acquire(bytes));
  file->BypassPageCache();
  if (file->created_) CrashPoint("disk.created");
  absl::Status sized = file->Size(bytes);
  if (!sized.ok()) {
    if (file->created_) unlink(path.c_str());
    return sized;
  }
  return file;
}

DiskFile::~DiskFile() { Release(); }

// The lock goes with the last that refers to the open file, and a ring may a little longer: nothing
// is in flight any more, so it is given up at once.
void DiskFile::Release() {
  if (fd_ < 0) return;
  flock(fd_, LOCK_UN);
  close(fd_);
  fd_ = -1;
}

absl::Status DiskFile::Error(int error, std::string_view call) const {
  return DiskError(DiskCall::kOpening, error,
                   absl::StrCat("disk ", path_, ": ", std::string(call)));
}

absl::Status DiskFile::Acquire(uint64_t bytes) {
  const absl::Time deadline = absl::Now() + kKilledHolderWait;
  for (;;) {
    absl::Status status = OpenDescriptor(bytes);
    if (status.ok()) status = Lock();
    if (!absl::IsFailedPrecondition(status) || absl::Now() >= deadline) return status;
    Release();
    absl::SleepFor(absl::Milliseconds(5));
  }
}

absl::Status DiskFile::OpenDescriptor(uint64_t bytes) {
  struct stat found {};
  const bool exists = stat(path_.c_str(), &found) == 0;
  is_device_ = exists && S_ISBLK(found.st_mode);
  if (exists && !is_device_ && !S_ISREG(found.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat("disk ", path_, ": neither a regular file nor a block device"));
  }
  if (!is_device_ && bytes == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("disk ", path_, ": bytes is 0; only a block device has a size of its own"));
  }
  // O_EXCL keeps us off a device that is mounted.
  const int flags = O_RDWR | O_CLOEXEC;
  if (is_device_) {
    fd_ = open(path_.c_str(), flags | O_EXCL);
  } else {
    fd_ = open(path_.c_str(), flags | O_CREAT | O_EXCL, 0600);
    created_ = fd_ >= 0;
    if (fd_ < 0 && errno == EEXIST) fd_ = open(path_.c_str(), flags);
  }
  return fd_ >= 0 ? absl::OkStatus() : Error(errno, "open");
}

absl::Status DiskFile::Lock() {
  if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    if (error == EWOULDBLOCK) {
      return absl::FailedPreconditionError(
          absl::StrCat("disk ", path_, " is in use by another process"));
    }
    if (created_) unlink(path_.c_str());
    return Error(error, "flock");
  }
  struct stat locked {};
  if (fstat(fd_, &locked) != 0) return Error(errno, "fstat");
  if (locked.st_nlink > 0) return absl::OkStatus();
  // Its creator could not fill it and took it away between our open and our lock.
  return absl::FailedPreconditionError(
      absl::StrCat("disk ", path_, " was removed while it was opened"));
}

// Set here and not by open(), which where it is refused would leave a file behind.
void DiskFile::BypassPageCache() {
  const int flags = fcntl(fd_, F_GETFL);
  if (flags >= 0 && fcntl(fd_, F_SETFL, flags | O_DIRECT) == 0) return;
  spdlog::warn("disk {}: O_DIRECT is refused; reads and writes go through the page cache", path_);
}

absl::Status DiskFile::Size(uint64_t bytes) {
  return is_device_ ? SizeDevice(bytes) : SizeFile(bytes);
}

absl::Status DiskFile::SizeDevice(uint64_t bytes) {
  uint64_t device_bytes = 0;
  if (ioctl(fd_, BLKGETSIZE64, &device_bytes) != 0) return Error(errno, "BLKGETSIZE64");
  if (bytes > device_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("disk ", path_, ": ", bytes, " bytes wanted of a device of ", device_bytes));
  }
  bytes_ = bytes > 0 ? bytes : device_bytes / kSectorBytes * kSectorBytes;
  return absl::OkStatus();
}

absl::Status DiskFile::SizeFile(uint64_t bytes) {
  struct stat found {};
  if (fstat(fd_, &found) != 0) return Error(errno, "fstat");
  const uint64_t found_bytes = static_cast<uint64_t>(found.st_size);
  const uint64_t room_bytes = static_cast<uint64_t>(found.st_blocks) * kStatBlockBytes;
  // A file without holes is left alone: some file systems would want its room twice.
  if (room_bytes < std::max(found_bytes, bytes) || found_bytes < bytes) {
    absl::Status status = Preallocate(bytes, bytes - std::min(room_bytes, bytes));
    if (!status.ok()) {
      if (found_bytes < bytes && ftruncate(fd_, found.st_size) != 0) {
        spdlog::warn("disk {}: it could not be shrunk back to {} bytes", path_, found_bytes);
      }
      return status;
    }
    CrashPoint("disk.preallocated");
    if (fsync(fd_) != 0) return Error(errno, "fsync");
    CrashPoint("disk.synced");
  }
  bytes_ = bytes;
  return created_ ? SyncDirectory() : absl::OkStatus();
}

absl::Status DiskFile::Preallocate(uint64_t bytes, uint64_t missing_bytes) {
  // Asked first, since fallocate() takes the last block from everybody else before it fails.
  struct statvfs system {};
  if (fstatvfs(fd_, &system) == 0 && system.f_blocks > 0) {
    const uint64_t free_bytes = uint64_t{system.f_bavail} * system.f_frsize;
    if (missing_bytes > free_bytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("disk ", path_, ": preallocating ", bytes, " bytes takes ", missing_bytes,
                       " more, and the file system has ", free_bytes));
    }
  }
  while (fallocate(fd_, 0, 0, static_cast<off_t>(bytes)) != 0) {
    const int error = errno;
    if (error == EINTR) continue;
    const std::string call = absl::StrCat("preallocating ", bytes, " bytes");
    if (error != EOPNOTSUPP) return Error(error, call);
    spdlog::warn("disk {}: the file system cannot preallocate; it may be full at any write", path_);
    struct stat found {};
    if (fstat(fd_, &found) != 0) return Error(errno, "fstat");
    if (static_cast<uint64_t>(found.st_size) >= bytes) break;
    if (ftruncate(fd_, static_cast<off_t>(bytes)) != 0) return Error(errno, call);
    break;
  }
  return absl::OkStatus();
}

// So that the file's name survives a crash with what is in it.
absl::Status DiskFile::SyncDirectory() {
  std::filesystem::path directory = std::filesystem::path(path_).parent_path();
  if (directory.empty()) directory = ".";
  const int fd = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return Error(errno, "open of its directory");
  const int error = fsync(fd) == 0 ? 0 : errno;
  close(fd);
  if (error == 0 || error == EINVAL) return absl::OkStatus();  // EINVAL: it has no such thing
  return Error(error, "fsync of its directory");
}

}  // namespace quarry

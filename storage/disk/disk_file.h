// The file or block device that holds a disk.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace quarry {

// Open, of its size, and locked against every other opener until destroyed. Immutable after Open().
class DiskFile {
 public:
  // Errors as of OpenFileDisk().
  static absl::StatusOr<std::unique_ptr<DiskFile>> Open(const std::string& path, uint64_t bytes);
  ~DiskFile();
  DiskFile(const DiskFile&) = delete;
  DiskFile& operator=(const DiskFile&) = delete;

  const std::string& path() const { return path_; }
  int fd() const { return fd_; }
  uint64_t bytes() const { return bytes_; }
  bool is_device() const { return is_device_; }

 private:
  explicit DiskFile(const std::string& path) : path_(path) {}
  absl::Status Acquire(uint64_t bytes);
  void Release();
  absl::Status OpenDescriptor(uint64_t bytes);
  absl::Status Lock();
  void BypassPageCache();
  absl::Status Size(uint64_t bytes);
  absl::Status SizeDevice(uint64_t bytes);
  absl::Status SizeFile(uint64_t bytes);
  absl::Status Preallocate(uint64_t bytes, uint64_t missing_bytes);
  absl::Status SyncDirectory();
  absl::Status Error(int error, std::string_view call) const;

  const std::string path_;
  int fd_ = -1;
  uint64_t bytes_ = 0;
  bool is_device_ = false;
  bool created_ = false;  // by Open()
};

}  // namespace quarry

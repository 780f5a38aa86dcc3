// An owned file descriptor, and errno as a status.
#pragma once

#include <string_view>

#include "absl/status/status.h"

namespace quarry {

// Closes its descriptor when destroyed. Not thread-safe.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.Release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    Reset(other.Release());
    return *this;
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() { Reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int Release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }
  void Reset(int fd = -1);

 private:
  int fd_ = -1;
};

// The errno of a failed call on `what` (a path or a call's name), as a status whose code says
// what to do: missing or refused things are the caller's, exhaustion passes, the rest is ours.
absl::Status ErrnoStatus(int error, std::string_view what);

}  // namespace quarry

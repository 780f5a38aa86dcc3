// One memfd: writable for this process alone, readable for whoever is given its descriptor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"

namespace quarry {

struct ExtentOptions {
  uint64_t bytes = 0;  // a multiple of page_bytes
  uint64_t page_bytes = 4096;
  uint32_t numa_node = 0;
  bool prefault = true;
};

// An open descriptor, closed with the last holder.
class ExtentDescriptorHandle {
 public:
  explicit ExtentDescriptorHandle(int fd) : fd_(fd) {}
  ~ExtentDescriptorHandle();
  ExtentDescriptorHandle(const ExtentDescriptorHandle&) = delete;
  ExtentDescriptorHandle& operator=(const ExtentDescriptorHandle&) = delete;
  int fd() const { return fd_; }

 private:
  const int fd_;
};

// Immutable after creation; the bytes are the users' business. Unmapped when destroyed: slow for
// large extents, so destroy it outside locks.
class Extent {
 public:
  // Mapped, bound to its node before the first touch, pre-faulted, then sealed: shrink, grow,
  // future-write, seal. New memory reads as zero. ResourceExhausted when the system has no
  // memory or no descriptor left.
  static absl::StatusOr<std::unique_ptr<Extent>> Create(const ExtentOptions& options);
  ~Extent();
  Extent(const Extent&) = delete;
  Extent& operator=(const Extent&) = delete;

  std::byte* data() const { return data_; }
  uint64_t bytes() const { return options_.bytes; }
  uint64_t page_bytes() const { return options_.page_bytes; }
  uint32_t numa_node() const { return options_.numa_node; }
  // Shared: whoever passes it on keeps it open meanwhile, even if the extent goes.
  const std::shared_ptr<const ExtentDescriptorHandle>& descriptor() const { return descriptor_; }

 private:
  explicit Extent(const ExtentOptions& options) : options_(options) {}
  absl::Status Map();
  absl::Status Prefault();
  absl::Status Seal();

  const ExtentOptions options_;
  std::shared_ptr<const ExtentDescriptorHandle> descriptor_;
  std::byte* data_ = nullptr;
};

// The node with the most free memory among those this process may use; 0 where there is one.
uint32_t RoomiestNumaNode();

}  // namespace quarry

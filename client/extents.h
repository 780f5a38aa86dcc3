// The daemon's read extents in this process's memory, mapped on first use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/channel.h"
#include "proto/kv_types.h"

namespace quarry {

// One extent, mapped read-only; unmapped when destroyed.
class MappedExtent {
 public:
  MappedExtent(const std::byte* data, uint64_t bytes) : data_(data), bytes_(bytes) {}
  ~MappedExtent();
  MappedExtent(const MappedExtent&) = delete;
  MappedExtent& operator=(const MappedExtent&) = delete;
  std::span<const std::byte> bytes() const { return {data_, bytes_}; }

 private:
  const std::byte* const data_;
  const uint64_t bytes_;
};

// Thread-safe. A mapping stays while a block in it is leased, and after that as long as the daemon
// has the extent: memory that the daemon gave back is let go when further extents are mapped.
class ExtentMap {
 public:
  explicit ExtentMap(ClientChannel& channel) : channel_(channel) {}
  ExtentMap(const ExtentMap&) = delete;
  ExtentMap& operator=(const ExtentMap&) = delete;

  absl::StatusOr<std::shared_ptr<const MappedExtent>> Find(uint32_t extent);

 private:
  // Asks about a few mappings without leases, the next ones in turn.
  void DropGone() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  ClientChannel& channel_;
  absl::Mutex mutex_;
  std::map<uint32_t, std::shared_ptr<const MappedExtent>> mappings_ ABSL_GUARDED_BY(mutex_);
  uint32_t next_asked_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace quarry

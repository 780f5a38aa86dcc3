// The daemon's read extents in this process's memory, mapped on first use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/channel.h"
#include "proto/kv_types.h"

namespace quarry {

// Thread-safe. Mappings stay until it is destroyed: extent numbers are never reused.
class ExtentMap {
 public:
  explicit ExtentMap(ClientChannel& channel) : channel_(channel) {}
  ~ExtentMap();
  ExtentMap(const ExtentMap&) = delete;
  ExtentMap& operator=(const ExtentMap&) = delete;

  // The leased bytes. DataLoss if the lease lies outside its extent.
  absl::StatusOr<const std::byte*> Find(uint32_t extent, uint64_t offset, uint64_t bytes);

 private:
  struct Mapping {
    const std::byte* data = nullptr;
    uint64_t bytes = 0;
  };
  absl::StatusOr<Mapping> Map(uint32_t extent);

  ClientChannel& channel_;
  absl::Mutex mutex_;
  absl::flat_hash_map<uint32_t, Mapping> mappings_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry

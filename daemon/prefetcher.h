// Prefetcher: brings blocks from the disk into RAM before they are wanted.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "storage/block_store.h"

namespace quarry {

// One block at a time, of one request after the other; what is a miss is passed over, and ends its
// request, for blocks behind it cannot be reused. Thread-safe.
class Prefetcher {
 public:
  static constexpr size_t kMostRequests = 64;

  explicit Prefetcher(BlockStore* store);  // which outlives it
  // Ends with the block that is being read.
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // In this order. ResourceExhausted: kMostRequests wait.
  absl::Status Add(std::string_view tenant, std::vector<BlockKey> blocks);

 private:
  struct Request {
    std::string tenant;
    std::vector<BlockKey> blocks;
  };
  void Loop();
  bool stopping() const {
    absl::MutexLock lock(&mutex_);
    return stopping_;
  }

  BlockStore* const store_;
  mutable absl::Mutex mutex_;
  std::deque<Request> queue_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last
};

}  // namespace quarry

// A small thread pool with a bounded queue, for requests that may take long.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace quarry {

// Thread-safe. Tasks run in the order they were taken.
class BulkPool {
 public:
  struct Options {
    uint32_t threads = 2;
    uint32_t queue = 256;              // waiting tasks; running ones do not count
    std::string name = "quarry-bulk";  // of the threads, at most 15 bytes
  };
  explicit BulkPool(const Options& options);
  // Runs what is queued, then joins.
  ~BulkPool();

  // False, and the task is not taken, when the queue is full. Never blocks.
  [[nodiscard]] bool TrySubmit(std::function<void()> task);

 private:
  void Run();

  const Options options_;
  absl::Mutex mutex_;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace quarry

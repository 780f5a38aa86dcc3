// ExtentReturn: the thread on which empty extents are unmapped.
#pragma once

#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "storage/arena.h"

namespace quarry {

// Unmapping an extent of small pages takes milliseconds; the thread that frees an extent's last
// block may be the one that serves every client's ring. Thread-safe.
class ExtentReturn {
 public:
  // `unmap` is called on a thread of its own, never twice at a time.
  explicit ExtentReturn(std::function<void(EmptyExtents)> unmap);
  // Unmaps what was handed over, then joins.
  ~ExtentReturn();
  ExtentReturn(const ExtentReturn&) = delete;
  ExtentReturn& operator=(const ExtentReturn&) = delete;

  void Add(EmptyExtents emptied);

 private:
  void Loop();
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !waiting_.empty();
  }

  const std::function<void(EmptyExtents)> unmap_;
  absl::Mutex mutex_;  // not held while memory is unmapped
  std::vector<EmptyExtents> waiting_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses everything above
};

}  // namespace quarry

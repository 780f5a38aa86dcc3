// BackgroundWorker: publishing and index building, off the decode path.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"

namespace quarry {

// One thread of low priority that maintains contexts which have something to publish or index.
// A context waits at most once, so the queue is bounded by the contexts that live. Thread-safe.
class BackgroundWorker {
 public:
  class Client {
   public:
    virtual ~Client() = default;
    // Does what is due now; called by the worker's thread only.
    virtual void Maintain() = 0;
  };

  BackgroundWorker();
  // Finishes what it is doing and lets go of what is queued.
  ~BackgroundWorker();
  BackgroundWorker(const BackgroundWorker&) = delete;
  BackgroundWorker& operator=(const BackgroundWorker&) = delete;

  void Enqueue(std::shared_ptr<Client> client);
  // Blocks until what is queued now has been maintained and let go.
  void Flush();

 private:
  void Loop();

  absl::Mutex mutex_;
  std::deque<std::shared_ptr<Client>> queue_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_set<Client*> queued_ ABSL_GUARDED_BY(mutex_);
  uint64_t enqueued_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t finished_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last
};

}  // namespace quarry

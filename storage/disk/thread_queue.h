// An I/O queue of threads.
#pragma once

#include <cstdint>
#include <deque>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "storage/disk/disk_file.h"
#include "storage/disk/io_queue.h"

namespace quarry {

// Where io_uring is not allowed. The threads serve calls in the order in which they came, and each
// caller works for its own call beside them: so a call moves on however many there are, and none
// is ever refused. What waits is bounded by the threads that call.
class ThreadQueue : public IoQueue {
 public:
  // `file` outlives it. A call has `depth` I/Os in flight at most: the caller's and those of
  // depth - 1 threads.
  ThreadQueue(const DiskFile& file, uint32_t depth);
  ~ThreadQueue() override;
  ThreadQueue(const ThreadQueue&) = delete;
  ThreadQueue& operator=(const ThreadQueue&) = delete;

  absl::Status Run(IoDirection direction, std::span<DiskIo> ios) override;

 private:
  // On its caller's stack; all but the first line is guarded by mutex_.
  struct Call {
    const IoDirection direction;
    std::span<DiskIo> waiting;
    uint32_t in_flight = 0;
    absl::Status status;
  };

  void Loop();
  // Runs the first waiting I/O of a call, without the lock.
  void RunOne(Call* call) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Transfer(IoDirection direction, DiskIo* io);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !calls_.empty();
  }

  const DiskFile& file_;
  absl::Mutex mutex_;
  std::deque<Call*> calls_ ABSL_GUARDED_BY(mutex_);  // those with waiting I/Os
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;  // last: they use everything above
};

}  // namespace quarry

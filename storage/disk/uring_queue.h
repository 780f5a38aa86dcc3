// An I/O queue of io_uring rings.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "storage/disk/disk_file.h"
#include "storage/disk/io_queue.h"

namespace quarry {

class UringRing;

// Each call has a ring to itself, so calls do not wait for each other. There are as many rings as
// there were calls at once; a ring that fails is dropped.
class UringQueue : public IoQueue {
 public:
  // `file` outlives it; `depth` I/Os of a call are in flight at most. FailedPrecondition where the
  // system has no io_uring or does not allow it, ResourceExhausted where it has nothing left.
  static absl::StatusOr<std::unique_ptr<UringQueue>> Create(const DiskFile& file, uint32_t depth);
  ~UringQueue() override;

  absl::Status Run(IoDirection direction, std::span<DiskIo> ios) override;

 private:
  UringQueue(const DiskFile& file, uint32_t depth);
  absl::StatusOr<std::unique_ptr<UringRing>> Take();
  void GiveBack(std::unique_ptr<UringRing> ring);
  std::unique_ptr<UringRing> TakeIdle() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool NoneToWaitFor() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !idle_.empty() || busy_ == 0;
  }

  const DiskFile& file_;
  const uint32_t depth_;
  absl::Mutex mutex_;  // not held while the system is called
  std::vector<std::unique_ptr<UringRing>> idle_ ABSL_GUARDED_BY(mutex_);
  uint32_t busy_ ABSL_GUARDED_BY(mutex_) = 0;  // rings that are made or used
};

}  // namespace quarry

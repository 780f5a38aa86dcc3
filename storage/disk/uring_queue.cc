#include "storage/disk/uring_queue.h"

#include <liburing.h>
#include <sched.h>

#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/check.h"
#include "storage/disk/disk_error.h"

namespace quarry {

// One ring, used by one thread at a time.
class UringRing {
 public:
  static absl::StatusOr<std::unique_ptr<UringRing>> Create(const DiskFile& file, uint32_t depth);
  ~UringRing() {
    if (ready_) io_uring_queue_exit(&ring_);
  }
  UringRing(const UringRing&) = delete;
  UringRing& operator=(const UringRing&) = delete;

  // As IoQueue::Run().
  absl::Status Run(IoDirection direction, std::span<DiskIo> ios);
  // The ring itself, and not the disk: not to be used again.
  bool failed() const { return failed_; }

 private:
  UringRing(const DiskFile& file, uint32_t depth) : file_(file), depth_(depth) {}
  void Prepare(IoDirection direction, DiskIo* io);
  void Reap(IoDirection direction, absl::Status* status);
  absl::Status Fail(int error);

  const DiskFile& file_;
  const uint32_t depth_;
  io_uring ring_{};
  bool ready_ = false;
  bool failed_ = false;
  uint32_t in_flight_ = 0;  // prepared and not reaped
};

absl::StatusOr<std::unique_ptr<UringRing>> UringRing::Create(const DiskFile& file, uint32_t depth) {
  std::unique_ptr<UringRing> ring(new UringRing(file, depth));
  // The file is not registered with it: a ring goes some 25 ms after its process, even an idle one,
  // and so would the file's lock, while at 1 MiB an I/O nothing is saved that can be measured.
  const int error = -io_uring_queue_init(depth, &ring->ring_, 0);
  ring->ready_ = error == 0;
  if (error == 0) return ring;
  const absl::Status status =
      DiskError(DiskCall::kOpening, error,
                absl::StrCat("disk ", file.path(), ": io_uring with a queue of ", depth));
  if (absl::IsResourceExhausted(status)) return status;
  return absl::FailedPreconditionError(status.message());
}

absl::Status UringRing::Run(IoDirection direction, std::span<DiskIo> ios) {
  absl::Status status;
  size_t next = 0;
  for (;;) {
    while (status.ok() && next < ios.size() && in_flight_ < depth_) {
      ++in_flight_;
      Prepare(direction, &ios[next++]);
    }
    if (in_flight_ == 0) return status;
    const int error = -io_uring_submit_and_wait(&ring_, 1);
    if (error == EAGAIN || error == EBUSY) {
      sched_yield();  // the system is short of requests: others, or ours in flight, free some
    } else if (error > 0 && error != EINTR) {
      return Fail(error);
    }
    Reap(direction, &status);
  }
}

void UringRing::Prepare(IoDirection direction, DiskIo* io) {
  io_uring_sqe* entry = io_uring_get_sqe(&ring_);
  QUARRY_CHECK(entry != nullptr);  // depth_ entries at least, of which each I/O has one
  const auto pieces = static_cast<unsigned>(io->pieces.size());
  if (direction == IoDirection::kRead) {
    io_uring_prep_readv(entry, file_.fd(), io->pieces.data(), pieces, io->offset);
  } else {
    io_uring_prep_writev(entry, file_.fd(), io->pieces.data(), pieces, io->offset);
  }
  io_uring_sqe_set_data(entry, io);
}

// Takes what is done; what is not wholly done is prepared again.
void UringRing::Reap(IoDirection direction, absl::Status* status) {
  io_uring_cqe* done = nullptr;
  while (io_uring_peek_cqe(&ring_, &done) == 0) {
    auto* io = static_cast<DiskIo*>(io_uring_cqe_get_data(done));
    const int result = done->res;
    io_uring_cqe_seen(&ring_, done);
    status->Update(TakeResult(file_.path(), direction, result, io));
    if (status->ok() && io->bytes > 0) {
      Prepare(direction, io);
    } else {
      --in_flight_;
    }
  }
}

// Closing a ring does not wait for what is in flight, so that is done here, without the calls that
// fail: completions appear in shared memory.
absl::Status UringRing::Fail(int error) {
  failed_ = true;
  absl::Status status =
      DiskError(DiskCall::kTransfer, error, absl::StrCat("disk ", file_.path(), ": io_uring"));
  in_flight_ -= io_uring_sq_ready(&ring_);  // the system has not seen these, nor ever will
  while (in_flight_ > 0) {
    Reap(IoDirection::kRead, &status);  // prepares none: the status is an error
    if (in_flight_ > 0) sched_yield();
  }
  return status;
}

UringQueue::UringQueue(const DiskFile& file, uint32_t depth) : file_(file), depth_(depth) {}

UringQueue::~UringQueue() = default;

absl::StatusOr<std::unique_ptr<UringQueue>> UringQueue::Create(const DiskFile& file,
                                                               uint32_t depth) {
  auto ring = UringRing::Create(file, depth);
  if (!ring.ok()) return ring.status();
  std::unique_ptr<UringQueue> queue(new UringQueue(file, depth));
  absl::MutexLock lock(&queue->mutex_);
  queue->idle_.push_back(*std::move(ring));
  return queue;
}

absl::Status UringQueue::Run(IoDirection direction, std::span<DiskIo> ios) {
  auto ring = Take();
  if (!ring.ok()) return absl::UnavailableError(ring.status().message());
  absl::Status status = (*ring)->Run(direction, ios);
  GiveBack(*std::move(ring));
  return status;
}

absl::StatusOr<std::unique_ptr<UringRing>> UringQueue::Take() {
  {
    absl::MutexLock lock(&mutex_);
    ++busy_;
    if (!idle_.empty()) return TakeIdle();
  }
  auto made = UringRing::Create(file_, depth_);
  if (made.ok()) return made;
  // No descriptor or no memory for one more: one that is used comes back.
  absl::MutexLock lock(&mutex_);
  --busy_;
  mutex_.Await(absl::Condition(this, &UringQueue::NoneToWaitFor));
  if (idle_.empty()) return made.status();
  ++busy_;
  return TakeIdle();
}

std::unique_ptr<UringRing> UringQueue::TakeIdle() {
  std::unique_ptr<UringRing> ring = std::move(idle_.back());
  idle_.pop_back();
  return ring;
}

void UringQueue::GiveBack(std::unique_ptr<UringRing> ring) {
  const bool reusable = !ring->failed();
  if (!reusable) ring.reset();
  absl::MutexLock lock(&mutex_);
  --busy_;
  if (reusable) idle_.push_back(std::move(ring));
}

}  // namespace quarry

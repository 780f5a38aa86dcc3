#include "storage/disk/thread_queue.h"

#include <pthread.h>
#include <sys/uio.h>

#include <cerrno>

namespace quarry {

ThreadQueue::ThreadQueue(const DiskFile& file, uint32_t depth) : file_(file) {
  for (uint32_t i = 1; i < depth; ++i) {
    threads_.emplace_back([this] { Loop(); });
    pthread_setname_np(threads_.back().native_handle(), "quarry-disk");
  }
}

ThreadQueue::~ThreadQueue() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
}

absl::Status ThreadQueue::Run(IoDirection direction, std::span<DiskIo> ios) {
  Call call{.direction = direction, .waiting = ios};
  absl::MutexLock lock(&mutex_);
  if (ios.size() > 1) calls_.push_back(&call);  // one alone is the caller's
  while (!call.waiting.empty()) RunOne(&call);
  mutex_.Await(absl::Condition(
      +[](Call* own) { return own->in_flight == 0; }, &call));
  return call.status;
}

void ThreadQueue::Loop() {
  absl::MutexLock lock(&mutex_);
  for (;;) {
    mutex_.Await(absl::Condition(this, &ThreadQueue::HasWork));
    if (calls_.empty()) return;
    RunOne(calls_.front());
  }
}

void ThreadQueue::RunOne(Call* call) {
  DiskIo* const io = &call->waiting.front();
  call->waiting = call->waiting.subspan(1);
  if (call->waiting.empty()) std::erase(calls_, call);
  ++call->in_flight;
  mutex_.Unlock();
  absl::Status status = Transfer(call->direction, io);
  mutex_.Lock();
  --call->in_flight;
  if (status.ok()) return;
  call->status.Update(status);
  call->waiting = {};
  std::erase(calls_, call);
}

absl::Status ThreadQueue::Transfer(IoDirection direction, DiskIo* io) {
  while (io->bytes > 0) {
    const auto move = direction == IoDirection::kRead ? &preadv : &pwritev;
    const ssize_t moved = move(file_.fd(), io->pieces.data(), static_cast<int>(io->pieces.size()),
                               static_cast<off_t>(io->offset));
    absl::Status status = TakeResult(file_.path(), direction, moved < 0 ? -errno : moved, io);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace quarry

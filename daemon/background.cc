#include "daemon/background.h"

#include <pthread.h>

#include <utility>

#include "daemon/low_priority.h"

namespace quarry {

BackgroundWorker::BackgroundWorker() : thread_([this] { Loop(); }) {
  pthread_setname_np(thread_.native_handle(), "quarry-build");
}

BackgroundWorker::~BackgroundWorker() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void BackgroundWorker::Enqueue(std::shared_ptr<Client> client) {
  absl::MutexLock lock(&mutex_);
  if (!queued_.insert(client.get()).second) return;
  queue_.push_back(std::move(client));
  ++enqueued_;
}

void BackgroundWorker::Flush() {
  absl::MutexLock lock(&mutex_);
  const uint64_t last = enqueued_;
  const auto done = [this, last]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return finished_ >= last; };
  mutex_.Await(absl::Condition(&done));
}

void BackgroundWorker::Loop() {
  RunBehindDecoding();  // publishing a 32 MiB block takes about 4 ms of one core
  for (;;) {
    std::shared_ptr<Client> client;
    {
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(
          +[](BackgroundWorker* self)
               ABSL_NO_THREAD_SAFETY_ANALYSIS { return !self->queue_.empty() || self->stopping_; },
          this));
      if (stopping_) return;
      client = std::move(queue_.front());
      queue_.pop_front();
      // Before it runs: what becomes due while it does waits for another turn.
      queued_.erase(client.get());
    }
    client->Maintain();
    client.reset();  // may be the last owner; not under the mutex
    absl::MutexLock lock(&mutex_);
    ++finished_;
  }
}

}  // namespace quarry

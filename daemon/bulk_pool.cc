#include "daemon/bulk_pool.h"

#include <pthread.h>

#include <utility>

namespace quarry {

BulkPool::BulkPool(const Options& options) : options_(options) {
  for (uint32_t i = 0; i < options_.threads; ++i) {
    threads_.emplace_back([this] { Run(); });
    pthread_setname_np(threads_.back().native_handle(), options_.name.substr(0, 15).c_str());
  }
}

BulkPool::~BulkPool() {
  {
    const absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
}

bool BulkPool::TrySubmit(std::function<void()> task) {
  const absl::MutexLock lock(&mutex_);
  if (stopping_ || queue_.size() >= options_.queue) return false;
  queue_.push_back(std::move(task));
  return true;
}

void BulkPool::Run() {
  while (true) {
    std::function<void()> task;
    {
      const absl::MutexLock lock(&mutex_);
      const auto ready = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
        return stopping_ || !queue_.empty();
      };
      mutex_.Await(absl::Condition(&ready));
      if (queue_.empty()) return;
      task = std::move(queue_.front());
      queue_.pop_front();
    }
    task();
  }
}

}  // namespace quarry

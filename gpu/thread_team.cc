#include "gpu/thread_team.h"

#include <algorithm>

namespace quarry {

ThreadTeam::ThreadTeam(uint32_t threads) {
  for (uint32_t i = 1; i < std::max(1u, threads); ++i) threads_.emplace_back([this] { Main(); });
}

ThreadTeam::~ThreadTeam() {
  {
    absl::MutexLock lock(&mutex_);
    ending_ = true;
  }
  begun_.SignalAll();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadTeam::RunShare(const std::function<void(size_t)>& f, size_t n) {
  for (size_t i = next_.fetch_add(1); i < n; i = next_.fetch_add(1)) f(i);
}

void ThreadTeam::For(size_t n, const std::function<void(size_t)>& f) {
  if (n <= 1 || threads_.empty()) {
    for (size_t i = 0; i < n; ++i) f(i);
    return;
  }
  {
    absl::MutexLock lock(&mutex_);
    next_ = 0;
    f_ = &f;
    n_ = n;
    ++loop_;
  }
  begun_.SignalAll();
  RunShare(f, n);
  // A thread that comes too late must not find the loop; one that is in it must leave first.
  absl::MutexLock lock(&mutex_);
  f_ = nullptr;
  while (busy_ > 0) ended_.Wait(&mutex_);
}

void ThreadTeam::Main() {
  uint64_t seen = 0;
  while (true) {
    const std::function<void(size_t)>* f = nullptr;
    size_t n = 0;
    {
      absl::MutexLock lock(&mutex_);
      while (!ending_ && (loop_ == seen || f_ == nullptr)) begun_.Wait(&mutex_);
      if (ending_) return;
      seen = loop_;
      f = f_;
      n = n_;
      ++busy_;
    }
    RunShare(*f, n);
    absl::MutexLock lock(&mutex_);
    if (--busy_ == 0) ended_.Signal();
  }
}

}  // namespace quarry

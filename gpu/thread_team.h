// Threads that share the iterations of a loop.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace quarry {

// For(n, f) calls f(0) .. f(n - 1), each once, on the caller and the team's threads, and returns
// when all have ended. One loop at a time; f must not call For. Idle threads sleep: a worker
// shares its machine with the daemon that it waits for.
class ThreadTeam {
 public:
  // `threads` in all, the caller's included.
  explicit ThreadTeam(uint32_t threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  void For(size_t n, const std::function<void(size_t)>& f);
  uint32_t threads() const { return static_cast<uint32_t>(threads_.size()) + 1; }

 private:
  void Main();
  void RunShare(const std::function<void(size_t)>& f, size_t n);

  std::atomic<size_t> next_{0};
  absl::Mutex mutex_;
  uint64_t loop_ ABSL_GUARDED_BY(mutex_) = 0;  // counts the loops begun
  const std::function<void(size_t)>* f_ ABSL_GUARDED_BY(mutex_) = nullptr;
  size_t n_ ABSL_GUARDED_BY(mutex_) = 0;
  uint32_t busy_ ABSL_GUARDED_BY(mutex_) = 0;  // threads of the team in the loop
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  absl::CondVar begun_, ended_;
  std::vector<std::thread> threads_;
};

}  // namespace quarry

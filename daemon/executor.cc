#include "daemon/executor.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <utility>

namespace quarry {
namespace {

inline void CpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins between two offers of the CPU to others, about 2 us: with more, client, poller and
// executors spin on each other where cores are few (an empty attend 66 us instead of 6 on two).
constexpr uint32_t kSpinsPerYield = 32;

}  // namespace

// Relaxed: the counter only hands out tasks; what they read was published by the queue's mutex or
// belongs to this thread.
bool Executor::Job::Claim(uint32_t* task) {
  if (next_.load(std::memory_order_relaxed) >= tasks_) return false;
  *task = next_.fetch_add(1, std::memory_order_relaxed);
  return *task < tasks_;
}

void Executor::Job::Help() {
  for (uint32_t task; Claim(&task);) RunTask(task);
}

Executor::Executor(const ExecutorOptions& options) : options_(options) {
  threads_.reserve(options.threads);
  for (uint32_t i = 0; i < options.threads; ++i) {
    threads_.emplace_back([this] { Loop(); });
    pthread_setname_np(threads_.back().native_handle(), "quarry-scan");
  }
}

Executor::~Executor() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_.store(true, std::memory_order_release);
    wake_.SignalAll();
  }
  for (std::thread& thread : threads_) thread.join();
}

bool Executor::Submit(std::shared_ptr<Job> job) {
  absl::MutexLock lock(&mutex_);
  if (jobs_.size() >= options_.max_queued_jobs || threads_.empty()) return false;
  jobs_.push_back(std::move(job));
  queued_.store(jobs_.size(), std::memory_order_release);
  if (parked_ > 0) wake_.SignalAll();
  return true;
}

Executor::Claimed Executor::ClaimNext() {
  Claimed claimed;
  while (claimed.job == nullptr && !jobs_.empty()) {
    std::shared_ptr<Job> job = std::move(jobs_.front());
    jobs_.pop_front();
    if (!job->Claim(&claimed.task)) continue;
    claimed.job = job;
    if (job->HasUnclaimed()) jobs_.push_back(std::move(job));
  }
  queued_.store(jobs_.size(), std::memory_order_release);
  return claimed;
}

bool Executor::RunOne() {
  if (queued_.load(std::memory_order_acquire) == 0) return false;
  if (!mutex_.TryLock()) return false;  // others are at it
  const Claimed next = ClaimNext();
  mutex_.Unlock();
  if (next.job == nullptr) return false;
  next.job->RunTask(next.task);
  return true;
}

void Executor::SetArmed(bool armed) {
  if (armed_.exchange(armed, std::memory_order_acq_rel) == armed || !armed) return;
  // The wake is paid here, before the token's first attend.
  absl::MutexLock lock(&mutex_);
  wake_.SignalAll();
}

void Executor::SpinForWork() const {
  for (uint32_t spins = 1; armed_.load(std::memory_order_relaxed); ++spins) {
    if (queued_.load(std::memory_order_acquire) > 0) return;
    if (stopping_.load(std::memory_order_relaxed)) return;
    CpuRelax();
    if (spins % kSpinsPerYield == 0) sched_yield();
  }
}

Executor::Claimed Executor::Take() {
  for (;;) {
    SpinForWork();
    if (!mutex_.TryLock()) {
      // All that spin see a new job at once. While a token is in work none of them sleeps for the
      // lock: a wake across CPUs takes longer than a task.
      if (armed_.load(std::memory_order_relaxed)) {
        CpuRelax();
        continue;
      }
      mutex_.Lock();
    }
    Claimed next = ClaimNext();
    const bool ends = next.job != nullptr || stopping_.load(std::memory_order_relaxed);
    if (!ends && !armed_.load(std::memory_order_relaxed)) {
      ++parked_;
      wake_.Wait(&mutex_);
      --parked_;
    }
    mutex_.Unlock();
    if (ends) return next;
  }
}

void Executor::Loop() {
  for (Claimed next = Take(); next.job != nullptr; next = Take()) next.job->RunTask(next.task);
}

}  // namespace quarry

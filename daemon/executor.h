// Executor: the threads that scan for attends.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace quarry {

struct ExecutorOptions {
  uint32_t threads = 1;
  uint32_t max_queued_jobs = 1024;
};

// Threads that run jobs of independent tasks. Jobs take turns task by task, so that a small one
// does not wait for the whole of a large one before it. The threads spin while armed and park
// otherwise: a wake across CPUs costs 65 us, so none may lie inside a token. Thread-safe.
class Executor {
 public:
  // Tasks [0, tasks), each run exactly once, on any thread. Held by shared_ptr: a thread may look
  // at a job for more tasks after its last one has finished elsewhere.
  class Job {
   public:
    explicit Job(uint32_t tasks = 0) : tasks_(tasks) {}
    virtual ~Job() = default;
    virtual void RunTask(uint32_t task) = 0;

    // Runs unclaimed tasks until none is left.
    void Help();

   protected:
    void set_tasks(uint32_t tasks) { tasks_ = tasks; }

   private:
    friend class Executor;
    bool Claim(uint32_t* task);
    bool HasUnclaimed() const { return next_.load(std::memory_order_relaxed) < tasks_; }
    uint32_t tasks_;
    std::atomic<uint32_t> next_{0};
  };

  explicit Executor(const ExecutorOptions& options);
  // Runs what is queued, then joins.
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // False when the queue is full: nothing was queued.
  bool Submit(std::shared_ptr<Job> job);
  // Runs one task, the next in turn, on the calling thread; false if there is none, or others are
  // about to take theirs. For threads with other duties, which look to them between tasks.
  bool RunOne();
  void SetArmed(bool armed);

  bool full() const { return queued_jobs() >= options_.max_queued_jobs; }
  uint64_t queued_jobs() const { return queued_.load(std::memory_order_relaxed); }
  uint32_t threads() const { return static_cast<uint32_t>(threads_.size()); }

 private:
  struct Claimed {
    std::shared_ptr<Job> job;  // null: there is none
    uint32_t task = 0;
  };
  void Loop();
  // Waits for a task; none: stopping.
  Claimed Take();
  // The front job's next task; the job goes to the back while it has more.
  Claimed ClaimNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SpinForWork() const;

  const ExecutorOptions options_;
  std::atomic<bool> armed_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<uint64_t> queued_{0};

  absl::Mutex mutex_;
  absl::CondVar wake_;
  std::deque<std::shared_ptr<Job>> jobs_ ABSL_GUARDED_BY(mutex_);  // that may have unclaimed tasks
  uint32_t parked_ ABSL_GUARDED_BY(mutex_) = 0;

  std::vector<std::thread> threads_;  // last: they use everything above
};

}  // namespace quarry

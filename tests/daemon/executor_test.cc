#include "daemon/executor.h"

#include <gtest/gtest.h>
#include <time.h>

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"

namespace quarry {
namespace {

class CountingJob : public Executor::Job {
 public:
  CountingJob(uint32_t tasks, std::function<void()> last)
      : Job(tasks), runs_(tasks), left_(tasks), last_(std::move(last)) {}
  void RunTask(uint32_t task) override {
    runs_[task].fetch_add(1);
    if (left_.fetch_sub(1) == 1) last_();
  }
  bool EachRanOnce() const {
    for (const auto& runs : runs_) {
      if (runs.load() != 1) return false;
    }
    return true;
  }

 private:
  std::vector<std::atomic<int>> runs_;
  std::atomic<uint32_t> left_;
  const std::function<void()> last_;
};

class BlockingJob : public Executor::Job {
 public:
  BlockingJob() : Job(1) {}
  void RunTask(uint32_t) override {
    started.Notify();
    release.WaitForNotification();
  }
  absl::Notification started, release;
};

TEST(ExecutorTest, EveryTaskRunsOnceArmedOrNot) {
  for (const bool armed : {false, true}) {
    Executor executor({.threads = 3});
    executor.SetArmed(armed);
    for (int round = 0; round < 200; ++round) {
      absl::Notification done;
      auto job = std::make_shared<CountingJob>(round % 17 + 1, [&] { done.Notify(); });
      ASSERT_TRUE(executor.Submit(job));
      if (round % 2 == 0) job->Help();
      done.WaitForNotification();
      EXPECT_TRUE(job->EachRanOnce());
    }
    executor.SetArmed(false);
  }
}

TEST(ExecutorTest, AFullQueueRefuses) {
  Executor executor({.threads = 1, .max_queued_jobs = 2});
  auto blocking = std::make_shared<BlockingJob>();
  ASSERT_TRUE(executor.Submit(blocking));
  blocking->started.WaitForNotification();  // its only task is claimed: it has left the queue
  EXPECT_EQ(executor.queued_jobs(), 0u);
  absl::Notification done;
  auto waiting = std::make_shared<CountingJob>(1, [&] { done.Notify(); });
  EXPECT_TRUE(executor.Submit(std::make_shared<CountingJob>(1, [] {})));
  EXPECT_TRUE(executor.Submit(waiting));
  EXPECT_FALSE(executor.Submit(std::make_shared<CountingJob>(1, [] {})));
  EXPECT_EQ(executor.queued_jobs(), 2u);
  blocking->release.Notify();
  done.WaitForNotification();
}

TEST(ExecutorTest, AThreadWithOtherDutiesRunsOneTaskAtATime) {
  Executor executor({.threads = 1});
  EXPECT_FALSE(executor.RunOne());
  auto blocking = std::make_shared<BlockingJob>();
  ASSERT_TRUE(executor.Submit(blocking));
  blocking->started.WaitForNotification();  // the only thread is busy
  std::atomic<int> finished{0};
  auto first = std::make_shared<CountingJob>(2, [&] { ++finished; });
  auto second = std::make_shared<CountingJob>(1, [&] { ++finished; });
  ASSERT_TRUE(executor.Submit(first));
  ASSERT_TRUE(executor.Submit(second));
  EXPECT_TRUE(executor.RunOne());
  EXPECT_EQ(finished, 0);
  EXPECT_TRUE(executor.RunOne());
  EXPECT_EQ(finished, 1);
  EXPECT_TRUE(second->EachRanOnce());  // it did not wait for both of the first one's tasks
  EXPECT_TRUE(executor.RunOne());
  EXPECT_EQ(finished, 2);
  EXPECT_FALSE(executor.RunOne());
  EXPECT_TRUE(first->EachRanOnce());
  EXPECT_TRUE(second->EachRanOnce());
  blocking->release.Notify();
}

TEST(ExecutorTest, TheDestructorRunsWhatIsQueued) {
  std::atomic<int> ran{0};
  {
    Executor executor({.threads = 1});
    for (int i = 0; i < 100; ++i) {
      ASSERT_TRUE(executor.Submit(std::make_shared<CountingJob>(3, [&] { ++ran; })));
    }
  }
  EXPECT_EQ(ran, 100);
}

double ProcessCpuSeconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

TEST(ExecutorTest, IdleThreadsParkOnceDisarmed) {
  Executor executor({.threads = 4});
  executor.SetArmed(true);
  executor.SetArmed(false);
  absl::SleepFor(absl::Milliseconds(50));
  const double before = ProcessCpuSeconds();
  absl::SleepFor(absl::Milliseconds(300));
  EXPECT_LT(ProcessCpuSeconds() - before, 0.003);  // 1% of a core
}

}  // namespace
}  // namespace quarry

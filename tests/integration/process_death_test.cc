// A worker or the daemon killed or stopped at any moment: nothing hangs, nobody else is blocked,
// and nothing wrong is returned.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <random>
#include <thread>

#include "absl/time/clock.h"
#include "tests/support/daemon_process.h"
#include "tests/support/kv_client.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::DaemonProcess;

std::unique_ptr<DaemonProcess> StartDaemon(const char* arena = "256MiB") {
  testing::DaemonOptions options;
  options.arguments = {"--arena-bytes", arena};
  auto daemon = DaemonProcess::Start(options);
  EXPECT_TRUE(daemon.ok()) << daemon.status();
  return daemon.ok() ? *std::move(daemon) : nullptr;
}

// A child process that opens a context, holds leases and attends or appends until it is killed. It
// is forked before this process has threads of its own.
class Worker {
 public:
  enum class Does { kAttend, kAppend };
  Worker(const std::string& socket, const ModelSpec& spec, const testing::KvData& data,
         Does does = Does::kAttend)
      : does_(does) {
    int ready[2];
    EXPECT_EQ(pipe(ready), 0);
    pid_ = fork();
    if (pid_ == 0) {
      close(ready[0]);
      _exit(Main(socket, spec, data, ready[1]));
    }
    close(ready[1]);
    char byte = 0;
    EXPECT_EQ(read(ready[0], &byte, 1), 1) << "the worker did not get ready";
    close(ready[0]);
  }
  ~Worker() { End(SIGKILL); }
  pid_t pid() const { return pid_; }
  void Signal(int signal) { kill(pid_, signal); }
  // Returns when the process, and with it its socket, has gone.
  void End(int signal) {
    if (pid_ <= 0) return;
    kill(pid_, signal);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  int Main(const std::string& socket, const ModelSpec& spec, const testing::KvData& data,
           int ready) const {
    auto client = testing::ConnectTo(socket);
    if (!client.ok()) return 1;
    auto opened = (*client)->Open(testing::OpenFor(spec, data, 2048));
    if (!opened.ok()) return 2;
    const auto count = static_cast<uint32_t>(data.tokens.size());
    if (!testing::AppendTokens(client->get(), opened->context, data, opened->reused_tokens, count)
             .ok()) {
      return 3;
    }
    const std::string block(100'000, 'b');
    if (!(*client)->Put("engine", "key", std::as_bytes(std::span(block))).ok()) return 4;
    auto lease = (*client)->Lease("engine", "key");
    if (!lease.ok()) return 5;
    if (write(ready, "r", 1) != 1) return 6;
    (*client)->Arm();  // dies armed: the poller must not spin for it
    for (uint32_t seed = 0;; ++seed) {
      if (does_ == Does::kAppend) {
        auto fork = (*client)->Fork({opened->context, 1, 2048, {}});
        if (!fork.ok()) return 7;
        if (!testing::AppendTokens(client->get(), *fork, data, 1, count).ok()) return 8;
        if (!(*client)->Close(*fork).ok()) return 9;
        continue;
      }
      testing::OneRow row(spec.shape, opened->context, seed % 2, {0, count}, seed);
      if (!row.Run(client->get()).ok()) return 10;
    }
  }
  const Does does_;
  pid_t pid_ = -1;
};

uint64_t ContextCount(Client* client) {
  auto contexts = client->ListContexts();
  EXPECT_TRUE(contexts.ok()) << contexts.status();
  return contexts.ok() ? contexts->size() : 0;
}

bool WithinASecond(const std::function<bool()>& condition) {
  absl::Time end = absl::Now() + absl::Seconds(1);
  while (absl::Now() < end) {
    if (condition()) return true;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return condition();
}

TEST(ProcessDeathTest, KilledAndStoppedWorkersCostOnlyTheirOwnContexts) {
  std::mt19937 random(Seed());
  auto daemon = StartDaemon();
  ASSERT_NE(daemon, nullptr);
  ModelSpec spec = testing::SmallSpec();
  testing::KvData data(spec.shape, 700, 11);
  for (int round = 0; round < 8; ++round) {
    Worker victim(daemon->socket_path(), spec, data);
    auto client = testing::ConnectTo(daemon->socket_path());
    ASSERT_TRUE(client.ok()) << client.status();
    auto opened = (*client)->Open(testing::OpenFor(spec, data, 1024));
    ASSERT_TRUE(opened.ok()) << opened.status();
    ASSERT_TRUE(
        testing::AppendTokens(client->get(), opened->context, data, opened->reused_tokens, 700)
            .ok());
    // The round before may just have ended.
    ASSERT_TRUE(WithinASecond([&] { return ContextCount(client->get()) == 2; }));
    absl::SleepFor(absl::Microseconds(random() % 3000));  // the moment of the kill is the input
    bool stopped = round % 2 == 1;
    victim.Signal(stopped ? SIGSTOP : SIGKILL);
    for (uint32_t i = 0; i < 50; ++i) {
      testing::OneRow row(spec.shape, opened->context, i % 2, {0, 700}, i);
      ASSERT_TRUE(row.Run(client->get()).ok()) << row.answer.status;
      if (i == 0) {
        EXPECT_LT(row.Error(data), 1e-3);
      }
    }
    victim.End(SIGKILL);
    EXPECT_TRUE(WithinASecond([&] { return ContextCount(client->get()) == 1; }))
        << "the dead worker's context is still there";
  }
}

TEST(ProcessDeathTest, AKilledWorkersSessionAndLeasesAreGoneWithinASecondOfItsSocketsClosing) {
  std::mt19937 random(Seed());
  auto daemon = StartDaemon();
  ASSERT_NE(daemon, nullptr);
  const ModelSpec spec = testing::SmallSpec();
  const testing::KvData data(spec.shape, 700, 11);
  for (int round = 0; round < 10; ++round) {
    const bool appends = round % 2 == 1;
    Worker victim(daemon->socket_path(), spec, data,
                  appends ? Worker::Does::kAppend : Worker::Does::kAttend);
    auto client = testing::ConnectTo(daemon->socket_path());
    ASSERT_TRUE(client.ok()) << client.status();
    const auto figure = [&](const char* name) {
      auto figures = (*client)->Statistics();
      EXPECT_TRUE(figures.ok()) << figures.status();
      return figures.ok() ? figures->at(name) : -1;
    };
    ASSERT_EQ(figure("quarry_engine_sessions_count"), 2);
    ASSERT_EQ(figure("quarry_engine_leases_count"), 1);
    ASSERT_GT(figure("quarry_store_leased_blocks_count"), 0);
    absl::SleepFor(absl::Microseconds(random() % 5000));  // the moment of the kill is the input
    victim.End(SIGKILL);
    EXPECT_TRUE(WithinASecond([&] {
      return figure("quarry_engine_sessions_count") == 1 &&
             figure("quarry_engine_leases_count") == 0 &&
             figure("quarry_store_leased_blocks_count") == 0 && ContextCount(client->get()) == 0;
    })) << "round "
        << round << ": " << figure("quarry_engine_sessions_count") << " sessions, "
        << figure("quarry_engine_leases_count") << " leases, "
        << figure("quarry_store_leased_blocks_count") << " leased blocks, "
        << ContextCount(client->get()) << " contexts";
  }
}

// The bound is wide for a machine that does other things; a daemon that waited for the stopped
// ones would wait until its client's deadline.
TEST(ProcessDeathTest, StoppedWorkersDoNotDelayAnothersAttends) {
  std::mt19937 random(Seed());
  auto daemon = StartDaemon();
  ASSERT_NE(daemon, nullptr);
  const ModelSpec spec = testing::SmallSpec();
  const testing::KvData data(spec.shape, 700, 12);
  Worker attending(daemon->socket_path(), spec, data, Worker::Does::kAttend);
  Worker appending(daemon->socket_path(), spec, data, Worker::Does::kAppend);
  auto client = testing::ConnectTo(daemon->socket_path());
  ASSERT_TRUE(client.ok()) << client.status();
  auto opened = (*client)->Open(testing::OpenFor(spec, data, 1024));
  ASSERT_TRUE(opened.ok()) << opened.status();
  ASSERT_TRUE(
      testing::AppendTokens(client->get(), opened->context, data, opened->reused_tokens, 700).ok());
  std::vector<absl::Duration> took;
  for (uint32_t round = 0; round < 20; ++round) {
    absl::SleepFor(absl::Microseconds(random() % 3000));  // they are stopped in the middle of it
    for (Worker* worker : {&attending, &appending}) worker->Signal(SIGSTOP);
    ASSERT_TRUE(testing::AwaitStopped(attending.pid()) && testing::AwaitStopped(appending.pid()));
    for (uint32_t i = 0; i < 20; ++i) {
      testing::OneRow row(spec.shape, opened->context, i % 2, {0, 700}, i);
      const absl::Time start = absl::Now();
      ASSERT_TRUE(row.Run(client->get()).ok()) << row.answer.status;
      took.push_back(absl::Now() - start);
      if (i == 0) {
        EXPECT_LT(row.Error(data), 1e-3);
      }
    }
    for (Worker* worker : {&attending, &appending}) worker->Signal(SIGCONT);
  }
  std::sort(took.begin(), took.end());
  const absl::Duration p99 = took[took.size() * 99 / 100];
  std::printf("p50 %s, p99 %s\n", absl::FormatDuration(took[took.size() / 2]).c_str(),
              absl::FormatDuration(p99).c_str());
  EXPECT_LT(p99, absl::Milliseconds(250));
  // They were in the middle of it, not dead.
  EXPECT_EQ(waitpid(attending.pid(), nullptr, WNOHANG), 0);
  EXPECT_EQ(waitpid(appending.pid(), nullptr, WNOHANG), 0);
}

TEST(ProcessDeathTest, ManyDeadWorkersLeaveTheArenaWhole) {
  auto daemon = StartDaemon("64MiB");
  ASSERT_NE(daemon, nullptr);
  ModelSpec spec = testing::SmallSpec();
  // Each worker reserves 2048 tokens; without cleanup the arena would be full after some.
  for (int i = 0; i < 24; ++i) {
    testing::KvData data(spec.shape, 300, static_cast<uint32_t>(100 + i));
    Worker worker(daemon->socket_path(), spec, data);
    worker.End(SIGKILL);
  }
  auto client = testing::ConnectTo(daemon->socket_path());
  ASSERT_TRUE(client.ok());
  EXPECT_TRUE(WithinASecond([&] { return ContextCount(client->get()) == 0; }));
}

TEST(ProcessDeathTest, KilledDaemonMakesAttendUnavailableNotHang) {
  auto daemon = StartDaemon();
  ASSERT_NE(daemon, nullptr);
  ModelSpec spec = testing::SmallSpec();
  testing::KvData data(spec.shape, 500, 5);
  auto client = testing::ConnectTo(daemon->socket_path(), absl::Seconds(5));
  ASSERT_TRUE(client.ok());
  auto opened = (*client)->Open(testing::OpenFor(spec, data, 1024));
  ASSERT_TRUE(opened.ok()) << opened.status();
  ASSERT_TRUE(testing::AppendTokens(client->get(), opened->context, data, 0, 500).ok());
  std::atomic<bool> killed = false;
  std::thread killer([&] {
    absl::SleepFor(absl::Milliseconds(30));
    daemon->Kill();
    killed = true;
  });
  absl::Status status;
  uint32_t seed = 0;
  while (status.ok()) {
    testing::OneRow row(spec.shape, opened->context, 0, {0, 500}, ++seed);
    status = row.Run(client->get());
    if (status.ok()) {
      ASSERT_LT(row.Error(data), 1e-3) << "a wrong answer at seed " << seed;
    }
  }
  killer.join();
  EXPECT_TRUE(killed);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  absl::Time start = absl::Now();
  EXPECT_TRUE(absl::IsUnavailable((*client)->Nop()));  // stays so, at once
  EXPECT_LT(absl::Now() - start, absl::Seconds(1));
}

TEST(ProcessDeathTest, StoppedDaemonMakesAttendUnavailableByTheDeadline) {
  auto daemon = StartDaemon();
  ASSERT_NE(daemon, nullptr);
  auto client = testing::ConnectTo(daemon->socket_path(), absl::Milliseconds(300));
  ASSERT_TRUE(client.ok());
  ASSERT_TRUE((*client)->Nop().ok());
  daemon->Signal(SIGSTOP);
  ASSERT_TRUE(testing::AwaitStopped(daemon->pid()));
  absl::Time start = absl::Now();
  absl::Status status = (*client)->Nop();
  absl::Duration took = absl::Now() - start;
  daemon->Signal(SIGCONT);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_GE(took, absl::Milliseconds(250));
  EXPECT_LT(took, absl::Seconds(2));
}

}  // namespace
}  // namespace quarry

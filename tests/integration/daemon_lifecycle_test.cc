// Starting, refusing to start, idling, draining and ending: what an operator sees.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <thread>

#include "absl/time/clock.h"
#include "quarry/v1/admin.grpc.pb.h"
#include "tests/support/daemon_process.h"
#include "tests/support/eventually.h"
#include "tests/support/kv_client.h"

namespace quarry {
namespace {

using testing::DaemonOptions;
using testing::DaemonProcess;
using ::testing::HasSubstr;
using testing::OneRow;

absl::StatusOr<std::unique_ptr<DaemonProcess>> Start(DaemonOptions options = {}) {
  options.arguments.insert(options.arguments.end(), {"--arena-bytes", "128MiB"});
  return DaemonProcess::Start(options);
}

// Exit status of a quarryd that ends by itself, its standard error in *error.
int RunToEnd(const std::vector<std::string>& arguments, std::string* error,
             const std::string& before = "") {
  char name[] = "/tmp/quarry-lifecycle-XXXXXX";
  const int log = mkstemp(name);
  std::string command = before + testing::DefaultDaemonBinary();
  for (const std::string& argument : arguments) command += " '" + argument + "'";
  command += " >/dev/null 2>" + std::string(name) + " </dev/null";
  const int status = std::system(command.c_str());
  std::ifstream in(name);
  *error = std::string(std::istreambuf_iterator<char>(in), {});
  close(log);
  unlink(name);
  return WEXITSTATUS(status);
}

TEST(DaemonLifecycleTest, TooFewDescriptorsAreRefusedWithTheirNumber) {
  std::string error;
  EXPECT_EQ(RunToEnd({"--arena-bytes", "64MiB"}, &error, "ulimit -n 40; exec "), 1);
  EXPECT_THAT(error, HasSubstr("open files (ulimit -n) is 40"));
}

TEST(DaemonLifecycleTest, ASecondStartIsRefusedNamingSocketAndPid) {
  auto first = Start();
  ASSERT_TRUE(first.ok()) << first.status();
  DaemonOptions same;
  same.directory = (*first)->directory();
  std::string error;
  EXPECT_EQ(RunToEnd({"--socket", (*first)->socket_path(), "--grpc-socket",
                      (*first)->grpc_path() + "2", "--arena-bytes", "64MiB"},
                     &error),
            1);
  EXPECT_THAT(error, HasSubstr((*first)->socket_path()));
  EXPECT_THAT(error, HasSubstr(std::to_string((*first)->pid())));
  EXPECT_EQ(RunToEnd({"--socket", (*first)->socket_path() + "2", "--grpc-socket",
                      (*first)->grpc_path(), "--arena-bytes", "64MiB"},
                     &error),
            1);
  EXPECT_THAT(error, HasSubstr((*first)->grpc_path()));
  // The first is none the worse.
  EXPECT_TRUE((*testing::ConnectTo((*first)->socket_path()))->Nop().ok());
}

TEST(DaemonLifecycleTest, WhereNoSocketCanBeMadeTheOptionsAreNamed) {
  std::string error;
  EXPECT_EQ(RunToEnd({"--socket", "/nonexistent/quarry/q.sock", "--grpc-socket",
                      "/nonexistent/quarry/g.sock", "--arena-bytes", "64MiB"},
                     &error),
            1);
  EXPECT_THAT(error, HasSubstr("/nonexistent/quarry: No such file"));
  EXPECT_THAT(error, HasSubstr("--socket and --grpc-socket"));
}

TEST(DaemonLifecycleTest, AnArenaBeyondTheMachinesMemoryIsWarnedOf) {
  DaemonOptions options;
  options.arguments = {"--arena-bytes", "64TiB"};
  auto daemon = DaemonProcess::Start(options);
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  EXPECT_EQ((*daemon)->Stop(), 0);  // all that was logged is written
  const std::string warned = "engine.arena_bytes is more than the machine's memory";
  EXPECT_THAT((*daemon)->Log(), HasSubstr(warned));
  EXPECT_THAT((*daemon)->Log(), HasSubstr(std::to_string(64ull << 40)));
  EXPECT_THAT((*daemon)->Log(), HasSubstr("memory_bytes="));
  auto small = Start();
  ASSERT_TRUE(small.ok()) << small.status();
  EXPECT_EQ((*small)->Stop(), 0);
  EXPECT_THAT((*small)->Log(), ::testing::Not(HasSubstr(warned)));
}

TEST(DaemonLifecycleTest, APortInUseIsRefusedNamingIt) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(fd, 1), 0);
  socklen_t length = sizeof(address);
  ASSERT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length), 0);
  const std::string taken = "127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  char name[] = "/tmp/quarry-lifecycle-XXXXXX";
  const std::string directory = mkdtemp(name);
  const std::vector<std::string> common = {"--socket",      directory + "/shm.sock",
                                           "--grpc-socket", directory + "/grpc.sock",
                                           "--arena-bytes", "64MiB"};
  std::vector<std::string> metrics = common, grpc = common;
  metrics.insert(metrics.end(), {"--metrics", taken});
  std::string error;
  EXPECT_EQ(RunToEnd(metrics, &error), 1);
  EXPECT_THAT(error, HasSubstr(taken));
  const std::string config = directory + "/quarryd.toml";
  std::ofstream(config) << "[grpc]\nlisten = \"" << taken << "\"\ntcp_tenant = \"local\"\n";
  grpc.insert(grpc.end(), {"--config", config});
  EXPECT_EQ(RunToEnd(grpc, &error), 1);
  EXPECT_THAT(error, HasSubstr(taken));
  EXPECT_EQ(std::system(("rm -r " + directory).c_str()), 0);
  close(fd);
}

TEST(DaemonLifecycleTest, ADaemonStartsWhereAKilledOneLeftItsSockets) {
  DaemonOptions options;
  char name[] = "/tmp/quarry-lifecycle-XXXXXX";
  options.directory = mkdtemp(name);
  {
    auto first = Start(options);
    ASSERT_TRUE(first.ok()) << first.status();
    (*first)->Kill();
    EXPECT_EQ(access((*first)->socket_path().c_str(), F_OK), 0);
  }
  auto second = Start(options);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_TRUE((*testing::ConnectTo((*second)->socket_path()))->Nop().ok());
  const std::string socket = (*second)->socket_path();
  EXPECT_EQ((*second)->Stop(), 0);
  EXPECT_NE(access(socket.c_str(), F_OK), 0);
  EXPECT_EQ(std::system(("rm -r " + options.directory).c_str()), 0);
}

TEST(DaemonLifecycleTest, AWrongConfigurationOrCommandLineExitsWithTwoAndSaysWhy) {
  std::string error;
  char name[] = "/tmp/quarry-lifecycle-XXXXXX";
  const int fd = mkstemp(name);
  const std::string toml = "[shm]\nmax_channels = \"many\"\n";
  ASSERT_EQ(write(fd, toml.data(), toml.size()), static_cast<ssize_t>(toml.size()));
  EXPECT_EQ(RunToEnd({"--config", name}, &error), 2);
  EXPECT_THAT(error, HasSubstr("shm.max_channels"));
  EXPECT_THAT(error, HasSubstr("many"));
  EXPECT_EQ(RunToEnd({"--config", name, "--check-config"}, &error), 2);
  EXPECT_EQ(RunToEnd({"--config", "/nonexistent.toml"}, &error), 2);
  EXPECT_THAT(error, HasSubstr("/nonexistent.toml"));
  for (const std::string size : {"lots", "-1"}) {
    EXPECT_EQ(RunToEnd({"--arena-bytes", size}, &error), 2);
    EXPECT_THAT(error, HasSubstr("--arena-bytes: \"" + size + "\""));
  }
  EXPECT_EQ(RunToEnd({"--no-such-flag"}, &error), 2);
  EXPECT_EQ(RunToEnd({"--check-config"}, &error), 0);
  EXPECT_EQ(RunToEnd({"--help"}, &error), 0);
  close(fd);
  unlink(name);
}

TEST(DaemonLifecycleTest, AnIdleDaemonUsesAtMostOnePercentOfACore) {
  DaemonOptions options;
  options.arguments = {"--metrics", "127.0.0.1:0"};
  auto daemon = Start(options);
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  auto client = testing::ConnectTo((*daemon)->socket_path());
  ASSERT_TRUE(client.ok());
  (*client)->Arm();  // and then nothing: it counts as unarmed after a while
  ASSERT_TRUE((*client)->Nop().ok());
  absl::SleepFor(absl::Milliseconds(300));
  constexpr absl::Duration kWindow = absl::Seconds(3);
  const absl::Duration before = (*daemon)->CpuTime();
  absl::SleepFor(kWindow);  // the measured window itself
  const absl::Duration used = (*daemon)->CpuTime() - before;
  std::printf("idle: %s of %s\n", absl::FormatDuration(used).c_str(),
              absl::FormatDuration(kWindow).c_str());
  EXPECT_LE(used, kWindow / 100);
}

TEST(DaemonLifecycleTest, SigtermFinishesRequestsInFlightAndExitsWithZero) {
  auto daemon = Start();
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const ModelSpec spec = testing::SmallSpec();
  const testing::KvData data(spec.shape, 900, 3);
  auto client = testing::ConnectTo((*daemon)->socket_path());
  ASSERT_TRUE(client.ok());
  auto opened = (*client)->Open(testing::OpenFor(spec, data, 1024));
  ASSERT_TRUE(opened.ok());
  ASSERT_TRUE(testing::AppendTokens(client->get(), opened->context, data, 0, 900).ok());
  std::atomic<bool> started{false};
  absl::Status last;
  int answered = 0, wrong = 0;
  std::thread worker([&] {
    for (uint32_t seed = 0; last.ok(); ++seed) {
      OneRow row(spec.shape, opened->context, 0, {0, 900}, seed);
      last = row.Run(client->get());
      started = true;
      if (!last.ok()) break;
      ++answered;
      if (!(row.Error(data) < 1e-3)) ++wrong;
    }
  });
  while (!started) std::this_thread::yield();
  EXPECT_EQ((*daemon)->Stop(), 0) << (*daemon)->Log();
  worker.join();
  EXPECT_TRUE(absl::IsUnavailable(last)) << last;
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(answered, 0);
  EXPECT_THAT((*daemon)->Log(), HasSubstr("event=\"draining\""));
  EXPECT_THAT((*daemon)->Log(), HasSubstr("event=\"stopped\""));
}

TEST(DaemonLifecycleTest, AnAdministratorsDrainEndsTheDaemon) {
  auto daemon = Start();
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const auto channel =
      grpc::CreateChannel("unix:" + (*daemon)->grpc_path(), grpc::InsecureChannelCredentials());
  grpc::ClientContext context;
  quarry::v1::DrainReply reply;
  ASSERT_TRUE(quarry::v1::Admin::NewStub(channel)
                  ->Drain(&context, quarry::v1::DrainRequest(), &reply)
                  .ok());
  EXPECT_TRUE(testing::Eventually([&] { return !(*daemon)->Running(); }));
  EXPECT_THAT((*daemon)->Log(), HasSubstr("Admin.Drain"));
}

TEST(DaemonLifecycleTest, HangUpIsIgnored) {
  auto daemon = Start();
  ASSERT_TRUE(daemon.ok());
  (*daemon)->Signal(SIGHUP);
  auto client = testing::ConnectTo((*daemon)->socket_path());
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_TRUE((*client)->Nop().ok());
  EXPECT_TRUE((*daemon)->Running());
}

TEST(DaemonLifecycleTest, LogsAreJsonWhenAsked) {
  DaemonOptions options;
  options.config = "[log]\nformat = \"json\"\n";
  auto daemon = Start(options);
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  EXPECT_EQ((*daemon)->Stop(), 0);
  EXPECT_THAT((*daemon)->Log(), HasSubstr("\"event\":\"ready\",\"pid\":"));
}

}  // namespace
}  // namespace quarry

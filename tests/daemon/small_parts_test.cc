// Logs, metrics, tenants, the bulk pool and owned sockets.
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <limits>
#include <thread>

#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/notification.h"
#include "daemon/bulk_pool.h"
#include "daemon/ip_address.h"
#include "daemon/latency_histogram.h"
#include "daemon/log.h"
#include "daemon/metrics.h"
#include "daemon/peer_tenant.h"
#include "daemon/unix_socket.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/daemon/server_fixture.h"

namespace quarry {
namespace {

using ::testing::AllOf;
using testing::FakeEngine;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::TempDirectory;

std::string Message(const absl::Status& s) { return std::string(s.message()); }

TEST(LogTest, TextQuotesWhatNeedsIt) {
  EXPECT_EQ(FormatLogLine(LogOptions::Format::kText, LogLevel::kInfo, "client gone",
                          {{"n", 3}, {"plain", "abc"}, {"text", "a b=\"c\"\n\x1b"}, {"on", true}}),
            "level=info event=\"client gone\" n=3 plain=abc text=\"a b=\\\"c\\\"\\n\\u001b\" "
            "on=true");
}

TEST(LogTest, JsonLinesParse) {
  const std::string line = "{" + FormatLogLine(LogOptions::Format::kJson, LogLevel::kError, "x\"y",
                                               {{"n", -3},
                                                {"d", 1.5},
                                                {"nan", std::numeric_limits<double>::quiet_NaN()},
                                                {"text", "\xff\x01\\"},
                                                {"status", absl::NotFoundError("gone")}});
  const auto json = nlohmann::json::parse(line);
  EXPECT_EQ(json["level"], "error");
  EXPECT_EQ(json["event"], "x\"y");
  EXPECT_EQ(json["n"], -3);
  EXPECT_EQ(json["status"], "NOT_FOUND: gone");
}

TEST(LatencyHistogramTest, BucketsAreCumulativeAndTheLastIsTheCount) {
  LatencyHistogram histogram;
  EXPECT_EQ(histogram.Read().Quantile(0.5), 0);
  for (const uint64_t ns : {0ull, 1000ull, 1001ull, 2000ull, 2001ull, 1ull << 60}) {
    histogram.Observe(ns);
  }
  const auto s = histogram.Read();
  EXPECT_EQ(s.cumulative[0], 2u);  // up to 1 us
  EXPECT_EQ(s.cumulative[1], 4u);  // up to 2 us
  EXPECT_EQ(s.cumulative[2], 5u);
  EXPECT_EQ(s.cumulative[LatencyHistogram::kBounds - 1], 5u);
  EXPECT_EQ(s.count(), 6u);
  EXPECT_DOUBLE_EQ(s.Quantile(0.0), 1e-6);
  EXPECT_DOUBLE_EQ(s.Quantile(0.5), 2e-6);
}

TEST(MetricsTest, FlatNamesFollowTheScheme) {
  FakeEngine engine;
  Metrics metrics(engine, [] { return 12.5; });
  metrics.counters().shm_requests[7] = 3;
  metrics.counters().shm_attend.Observe(1500);
  const auto flat = metrics.Flat();
  for (const auto& [name, value] : flat) EXPECT_THAT(name, ::testing::StartsWith("quarry_"));
  EXPECT_EQ(flat.at("quarry_daemon_uptime_seconds"), 12.5);
  EXPECT_EQ(flat.at("quarry_shm_requests_total{opcode=\"nop\"}"), 3);
  EXPECT_EQ(flat.at("quarry_shm_attend_latency_seconds_count"), 1);
  EXPECT_EQ(flat.at("quarry_shm_attend_latency_seconds_bucket{le=\"1e-06\"}"), 0);
  EXPECT_EQ(flat.at("quarry_shm_attend_latency_seconds_bucket{le=\"2e-06\"}"), 1);
}

// What a scraper reads over HTTP.
FileDescriptor ConnectTo(int port) {
  FileDescriptor fd(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) fd.Reset();
  return fd;
}

std::string Scrape(int port) {
  const FileDescriptor fd = ConnectTo(port);
  if (!fd.valid()) return "";
  const std::string get = "GET /metrics HTTP/1.0\r\n\r\n";
  if (send(fd.get(), get.data(), get.size(), 0) < 0) return "";
  std::string page;
  char buffer[4096];
  for (ssize_t n; (n = recv(fd.get(), buffer, sizeof(buffer), 0)) > 0;) {
    page.append(buffer, static_cast<size_t>(n));
  }
  return page;
}

class EngineWithArena : public FakeEngine {
 public:
  EngineStats Stats() const override {
    EngineStats stats;
    stats.store.arena = {.capacity_bytes = 1,
                         .extent_bytes = 2,
                         .used_bytes = 3,
                         .extents = 4,
                         .huge_page_bytes = 5,
                         .spare_bytes = 6,
                         .committed_bytes = 7,
                         .given_back_bytes = 8,
                         .huge_page_fallbacks = 9};
    return stats;
  }
};

TEST(MetricsTest, EveryFigureOfTheArenaIsShownUnderItsName) {
  EngineWithArena engine;
  const auto flat = Metrics(engine, [] { return 1.0; }).Flat();
  std::map<std::string, double> arena;
  for (const auto& [name, value] : flat) {
    if (name.starts_with("quarry_arena_")) arena[name.substr(sizeof("quarry_arena_") - 1)] = value;
  }
  EXPECT_EQ(arena, (std::map<std::string, double>{{"capacity_bytes", 1},
                                                  {"extent_bytes", 2},
                                                  {"used_bytes", 3},
                                                  {"extents_count", 4},
                                                  {"huge_page_bytes", 5},
                                                  {"spare_bytes", 6},
                                                  {"committed_bytes", 7},
                                                  {"given_back_bytes_total", 8},
                                                  {"huge_page_fallbacks_total", 9}}));
}

TEST(MetricsTest, ThePageShowsWhatFlatShows) {
  FakeEngine engine;
  Metrics metrics(engine, [] { return 1.0; });
  metrics.counters().shm_requests[3] = 42;
  metrics.counters().shm_attend.Observe(1500);
  auto server = MetricsServer::Start({"127.0.0.1:0", false}, metrics);
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string page = Scrape((*server)->port());
  EXPECT_THAT(page, HasSubstr("quarry_shm_requests_total{opcode=\"attend\"} 42"));
  EXPECT_THAT(page, HasSubstr("# TYPE quarry_shm_attend_latency_seconds histogram"));
  EXPECT_THAT(page, HasSubstr("quarry_shm_attend_latency_seconds_count 1"));
  EXPECT_THAT(page, HasSubstr("# TYPE quarry_store_hits_total counter"));
  EXPECT_THAT(page, HasSubstr("# TYPE quarry_arena_used_bytes gauge"));
}

HeadAudit AuditOf(std::string model, uint32_t kv_head, uint64_t audits) {
  HeadAudit audit{std::move(model), 2, kv_head, {}};
  audit.figures.audits = audits;
  audit.figures.error_sum = 0.25 * static_cast<double>(audits);
  return audit;
}

TEST(MetricsTest, AuditsAreOnThePageByModelLayerAndHeadButNotAmongWhatAnyTenantMayAsk) {
  FakeEngine engine;
  engine.SetAuditsOfAllTenants({AuditOf("llama", 0, 3), AuditOf("llama", 1, 4)});
  Metrics metrics(engine, [] { return 1.0; });
  auto server = MetricsServer::Start({"127.0.0.1:0", false}, metrics);
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string page = Scrape((*server)->port());
  EXPECT_THAT(page, HasSubstr("quarry_audit_answers_total{model=\"llama\",layer=\"2\","
                              "kv_head=\"1\"} 4"));
  EXPECT_THAT(page, HasSubstr("quarry_audit_output_error_ratio{model=\"llama\",layer=\"2\","
                              "kv_head=\"0\"} 0.25"));
  EXPECT_THAT(page, HasSubstr("# TYPE quarry_audit_answers_total counter"));
  EXPECT_THAT(page, Not(HasSubstr("quarry_audit_recall_ratio")));  // no audit has one
  const auto flat = metrics.Flat();
  EXPECT_TRUE(flat.contains("quarry_audit_done_total"));
  for (const auto& [name, value] : flat) EXPECT_THAT(name, Not(HasSubstr("llama")));
}

TEST(MetricsTest, AuditsOfManyModelsAndHeadsAreBounded) {
  FakeEngine engine;
  std::vector<HeadAudit> audits;
  for (int model = 10; model < 30; ++model) {
    for (uint32_t head = 0; head < 1500; ++head) {
      audits.push_back(AuditOf(std::to_string(model), head, static_cast<uint64_t>(model)));
    }
  }
  engine.SetAuditsOfAllTenants(audits);
  std::map<std::string, size_t> heads_of;
  for (const MetricSample& sample : Metrics(engine, [] { return 1.0; }).CollectAudits()) {
    if (sample.name == "quarry_audit_answers_total") ++heads_of[sample.labels.front().second];
  }
  EXPECT_EQ(heads_of.size(), 8u);
  for (const auto& [model, heads] : heads_of) {
    EXPECT_GE(model, "22");  // the most audited
    EXPECT_EQ(heads, 1024u);
  }
}

TEST(MetricsTest, SilentConnectionsHoldThePageUpForSecondsAtMost) {
  FakeEngine engine;
  Metrics metrics(engine, [] { return 1.0; });
  auto server = MetricsServer::Start({"127.0.0.1:0", false}, metrics);
  ASSERT_TRUE(server.ok()) << server.status();
  std::vector<FileDescriptor> silent;
  for (int i = 0; i < 6; ++i) silent.push_back(ConnectTo((*server)->port()));
  const absl::Time start = absl::Now();
  EXPECT_THAT(Scrape((*server)->port()), HasSubstr("quarry_arena_used_bytes"));
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
}

TEST(MetricsTest, APortInUseIsRefusedNamingIt) {
  FakeEngine engine;
  Metrics metrics(engine, [] { return 1.0; });
  auto first = MetricsServer::Start({"127.0.0.1:0", false}, metrics);
  ASSERT_TRUE(first.ok());
  const std::string address = "127.0.0.1:" + std::to_string((*first)->port());
  const auto second = MetricsServer::Start({address, false}, metrics);
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(Message(second.status()), HasSubstr(address));
}

TEST(PeerTenantsTest, UsersMapToTenantsAndStrangersToTheirOwn) {
  PeerTenantOptions options;
  options.tenants = {{1000, "alice"}, {1001, "alice"}, {1002, "bob"}};
  options.admins = {1002};
  const PeerTenants tenants(options, /*own_user=*/500);
  EXPECT_EQ(tenants.OfUser(1000)->tenant, "alice");
  EXPECT_EQ(tenants.OfUser(1001)->tenant, "alice");
  EXPECT_FALSE(tenants.OfUser(1000)->admin);
  EXPECT_TRUE(tenants.OfUser(1002)->admin);
  EXPECT_EQ(tenants.OfUser(500)->tenant, "uid-500");
  EXPECT_TRUE(tenants.OfUser(500)->admin);
  EXPECT_EQ(tenants.OfUser(7)->tenant, "uid-7");
}

TEST(PeerTenantsTest, UnknownUsersCanBeRefused) {
  PeerTenantOptions options;
  options.refuse_unknown_users = true;
  EXPECT_EQ(PeerTenants(options, 0).OfUser(7).status().code(), absl::StatusCode::kPermissionDenied);
}

TEST(PeerTenantsTest, ACertificateCannotNameAUsersTenant) {
  const PeerTenants tenants({}, 0);
  EXPECT_EQ(tenants.OfCertificate("node-7.example")->tenant, "node-7.example");
  EXPECT_FALSE(tenants.OfCertificate("node-7.example")->admin);
  for (const char* bad : {"uid-0", "", "a b", "a/b", "\xc3\xa4"}) {
    EXPECT_EQ(tenants.OfCertificate(bad).status().code(), absl::StatusCode::kUnauthenticated)
        << bad;
  }
}

TEST(IpAddressTest, KnowsLoopbackAndRefusesNames) {
  EXPECT_TRUE(ParseIpAddress("127.0.0.1:1")->loopback);
  EXPECT_TRUE(ParseIpAddress("127.9.9.9:1")->loopback);
  EXPECT_TRUE(ParseIpAddress("[::1]:0")->loopback);
  EXPECT_FALSE(ParseIpAddress("0.0.0.0:1")->loopback);
  EXPECT_FALSE(ParseIpAddress("[::]:1")->loopback);
  EXPECT_FALSE(ParseIpAddress("[::ffff:127.0.0.1]:1")->loopback);
  for (const char* bad :
       {"", ":", "127.0.0.1", "127.1:1", "localhost:1", "::1:1", "[::1]", "1.2.3.4:-1"}) {
    EXPECT_FALSE(ParseIpAddress(bad).ok()) << bad;
  }
}

TEST(BulkPoolTest, AFullQueueRefusesAndARunningTaskDoesNotCount) {
  absl::Notification running, release;
  std::atomic<int> ran{0};
  {
    BulkPool pool({.threads = 1, .queue = 2});
    ASSERT_TRUE(pool.TrySubmit([&] {
      running.Notify();
      release.WaitForNotification();
      ++ran;
    }));
    running.WaitForNotification();
    EXPECT_TRUE(pool.TrySubmit([&] { ++ran; }));
    EXPECT_TRUE(pool.TrySubmit([&] { ++ran; }));
    EXPECT_FALSE(pool.TrySubmit([&] { ++ran; }));
    release.Notify();
  }
  EXPECT_EQ(ran, 3);
}

TEST(UnixListenerTest, ASecondOwnerIsRefusedNamingPathAndPid) {
  const TempDirectory directory;
  const std::string path = directory.path() + "/s";
  auto first = UnixListener::Listen({path, SOCK_SEQPACKET, 0600});
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = UnixListener::Listen({path, SOCK_SEQPACKET, 0600});
  ASSERT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Message(second.status()),
              AllOf(HasSubstr(path), HasSubstr(std::to_string(getpid()))));
  first->reset();
  EXPECT_TRUE(UnixListener::Listen({path, SOCK_SEQPACKET, 0600}).ok());
}

TEST(UnixListenerTest, TheSocketOfADeadOwnerIsReplaced) {
  const TempDirectory directory;
  const std::string path = directory.path() + "/s";
  const pid_t child = fork();
  if (child == 0) {
    auto listener = UnixListener::Listen({path, SOCK_STREAM, 0600});
    _exit(listener.ok() ? 0 : 1);  // no destructor: the file stays
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);
  ASSERT_EQ(access(path.c_str(), F_OK), 0);
  EXPECT_TRUE(UnixListener::Listen({path, SOCK_STREAM, 0600}).ok());
}

TEST(UnixListenerTest, ASocketSomebodyElseServesAndAPlainFileAreLeftAlone) {
  const TempDirectory directory;
  const std::string path = directory.path() + "/s";
  {
    const FileDescriptor other(socket(AF_UNIX, SOCK_STREAM, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    ASSERT_EQ(bind(other.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    ASSERT_EQ(listen(other.get(), 1), 0);
    EXPECT_FALSE(UnixListener::Listen({path, SOCK_STREAM, 0600}).ok());
    EXPECT_FALSE(UnixListener::Listen({path, SOCK_SEQPACKET, 0600}).ok());
  }
  const std::string file = directory.path() + "/file";
  std::ofstream(file) << "precious";
  EXPECT_FALSE(UnixListener::Listen({file, SOCK_STREAM, 0600}).ok());
  EXPECT_EQ(access(file.c_str(), F_OK), 0);
}

TEST(UnixListenerTest, TheFileHasTheWantedModeWhateverTheUmask) {
  const TempDirectory directory;
  const std::string path = directory.path() + "/s";
  const mode_t before = umask(0077);
  auto listener = UnixListener::Listen({path, SOCK_STREAM, 0666});
  umask(before);
  ASSERT_TRUE(listener.ok());
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0666u);
}

TEST(UnixListenerTest, APathThatIsTooLongIsInvalid) {
  EXPECT_EQ(
      UnixListener::Listen({"/tmp/" + std::string(200, 'x'), SOCK_STREAM, 0600}).status().code(),
      absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace quarry

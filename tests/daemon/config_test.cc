#include "daemon/config.h"

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/default_socket.h"

namespace quarry {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string ErrorOf(const std::string& toml) {
  const auto config = ParseConfig(toml, "test.toml");
  EXPECT_FALSE(config.ok()) << toml;
  return config.ok() ? "" : std::string(config.status().message());
}

// toml++ and we quote differently.
std::string Unquoted(std::string text) {
  std::erase_if(text, [](char c) { return c == '"' || c == '\''; });
  return text;
}

TEST(ConfigTest, EmptyTextGivesTheDefaultsAndTheyAreValid) {
  const auto config = ParseConfig("", "test.toml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(PrintConfig(*config), PrintConfig(DefaultConfig()));
  EXPECT_TRUE(ValidateConfig(DefaultConfig()).ok());
}

TEST(ConfigTest, PrintedConfigurationReadsBackToTheSame) {
  Config config = DefaultConfig();
  config.engine.arena.capacity_bytes = 3ull << 30;
  config.engine.arena.huge_pages = ArenaOptions::HugePages::kNever;
  config.shm.socket = "/tmp/with \"quotes\" and \\.sock";
  config.shm.socket_mode = 0666;
  config.tenants.tenants = {{1000, "alice"}, {1001, "bob"}};
  config.tenants.admins = {7, 8};
  config.tenants.refuse_unknown_users = true;
  config.metrics.listen = "";
  config.log.format = LogOptions::Format::kJson;
  config.grpc.listen = "127.0.0.1:5000";
  config.grpc.tcp_tenant = "local";
  const std::string printed = PrintConfig(config);
  const auto read = ParseConfig(printed, "printed");
  ASSERT_TRUE(read.ok()) << read.status() << "\n" << printed;
  EXPECT_EQ(PrintConfig(*read), printed);
  EXPECT_EQ(read->tenants.tenants.at(1001), "bob");
  EXPECT_EQ(read->shm.socket_mode, 0666u);
  EXPECT_EQ(read->shm.socket, config.shm.socket);
}

TEST(ConfigTest, LimitsOfSpareMemoryAndPinsAreReadAndMayBeZero) {
  auto config = ParseConfig(
      "[engine]\narena_bytes = \"128MiB\"\nspare_bytes = \"64MiB\"\nmax_pins_per_tenant = 3\n",
      "t");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->engine.arena.spare_bytes, 64ull << 20);
  EXPECT_EQ(config->engine.max_pins_per_tenant, 3u);
  config = ParseConfig("[engine]\nspare_bytes = 0\nmax_pins_per_tenant = 0\n", "t");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->engine.arena.spare_bytes, 0u);
  EXPECT_EQ(config->engine.max_pins_per_tenant, 0u);
  EXPECT_THAT(ErrorOf("[engine]\nspare_bytes = \"65TiB\"\n"), HasSubstr("0B\" to \"64TiB"));
}

TEST(ConfigTest, EvictionIsConfigured) {
  EXPECT_EQ(DefaultConfig().engine.eviction.kind, EvictionKind::kLru);
  const auto config = ParseConfig(
      "[eviction]\npolicy = \"cost\"\nrecompute_bytes_per_s = \"2GiB\"\n"
      "recompute_doubling_blocks = 64\n",
      "t");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->engine.eviction.kind, EvictionKind::kCost);
  EXPECT_EQ(config->engine.eviction.recompute_bytes_per_s, 2ull << 30);
  EXPECT_EQ(config->engine.eviction.recompute_doubling_blocks, 64u);
  EXPECT_EQ(ParseConfig("[eviction]\npolicy = \"s3-fifo\"\n", "t")->engine.eviction.kind,
            EvictionKind::kS3Fifo);
  EXPECT_THAT(ErrorOf("[eviction]\npolicy = \"fifo\"\n"),
              HasSubstr("must be \"lru\" or \"s3-fifo\" or \"cost\""));
}

TEST(ConfigTest, AuditsAreConfigured) {
  const auto config =
      ParseConfig("[audit]\nfraction = 0.1\nthreads = 2\nqueue = 5\ndrift_factor = 3\n", "t");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->engine.audit.fraction, 0.1);
  EXPECT_EQ(config->engine.audit.threads, 2u);
  EXPECT_EQ(config->engine.audit.queue, 5u);
  EXPECT_EQ(config->engine.audit.drift_factor, 3);
  EXPECT_THAT(PrintConfig(*config), HasSubstr("\n[audit]\nfraction = 0.1\nthreads = 2\nqueue = 5\n"
                                              "drift_factor = 3\n"));
  EXPECT_TRUE(ParseConfig("[audit]\nfraction = 0\n", "t").ok());
  for (const char* wrong : {"1.5", "-0.1", "nan", "\"all\"", "true"}) {
    EXPECT_THAT(ErrorOf(std::string("[audit]\nfraction = ") + wrong + "\n"),
                AllOf(HasSubstr("audit.fraction"), HasSubstr("must be a number from 0 to 1")));
  }
  Config overridden = DefaultConfig();
  overridden.engine.audit.drift_factor = 0;
  EXPECT_THAT(std::string(ValidateConfig(overridden).message()),
              HasSubstr("audit.drift_factor = 0: must be from 0.01 to 1000"));
}

TEST(ConfigTest, SizesAreStringsWithUnitsOrIntegers) {
  const auto config =
      ParseConfig("[engine]\narena_bytes = \"2GiB\"\nextent_bytes = 33554432\n", "test.toml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->engine.arena.capacity_bytes, 2ull << 30);
  EXPECT_EQ(config->engine.arena.extent_bytes, 32ull << 20);
  EXPECT_EQ(*ParseBytes("4 KiB"), 4096u);
  EXPECT_EQ(*ParseBytes("17B"), 17u);
  for (const char* bad : {"", "GiB", "-1", "1GB", "1.5GiB", "99999999999TiB", "4KiB4", "0x10"}) {
    EXPECT_FALSE(ParseBytes(bad).ok()) << bad;
  }
  EXPECT_EQ(PrintBytes(1536), "1536B");
  EXPECT_EQ(PrintBytes(3ull << 40), "3TiB");
}

// Every key with a value of the wrong type, and where it has a range, one outside it.
TEST(ConfigTest, EveryWrongValueIsRefusedNamingKeyAndValue) {
  struct Case {
    const char *section, *key, *value;
    const char* shown = nullptr;  // of the value, where that is only a part or is normalised
  };
  const std::vector<Case> cases = {
      {"engine", "arena_bytes", "\"4GB\""},
      {"engine", "arena_bytes", "\"1KiB\""},
      {"engine", "arena_bytes", "-1"},
      {"engine", "extent_bytes", "\"1MiB\""},
      {"engine", "spare_bytes", "\"65TiB\""},
      {"engine", "spare_bytes", "-1"},
      {"engine", "huge_pages", "\"always\""},
      {"engine", "prefault", "\"yes\""},
      {"engine", "max_contexts", "0"},
      {"engine", "max_sessions", "70000"},
      {"engine", "max_pinned_bytes_per_tenant", "true"},
      {"engine", "max_pins_per_tenant", "-1"},
      {"engine", "max_pins_per_tenant", "1048577"},
      {"engine", "executor_threads", "-2"},
      {"engine", "run_tokens", "8191"},
      {"engine", "first_run_token", "\"x\""},
      {"engine", "task_tokens", "1"},
      {"engine", "task_tokens", "300"},
      {"engine", "inline_bytes", "\"2GiB\""},
      {"engine", "max_attend_scratch_bytes", "\"1MiB\""},
      {"engine", "max_queued_batches", "0"},
      {"engine", "max_leases_per_session", "0"},
      {"engine", "max_context_tokens", "1"},
      {"shm", "socket", "3"},
      {"shm", "socket", "\"\""},
      {"shm", "socket", "\"relative.sock\""},
      {"shm", "socket_mode", "660"},
      {"shm", "socket_mode", "\"0888\""},
      {"shm", "socket_mode", "\"0066\"", "066"},
      {"shm", "max_channels", "0"},
      {"shm", "max_total_bytes", "\"16MiB\""},
      {"shm", "default_slots", "65"},
      {"shm", "max_slots", "257"},
      {"shm", "default_slot_bytes", "\"65MiB\""},
      {"shm", "max_slot_bytes", "\"1MiB\""},
      {"shm", "armed_idle_ms", "0"},
      {"shm", "linger_us", "20000"},
      {"shm", "hello_timeout_ms", "1"},
      {"shm", "bulk_threads", "0"},
      {"shm", "bulk_queue", "0"},
      {"shm", "bulk_queue_per_client", "300"},
      {"grpc", "socket", "\"no/slash\""},
      {"grpc", "socket_mode", "\"\""},
      {"grpc", "listen", "\"localhost:5000\""},
      {"grpc", "listen", "\"0.0.0.0:5000\""},
      {"grpc", "listen", "\"127.0.0.1:99999\""},
      {"grpc", "tcp_tenant", "1"},
      {"grpc", "tls_certificate", "1.5"},
      {"grpc", "tls_key", "1"},
      {"grpc", "tls_client_ca", "1"},
      {"grpc", "max_message_bytes", "\"1KiB\""},
      {"grpc", "max_put_bytes", "1"},
      {"grpc", "threads", "0"},
      {"grpc", "queue", "0"},
      {"grpc", "max_calls_per_tenant", "-1"},
      {"grpc", "max_connections", "0"},
      {"grpc", "max_sessions_per_tenant", "0"},
      {"tenants", "users", "3"},
      {"tenants", "users", "{ alice = \"alice\" }", "alice"},
      {"tenants", "users", "{ \"1000\" = \"uid-7\" }", "uid-7"},
      {"tenants", "users", "{ \"1000\" = \"a/b\" }", "a/b"},
      {"tenants", "refuse_unknown_users", "1"},
      {"admin", "users", "\"root\""},
      {"admin", "users", "[-1]", "-1"},
      {"metrics", "listen", "\"here\""},
      {"metrics", "listen", "\"0.0.0.0:9464\""},
      {"metrics", "allow_remote", "\"no\""},
      {"log", "level", "\"loud\""},
      {"log", "format", "\"xml\""},
      {"daemon", "drain_deadline_ms", "-1"},
  };
  for (const Case& c : cases) {
    const std::string toml = std::string("[") + c.section + "]\n" + c.key + " = " + c.value + "\n";
    const std::string error = ErrorOf(toml);
    EXPECT_THAT(error, HasSubstr("test.toml")) << toml;
    EXPECT_THAT(error, HasSubstr(std::string(c.section) + "." + c.key)) << toml;
    const std::string value = c.shown != nullptr ? c.shown : c.value;
    EXPECT_THAT(Unquoted(error), HasSubstr(" = " + Unquoted(value))) << toml;
  }
}

// The table above names every key there is.
TEST(ConfigTest, EveryKeyRefusesATableAsValueUnlessItIsOne) {
  const std::string printed = PrintConfig(DefaultConfig());
  std::string section;
  size_t keys = 0;
  for (size_t at = 0; at < printed.size();) {
    const size_t end = printed.find('\n', at);
    const std::string line = printed.substr(at, end - at);
    at = end + 1;
    if (line.empty()) continue;
    if (line[0] == '[') {
      section = line.substr(1, line.size() - 2);
      continue;
    }
    const std::string key = line.substr(0, line.find(' '));
    const std::string toml = "[" + section + "]\n" + key + " = { x = [1] }\n";
    EXPECT_THAT(ErrorOf(toml), HasSubstr(section + "." + key)) << toml;
    ++keys;
  }
  EXPECT_GE(keys, 45u);
}

TEST(ConfigTest, ValuesAreShownWithTheirLine) {
  EXPECT_THAT(ErrorOf("[log]\nlevel = \"info\"\nformat = \"xml\"\n"),
              AllOf(HasSubstr("line 3"), HasSubstr("xml"), HasSubstr("\"text\" or \"json\"")));
  EXPECT_THAT(ErrorOf("[shm]\nmax_channels = 5000\n"),
              AllOf(HasSubstr("5000"), HasSubstr("from 1 to 4096")));
}

TEST(ConfigTest, UnknownKeysAndSectionsAreErrors) {
  EXPECT_THAT(ErrorOf("[shm]\nsokcet = \"/tmp/x\"\n"),
              AllOf(HasSubstr("shm.sokcet"), HasSubstr("unknown key")));
  EXPECT_THAT(ErrorOf("[sharedmemory]\nsocket = \"/tmp/x\"\n"),
              AllOf(HasSubstr("sharedmemory"), HasSubstr("unknown key")));
  EXPECT_THAT(ErrorOf("socket = \"/tmp/x\"\n"), HasSubstr("unknown key"));
  EXPECT_THAT(ErrorOf("[[indices]]\nkind = \"codes\"\n"),
              AllOf(HasSubstr("indices"), HasSubstr("unknown key")));
}

TEST(ConfigTest, ASectionThatIsNoTableIsNotCalledUnknown) {
  for (const char* toml : {"[[index]]\nkind = \"codes\"\n", "index = 3\n"}) {
    const std::string error = ErrorOf(toml);
    EXPECT_THAT(error, AllOf(HasSubstr("line 1: index = "), HasSubstr("must be a table, [index]")));
    EXPECT_THAT(error, Not(HasSubstr("unknown")));
  }
}

TEST(ConfigTest, BrokenTomlNamesTheLine) {
  EXPECT_THAT(ErrorOf("[engine]\nspare_bytes = 1\n  arena_bytes = 99999999999999999999\n"),
              HasSubstr("line 3: arena_bytes = 99999999999999999999: "));
  EXPECT_THAT(ErrorOf("[shm]\nsocket = \n"), HasSubstr("line"));
  EXPECT_THAT(ErrorOf("[shm]\nmax_channels = 1\nmax_channels = 2\n"), HasSubstr("line 3"));
}

TEST(ConfigTest, RemoteGrpcNeedsAllThreeTlsFiles) {
  const std::string remote = "[grpc]\nlisten = \"0.0.0.0:5000\"\n";
  EXPECT_THAT(ErrorOf(remote), HasSubstr("mutual TLS"));
  EXPECT_THAT(ErrorOf(remote + "tls_certificate = \"/c\"\ntls_key = \"/k\"\n"),
              HasSubstr("grpc.tls_client_ca"));
  const auto config = ParseConfig(
      remote + "tls_certificate = \"/c\"\ntls_key = \"/k\"\ntls_client_ca = \"/a\"\n", "t");
  EXPECT_TRUE(config.ok()) << config.status();
}

TEST(ConfigTest, TheKeyOfTheDiskComesFromOnePlace) {
  const std::string disk = "[disk]\npath = \"/a\"\n";
  EXPECT_THAT(ErrorOf(disk + "key_file = \"key\"\n"),
              AllOf(HasSubstr("disk.key_file"), HasSubstr("absolute")));
  EXPECT_THAT(ErrorOf(disk + "key_file = \"/k\"\nkey_environment = \"K\"\n"),
              AllOf(HasSubstr("disk.key_environment"), HasSubstr("/k")));
  const auto config = ParseConfig(disk + "key_file = \"/k\"\n", "t");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->engine.disk.log.key.file, "/k");
}

TEST(ConfigTest, LoopbackGrpcWithoutTlsNeedsItsTenant) {
  const std::string loopback = "[grpc]\nlisten = \"[::1]:5000\"\n";
  EXPECT_THAT(ErrorOf(loopback), HasSubstr("grpc.tcp_tenant"));
  EXPECT_THAT(ErrorOf(loopback + "tcp_tenant = \"uid-0\"\n"), HasSubstr("uid-"));
  EXPECT_TRUE(ParseConfig(loopback + "tcp_tenant = \"local\"\n", "t").ok());
}

TEST(ConfigTest, BothSocketsCannotShareAPath) {
  EXPECT_THAT(ErrorOf("[shm]\nsocket = \"/tmp/q\"\n[grpc]\nsocket = \"/tmp/q\"\n"),
              HasSubstr("must differ"));
  EXPECT_THAT(ErrorOf("[shm]\nsocket = \"/" + std::string(107, 'x') + "\"\n"),
              HasSubstr("at most 107"));
}

TEST(ConfigTest, TheDefaultSocketIsWhereClientsLook) {
  EXPECT_EQ(DefaultConfig().shm.socket, DefaultSocket());
}

TEST(ConfigTest, AMissingFileIsNotFound) {
  EXPECT_EQ(ReadConfig("/nonexistent/quarryd.toml").status().code(), absl::StatusCode::kNotFound);
}

TEST(ConfigTest, ADirectoryOrAFileWithoutEndIsRefusedByName) {
  for (const std::string path : {"/", "/dev/zero"}) {
    const absl::Status status = ReadConfig(path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << path;
    EXPECT_THAT(std::string(status.message()), HasSubstr("the configuration file " + path));
  }
}

TEST(ConfigTest, TheExampleNamesEveryKeyAndHoldsTheDefaults) {
  const std::string path = QUARRY_SOURCE_DIR "/deploy/quarryd.toml";
  const auto example = ReadConfig(path);
  ASSERT_TRUE(example.ok()) << example.status();
  // Where it says that it differs.
  Config expected = DefaultConfig();
  expected.shm.socket = "/run/quarry/quarryd.sock";
  expected.grpc.socket = "/run/quarry/grpc.sock";
  expected.metrics.listen = "127.0.0.1:9464";
  EXPECT_EQ(PrintConfig(*example), PrintConfig(expected));
  std::ifstream file(path);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  std::istringstream printed(PrintConfig(expected));
  for (std::string line; std::getline(printed, line);) {
    if (line.empty()) continue;
    const std::string key = line[0] == '[' ? line : line.substr(0, line.find('=') + 1);
    EXPECT_THAT(text, HasSubstr("\n" + key));
  }
}

}  // namespace
}  // namespace quarry

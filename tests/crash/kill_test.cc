// Kills the daemon with SIGKILL at random moments under load, starts it again on the same disk, and
// looks at all that it ever had: no wrong byte, nothing lost that was durable, nothing back that
// was purged, no start that fails.
//
//   kill_test [--kills=N]     40 by default; each 40 of them begin on a new disk
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/identity.h"
#include "tests/support/daemon_process.h"
#include "tests/support/kv_client.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::DaemonProcess;

uint64_t kills = 40;
constexpr uint64_t kKillsOfADisk = 40;
constexpr size_t kMostBytes = 600000;

// Every eight bytes name their owner and their place.
std::string BytesOf(uint64_t number) {
  std::mt19937_64 random(number);
  std::string bytes(1 + random() % (number % 4 == 0 ? kMostBytes : 20000), '\0');
  for (size_t at = 0; at < bytes.size(); at += 8) {
    const uint64_t word = number << 32 | at;
    std::memcpy(bytes.data() + at, &word, std::min<size_t>(8, bytes.size() - at));
  }
  return bytes;
}

struct Oracle {
  enum class State {
    kTried,    // may be there
    kDurable,  // must be there
    kPurging,  // may be there
    kPurged,   // must not be there
  };
  std::map<uint64_t, State> blocks;
  uint64_t next = 1;
};

class KillTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = std::filesystem::temp_directory_path() / absl::StrCat("quarry-kill-", getpid());
    std::filesystem::create_directories(directory_);
  }
  void TearDown() override {
    daemon_ = nullptr;
    std::filesystem::remove_all(directory_);
  }

  void Start() {
    daemon_ = nullptr;
    testing::DaemonOptions options;
    options.config = absl::StrCat("[disk]\npath = \"", (directory_ / "disk").string(),
                                  "\"\nbytes = \"1GiB\"\nsegment_bytes = \"2MiB\"\n"
                                  "[engine]\nextent_bytes = \"4MiB\"\nspare_bytes = 0\n"
                                  "[tenants.users]\n",
                                  getuid(), " = \"tester\"\n");
    options.arguments = {"--arena-bytes", "24MiB"};  // so that most is read from the disk
    auto daemon = DaemonProcess::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
  }
  std::unique_ptr<Client> Connect() {
    auto client = testing::ConnectTo(daemon_->socket_path());
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }

  // Until the daemon is killed.
  void Load(Client* client, std::mt19937_64* random) {
    std::set<uint64_t> accepted;  // and not known to be durable
    while (true) {
      const uint64_t what = (*random)() % 16;
      if (what < 10) {
        const uint64_t number = oracle_.next++;
        oracle_.blocks[number] = Oracle::State::kTried;
        const std::string bytes = BytesOf(number);
        if (!client->Put("kill", std::to_string(number), std::as_bytes(std::span(bytes))).ok()) {
          return;
        }
        accepted.insert(number);
      } else if (what < 12) {
        // What was accepted before the queue was seen empty is durable, if all of it was admitted.
        const auto statistics = client->Statistics();
        if (!statistics.ok()) return;
        if (statistics->at("quarry_disk_queued_bytes") > 0) continue;
        if (statistics->at("quarry_disk_not_admitted_total") > 0) continue;
        for (const uint64_t number : accepted) {
          oracle_.blocks[number] = Oracle::State::kDurable;
        }
        accepted.clear();
      } else if (what < 15) {
        const uint64_t number = 1 + (*random)() % oracle_.next;
        if (!Check(client, number)) return;
      } else {
        const uint64_t number = 1 + (*random)() % oracle_.next;
        const auto found = oracle_.blocks.find(number);
        if (found == oracle_.blocks.end()) continue;
        found->second = Oracle::State::kPurging;
        accepted.erase(number);
        PurgeRequest purge;
        purge.blocks = {EngineBlockIdOf("tester", "kill", std::to_string(number))};
        if (!client->Purge(purge).ok()) return;
        found->second = Oracle::State::kPurged;
      }
    }
  }

  // False: the daemon has gone.
  bool Check(Client* client, uint64_t number) {
    const auto found = oracle_.blocks.find(number);
    const auto got = client->Get("kill", std::to_string(number));
    if (!got.ok() && !absl::IsNotFound(got.status())) return false;
    if (found == oracle_.blocks.end()) {
      EXPECT_FALSE(got.ok()) << number << " was never put";
      return true;
    }
    if (got.ok()) {
      EXPECT_TRUE(*got == BytesOf(number)) << "wrong bytes of " << number;
      EXPECT_NE(found->second, Oracle::State::kPurged) << number << " came back";
      ++right_;
    } else {
      EXPECT_NE(found->second, Oracle::State::kDurable) << number << " is lost";
    }
    return true;
  }

  std::filesystem::path directory_;
  std::unique_ptr<DaemonProcess> daemon_;
  Oracle oracle_;
  uint64_t right_ = 0;
};

TEST_F(KillTest, NothingIsWrongLostOrBackAgain) {
  std::mt19937_64 random(Seed());
  uint64_t durable = 0, purged = 0, broken = 0;
  for (uint64_t kill = 0; kill < kills && !HasFailure(); ++kill) {
    SCOPED_TRACE(absl::StrCat("kill ", kill));
    if (kill % kKillsOfADisk == 0) {
      daemon_ = nullptr;
      std::filesystem::remove(directory_ / "disk");
      oracle_ = Oracle();
    }
    Start();
    if (HasFatalFailure()) return;
    auto client = Connect();
    ASSERT_NE(client, nullptr);
    for (const auto& [number, state] : oracle_.blocks) {
      ASSERT_TRUE(Check(client.get(), number)) << "the daemon has gone by itself";
    }
    const auto statistics = client->Statistics();
    ASSERT_TRUE(statistics.ok()) << statistics.status();
    EXPECT_EQ(statistics->at("quarry_disk_dropped_blocks_total"), 0) << "the disk is too small";
    broken += static_cast<uint64_t>(statistics->at("quarry_disk_broken_blocks_total"));
    std::thread load([&] { Load(client.get(), &random); });
    absl::SleepFor(absl::Milliseconds(2 + Seed() * (kill + 1) % 97));
    daemon_->Kill();
    load.join();
    client = nullptr;
    if (kill % kKillsOfADisk + 1 != kKillsOfADisk && kill + 1 != kills) continue;
    for (const auto& [number, state] : oracle_.blocks) {
      durable += state == Oracle::State::kDurable ? 1 : 0;
      purged += state == Oracle::State::kPurged ? 1 : 0;
    }
  }
  std::printf("%lu kills: %lu blocks read and right, %lu durable, %lu purged, %lu broken\n", kills,
              right_, durable, purged, broken);
  EXPECT_EQ(broken, 0u);
  EXPECT_GT(durable, 0u);
  EXPECT_GT(purged, 0u);
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--kills=", 0) != 0) {
      std::fprintf(stderr, "kill_test: unknown argument '%s'; --kills=N is known\n", argv[i]);
      return 2;
    }
    quarry::kills = std::strtoull(argument.c_str() + 8, nullptr, 10);
  }
  return RUN_ALL_TESTS();
}

// Kills the daemon with SIGKILL at random moments under load, starts it again on the same disk, and
// looks at all that it ever had: no wrong byte, nothing lost that was durable, nothing back that
// was purged, no start that fails.
//
//   kill_test [--kills=N]     40 by default; each 40 of them begin on a new disk
#include <gtest/gtest.h>

#include <cstdlib>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/crash/crash_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

uint64_t kills = 40;
constexpr uint64_t kKillsOfADisk = 40;

using KillTest = testing::CrashTest;

TEST_F(KillTest, NothingIsWrongLostOrBackAgain) {
  std::mt19937_64 random(Seed());
  uint64_t durable = 0, purged = 0, broken = 0;
  for (uint64_t kill = 0; kill < kills && !HasFailure(); ++kill) {
    SCOPED_TRACE(absl::StrCat("kill ", kill));
    if (kill % kKillsOfADisk == 0) NewDisk("1GiB");
    const absl::Status started = TryStart();
    ASSERT_TRUE(started.ok()) << started;
    auto client = Connect();
    ASSERT_NE(client, nullptr);
    ASSERT_TRUE(CheckAll(client.get())) << "the daemon has gone by itself";
    const auto statistics = client->Statistics();
    ASSERT_TRUE(statistics.ok()) << statistics.status();
    EXPECT_EQ(statistics->at("quarry_disk_dropped_blocks_total"), 0) << "the disk is too small";
    broken += static_cast<uint64_t>(statistics->at("quarry_disk_broken_blocks_total"));
    std::thread load([&] { (void)Load(client.get(), &random); });
    absl::SleepFor(absl::Milliseconds(2 + Seed() * (kill + 1) % 97));
    daemon_->Kill();
    load.join();
    client = nullptr;
    if (kill % kKillsOfADisk + 1 != kKillsOfADisk && kill + 1 != kills) continue;
    durable += CountOf(State::kDurable);
    purged += CountOf(State::kPurged);
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

// The daemon ends itself at each of the named places of the disk tier in turn, and is started again
// on the same disk: no wrong byte, nothing lost that was durable, nothing back that was purged, no
// start that fails. A place that is not met is a failure.
//
//   QUARRY_CRASHES=N   at each place (1 by default)
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "storage/crash_point.h"
#include "storage/log/log_layout.h"
#include "tests/crash/crash_fixture.h"
#include "tests/support/eventually.h"
#include "tests/support/given_number.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

// Of a step each a block of 82 KB in the mean is put at most: enough to fill the small disk thrice.
constexpr uint64_t kSteps = 1500;

class CrashPointTest : public testing::CrashTest,
                       public ::testing::WithParamInterface<std::string> {
 protected:
  bool Of(const char* kind) const { return absl::StartsWith(GetParam(), absl::StrCat(kind, ".")); }
  // Loads, and kills it by surprise: so that there is something to recover.
  void Live(std::mt19937_64* random, uint64_t steps) {
    const absl::Status started = TryStart();
    ASSERT_TRUE(started.ok()) << started;
    auto client = Connect();
    ASSERT_NE(client, nullptr);
    ASSERT_TRUE(CheckAll(client.get()) && Load(client.get(), random, steps));
    daemon_->Kill();
  }
  // Of one copy a byte.
  void BreakSuperblock() {
    std::fstream disk(directory_ / "disk", std::ios::in | std::ios::out | std::ios::binary);
    disk.seekp(LogLayout::kFirstArea / 2 + 100);
    disk.put('x');
    ASSERT_TRUE(disk.good());
  }
  // Of one copy of the tenant's key a byte. False: it has none yet.
  bool BreakKey() {
    std::fstream disk(directory_ / "disk", std::ios::in | std::ios::out | std::ios::binary);
    std::string area(LogLayout::kAreaUnit, '\0');
    disk.seekg(LogLayout::kFirstArea);
    disk.read(area.data(), static_cast<std::streamsize>(area.size()));
    const size_t key = area.find("QRYTNKEY");
    if (key == std::string::npos) return false;
    disk.seekp(static_cast<std::streamoff>(LogLayout::kFirstArea + key + 100));
    disk.put('x');
    return disk.good();
  }
  // The daemon ends at the place.
  void CrashAt(uint64_t meeting, std::mt19937_64* random) {
    const std::string point = absl::StrCat(GetParam(), ":", meeting);
    SCOPED_TRACE(point);
    setenv("QUARRY_CRASH_POINT", point.c_str(), 1);
    const absl::Status started = TryStart();
    unsetenv("QUARRY_CRASH_POINT");
    std::string log(started.message());
    if (started.ok()) {
      // With the daemon gone, what fails is the connection.
      auto client = testing::ConnectTo(daemon_->socket_path());
      if (client.ok() && CheckAll(client->get())) (void)Load(client->get(), random, kSteps);
      // Its sockets end a little before it.
      EXPECT_TRUE(testing::Eventually([&] { return !daemon_->Running(); }))
          << "the place was not met";
      log = daemon_->Log();
    }
    EXPECT_TRUE(absl::StrContains(log, absl::StrCat("crash point ", GetParam()))) << log;
  }
};

TEST_P(CrashPointTest, NothingIsWrongLostOrBackAgain) {
  std::mt19937_64 random(Seed());
  const uint64_t crashes = GivenNumber("QUARRY_CRASHES", 1);
  const bool makes_disk = Of("disk") || Of("format");
  const bool of_keys = Of("keys") || absl::StrContains(GetParam(), ".key");
  encrypted_ = of_keys || random() % 4 == 0;
  // What only happens where blocks are dropped, needs a disk that is soon full; what is durable is
  // checked on the others.
  drops_ = Of("reclaim") || random() % 4 == 0;
  for (uint64_t crash = 0; crash < crashes && !HasFailure(); ++crash) {
    SCOPED_TRACE(absl::StrCat("crash ", crash));
    if (crash % 8 == 0 || makes_disk) NewDisk(drops_ ? "28MiB" : "256MiB");
    if (!makes_disk) Live(&random, 60);
    if (HasFatalFailure()) return;
    // At a start most places are met once.
    const bool often =
        GetParam() == "format.copy-written" || !(Of("disk") || Of("format") || Of("recovery"));
    if (GetParam() == "recovery.superblock-mended") BreakSuperblock();
    if (GetParam() == "recovery.key-mended") {
      int tries = 0;
      while (!BreakKey() && ++tries < 10) Live(&random, 60);
    }
    CrashAt(often ? 1 + random() % 3 : 1, &random);
    Live(&random, 20);
  }
  std::printf("%lu crashes: %lu blocks read and right, %lu durable, %lu purged\n", crashes, right_,
              CountOf(State::kDurable), CountOf(State::kPurged));
}

INSTANTIATE_TEST_SUITE_P(Places, CrashPointTest,
                         ::testing::ValuesIn(std::vector<std::string>(std::begin(kCrashPoints),
                                                                      std::end(kCrashPoints))),
                         [](const auto& instance) {
                           std::string name = instance.param;
                           for (char& c : name) {
                             if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
                           }
                           return name;
                         });

}  // namespace
}  // namespace quarry

// One bit of a log's disk is wrong: whatever bit it is, nothing wrong is read, what was purged
// stays away, and no more is lost than one group commit.
//
//   QUARRY_FLIP_STRIDE=N    every N-th bit of the metadata (101 by default, of an encrypted log,
//                           which takes longer to open, 503; 1: all)
//   QUARRY_PAYLOAD_FLIPS=N  random bits of blocks' bytes (10,000 by default, there 2,000)
#include <gtest/gtest.h>

#include <random>

#include <spdlog/spdlog.h>

#include "tests/storage/log/small_log.h"
#include "tests/support/given_number.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::SimulatedDisk;
using testing::SmallLog;

// Of a log that is encrypted, and of one that is not.
class LogFlipTest : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override { spdlog::set_level(spdlog::level::off); }
  void TearDown() override { spdlog::set_level(spdlog::level::info); }

  // How many blocks are missing with this bit flipped, also after another start.
  int Flip(const SimulatedDisk& whole, uint64_t bit, bool again) {
    auto disk = whole.Clone();
    disk->FlipBit(bit);
    SimulatedDisk* const raw = disk.get();
    auto log = small_.Open(std::move(disk));
    EXPECT_TRUE(log.ok()) << log.status();
    if (!log.ok()) return 0;
    const int missing = small_.Check(**log);
    if (!again) return missing;
    auto restarted = small_.Open(raw->Crashed(testing::PowerCut::kNoneKept, 1));
    EXPECT_TRUE(restarted.ok()) << restarted.status();
    if (restarted.ok()) {
      EXPECT_LE(small_.Check(**restarted), missing);
    }
    return missing;
  }

  void FlipMetadata(const SimulatedDisk& whole) {
    const uint64_t stride = GivenNumber("QUARRY_FLIP_STRIDE", GetParam() ? 503 : 101);
    constexpr uint64_t kBits = kSectorBytes * 8;
    const std::vector<uint64_t> sectors = SmallLog::MetadataSectors(whole);
    uint64_t flips = 0, costly = 0;
    for (uint64_t i = Seed() % stride; i < sectors.size() * kBits; i += stride) {
      const uint64_t bit = sectors[i / kBits] * kBits + i % kBits;
      const int missing = Flip(whole, bit, flips++ % 64 == 0);
      costly += missing > 0 ? 1 : 0;
      ASSERT_LE(missing, 2) << "bit " << bit;  // the largest group commit
      ASSERT_FALSE(HasFailure()) << "bit " << bit;
    }
    std::printf("%lu bits of %zu sectors flipped, %lu of them cost blocks\n", flips, sectors.size(),
                costly);
    EXPECT_GT(costly, 0u) << "no flip was of anything that counts";
  }

  const SmallLog small_{GetParam()};
};

TEST_P(LogFlipTest, WithoutDamageAllIsThere) {
  for (const auto make : {&SmallLog::Stopped, &SmallLog::Sealed}) {
    auto log = small_.Open((small_.*make)());
    ASSERT_TRUE(log.ok()) << log.status();
    EXPECT_EQ(small_.Check(**log), 0);
  }
}

TEST_P(LogFlipTest, MetadataOfALogAfterAStop) { FlipMetadata(*small_.Stopped()); }

TEST_P(LogFlipTest, MetadataOfALogOfSealedSegments) { FlipMetadata(*small_.Sealed()); }

TEST_P(LogFlipTest, BytesOfBlocks) {
  const auto whole = small_.Sealed();
  const std::vector<uint64_t> sectors = SmallLog::PayloadSectors(*whole);
  std::mt19937_64 random(Seed());
  const uint64_t flips = GivenNumber("QUARRY_PAYLOAD_FLIPS", GetParam() ? 2000 : 10000);
  uint64_t costly = 0;
  for (uint64_t i = 0; i < flips; ++i) {
    const uint64_t bit =
        sectors[random() % sectors.size()] * kSectorBytes * 8 + random() % (kSectorBytes * 8);
    const int missing = Flip(*whole, bit, false);
    costly += missing > 0 ? 1 : 0;
    ASSERT_LE(missing, 1) << "bit " << bit;
    ASSERT_FALSE(HasFailure()) << "bit " << bit;
  }
  // The others were of zeros behind a block's end, of earlier versions or of what was purged.
  std::printf("%lu of %lu flips cost a block\n", costly, flips);
  EXPECT_GT(costly, flips / 3);
}

INSTANTIATE_TEST_SUITE_P(Logs, LogFlipTest, ::testing::Bool(), [](const auto& instance) {
  return instance.param ? "Encrypted" : "Plain";
});

}  // namespace
}  // namespace quarry

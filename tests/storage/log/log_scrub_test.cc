// Looking through the log: what is found, what is left alone, and what goes on meanwhile.
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "tests/storage/disk/hooked_disk.h"
#include "tests/storage/disk/simulated_disk.h"
#include "tests/storage/log/log_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::AppendOne;
using testing::OwnedBlock;
using testing::ReadVersion;

constexpr uint64_t kSegment = 256 << 10;
constexpr LogLayout kLayout{kSegment, 12};

class LogScrubTest : public ::testing::Test {
 protected:
  void SetUp() override { Open(); }
  // What was open is sealed.
  void Open() {
    log_ = nullptr;
    BlockLogOptions options;
    options.segment_bytes = kSegment;
    options.max_part_bytes = 32 << 10;
    auto log = BlockLog::Open(std::make_unique<testing::HookedDisk>(&disk_, &hooks_), options);
    ASSERT_TRUE(log.ok()) << log.status();
    log_ = *std::move(log);
  }
  // Returns the bytes read.
  uint64_t OnePass() {
    uint64_t bytes = 0;
    for (ScrubStep step; !step.ends_pass; bytes += step.bytes) step = log_->ScrubNext();
    return bytes;
  }
  // A bit of the block's bytes at an offset that only it has.
  void Break(const OwnedBlock& block, uint64_t offset) {
    const uint64_t word = block.WordAt(offset);
    for (uint64_t at = kLayout.SegmentOffset(0); at < kLayout.AreaOffset(1); at += 8) {
      if (std::memcmp(disk_.Peek(at, 8).data(), &word, 8) == 0) disk_.FlipBit(at * 8 + 3);
    }
  }
  std::vector<uint64_t> Frames(const char* magic) {
    std::vector<uint64_t> out;
    for (uint64_t at = kLayout.SegmentOffset(0); at < kLayout.AreaOffset(1); at += kSectorBytes) {
      if (std::memcmp(disk_.Peek(at, 8).data(), magic, 8) == 0) out.push_back(at);
    }
    return out;
  }

  testing::SimulatedDisk disk_{{.bytes = kLayout.bytes(), .seed = Seed()}};
  testing::DiskHooks hooks_;
  std::unique_ptr<BlockLog> log_;
};

TEST_F(LogScrubTest, APassReadsAllThatIsSealed) {
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < 20; ++i) {
    ASSERT_TRUE(AppendOne(*log_, {0, i, 1, 50000}).ok());
    bytes += 50000;
  }
  Open();
  EXPECT_GE(OnePass(), bytes);
  BlockLogStats stats = log_->Stats();
  EXPECT_GE(stats.scrubbed_bytes, bytes);
  EXPECT_LT(stats.scrubbed_bytes, bytes * 3 / 2);
  EXPECT_EQ(stats.scrub_passes, 1u);
  EXPECT_EQ(stats.scrubbed_segments, 12u);
  EXPECT_EQ(stats.scrub_broken + stats.scrub_read_errors, 0u);
  EXPECT_EQ(stats.read_blocks, 0u) << "it is nobody's read";
  OnePass();
  EXPECT_EQ(log_->Stats().scrub_passes, 2u);
  EXPECT_EQ(log_->Stats().blocks, 20u);
}

// In the last of a block's parts: one pass, one finding, and it is gone before anybody asks.
TEST_F(LogScrubTest, ABrokenPartIsFoundAndItsBlockDropped) {
  for (uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(AppendOne(*log_, {0, i, 1, 100000}).ok());
  Open();
  Break({0, 1, 1, 100000}, 99000);
  OnePass();
  EXPECT_EQ(log_->Stats().scrub_broken, 1u);
  EXPECT_EQ(log_->Stats().broken_blocks, 1u);
  EXPECT_FALSE(log_->Find("tenant-0", OwnedBlock{0, 1}.key().id).has_value());
  EXPECT_EQ(*ReadVersion(*log_, {0, 0}), 1u);
  EXPECT_EQ(*ReadVersion(*log_, {0, 2}), 1u);
  OnePass();
  EXPECT_EQ(log_->Stats().scrub_broken, 1u) << "it is looked for no more";
}

TEST_F(LogScrubTest, WhatCannotBeReadStaysAndIsTriedAgain) {
  for (uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(AppendOne(*log_, {0, i, 1, 30000}).ok());
  Open();
  const uint64_t frame = Frames("QRYBLOCK")[1];
  hooks_.fails_read = [frame](uint64_t offset, uint64_t bytes) {
    return offset <= frame && offset + bytes > frame;
  };
  OnePass();
  OnePass();
  EXPECT_EQ(log_->Stats().scrub_read_errors, 2u);
  EXPECT_EQ(log_->Stats().scrub_broken, 0u);
  hooks_ = {};
  OnePass();
  EXPECT_EQ(log_->Stats().scrub_read_errors, 2u);
  for (uint32_t i = 0; i < 3; ++i) EXPECT_EQ(*ReadVersion(*log_, {0, i}), 1u);
}

TEST_F(LogScrubTest, BrokenFootersAndPurgesAreFoundAndCostNothingYet) {
  for (uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(AppendOne(*log_, {0, i, 1, 30000}).ok());
  const BlockId id[] = {OwnedBlock{0, 1}.key().id};
  ASSERT_TRUE(log_->Purge("tenant-0", std::nullopt, id).ok());
  Open();
  disk_.FlipBit((Frames("QRYPURGE")[1] + 100) * 8);
  OnePass();
  EXPECT_EQ(log_->Stats().scrub_broken, 1u);
  disk_.FlipBit((Frames("QRYFOOTR")[0] + 70) * 8);
  OnePass();
  EXPECT_EQ(log_->Stats().scrub_broken, 2u);
  for (const bool again : {false, true}) {
    if (again) Open();
    for (uint32_t i = 0; i < 3; ++i) EXPECT_EQ(ReadVersion(*log_, {0, i}).ok(), i != 1) << i;
  }
}

// The list of a segment's parts is older than what has happened since: it is no finding.
TEST_F(LogScrubTest, WhatWasPurgedOrUsedAnewMeanwhileIsNotBroken) {
  for (uint32_t i = 0; i < 6; ++i) ASSERT_TRUE(AppendOne(*log_, {0, i, 1, 30000}).ok());
  Open();
  log_->ScrubNext();  // has the list of the first segment
  const BlockId id[] = {OwnedBlock{0, 1}.key().id};
  ASSERT_TRUE(log_->Purge("tenant-0", std::nullopt, id).ok());
  for (uint32_t i = 0; i < 300; ++i) ASSERT_TRUE(AppendOne(*log_, {1, i, 1, 30000}).ok());
  OnePass();
  EXPECT_EQ(log_->Stats().scrub_broken, 0u);
  EXPECT_EQ(log_->Stats().broken_blocks, 0u);
}

// Its thread beside writers, readers and reclaiming.
TEST_F(LogScrubTest, ThreadsGoOnMeanwhile) {
  Scrubber scrubber([this] { return log_->ScrubNext(); },
                    {.bytes_per_s = 1 << 30, .wait = [](absl::Duration) {}});
  std::thread reader([this] {
    for (uint32_t i = 0; i < 400; ++i) {
      const auto version = ReadVersion(*log_, {0, i % 100});
      EXPECT_TRUE(version.ok() || absl::IsNotFound(version.status())) << version.status();
    }
  });
  for (uint32_t i = 0; i < 300; ++i) {
    ASSERT_TRUE(AppendOne(*log_, {0, i % 100, i, 30000}).ok());
    if (i % 50 == 0) {
      ASSERT_TRUE(log_->Purge("tenant-1", std::nullopt, {}).ok());
    }
  }
  reader.join();
  EXPECT_EQ(log_->Stats().broken_blocks, 0u);
  EXPECT_EQ(log_->Stats().scrub_broken, 0u);
}

}  // namespace
}  // namespace quarry

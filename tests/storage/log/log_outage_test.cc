// Disks that cannot be read or written for a while, or in places: what comes of the log meanwhile,
// and afterwards.
#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "tests/storage/disk/hooked_disk.h"
#include "tests/storage/disk/simulated_disk.h"
#include "tests/storage/log/log_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::AppendOne;
using testing::LoggedBatch;
using testing::OwnedBlock;
using testing::ReadVersion;

constexpr uint64_t kSegment = 256 << 10;
// Of all logs of these tests, whose notes fit into a MiB.
constexpr uint64_t kFirst = LogLayout{kSegment, 1}.SegmentOffset(0);

class LogOutageTest : public ::testing::Test {
 protected:
  void Make(uint32_t segments, uint64_t segment_bytes = kSegment) {
    segment_bytes_ = segment_bytes;
    disk_ = std::make_unique<testing::SimulatedDisk>(
        testing::SimulatedDiskOptions{.bytes = LogBytes(segments, segment_bytes), .seed = Seed()});
    Open();
  }
  // As after a stop; what was open is sealed.
  void Open() {
    log_ = nullptr;
    BlockLogOptions options;
    options.segment_bytes = segment_bytes_;
    options.max_part_bytes = 32 << 10;
    options.keep = keep_;
    auto log = BlockLog::Open(std::make_unique<testing::HookedDisk>(disk_.get(), &hooks_), options);
    ASSERT_TRUE(log.ok()) << log.status();
    log_ = *std::move(log);
  }
  void AppendAll(uint32_t tenant, uint32_t first, uint32_t count) {
    for (uint32_t i = first; i < first + count; ++i) {
      const absl::Status status = AppendOne(*log_, {tenant, i, 1, 30000});
      ASSERT_TRUE(status.ok()) << i << ": " << status;
    }
  }
  void FailReads(uint64_t lo, uint64_t hi) {
    hooks_.fails_read = [=](uint64_t offset, uint64_t bytes) {
      return offset < hi && offset + bytes > lo;
    };
  }
  bool Has(uint32_t tenant, uint32_t number) { return ReadVersion(*log_, {tenant, number}).ok(); }
  absl::Status PurgeOne(uint32_t tenant, uint32_t number) {
    const BlockId id[] = {OwnedBlock{tenant, number}.key().id};
    return log_->Purge(OwnedBlock{tenant}.tenant_name(), std::nullopt, id).status();
  }

  uint64_t segment_bytes_ = kSegment;
  std::unique_ptr<testing::SimulatedDisk> disk_;
  testing::DiskHooks hooks_;
  std::function<bool(const ReclaimCandidate&)> keep_;
  std::unique_ptr<BlockLog> log_;
};

TEST_F(LogOutageTest, AnUnreadableStartOfASegmentCostsNothing) {
  Make(40);
  AppendAll(0, 1, 1);
  Open();
  ASSERT_TRUE(log_->Purge("tenant-0", std::nullopt, {}).ok());
  AppendAll(1, 1, 1);
  Open();
  const uint64_t second = kFirst + kSegment;
  FailReads(second, second + 4096);
  Open();
  EXPECT_FALSE(Has(0, 1)) << "purged in that segment";
  EXPECT_TRUE(Has(1, 1));
}

// For one start everything of a segment but its first sectors cannot be read.
TEST_F(LogOutageTest, WhatCouldNotBeReadForAWhileIsThereAfterwards) {
  keep_ = [](const ReclaimCandidate& block) { return block.tenant == "tenant-0"; };
  Make(12);
  AppendAll(0, 0, 6);
  Open();
  AppendAll(0, 50, 1);
  ASSERT_TRUE(PurgeOne(0, 1).ok());
  Open();
  const uint64_t second = kFirst + kSegment;
  FailReads(second + 4096, second + kSegment);
  Open();
  EXPECT_EQ(log_->Stats().condemned_segments, 1u);
  hooks_ = {};
  AppendAll(1, 0, 64);  // around it
  Open();
  EXPECT_FALSE(Has(0, 1)) << "purged";
  EXPECT_TRUE(Has(0, 50)) << "durable";
}

// A segment with a purge that nothing can be read of at one start: the note of it is elsewhere.
TEST_F(LogOutageTest, APurgeThatCannotBeReadBringsNothingBack) {
  for (const bool noted : {true, false}) {
    Make(12);
    AppendAll(0, 0, 3);
    AppendAll(1, 0, 3);
    Open();
    ASSERT_TRUE(PurgeOne(0, 1).ok());
    AppendAll(0, 50, 1);
    ASSERT_TRUE(AppendOne(*log_, {0, 2, 2, 30000}).ok());
    Open();
    AppendAll(0, 60, 1);  // later than the purge, in a segment of its own
    Open();
    hooks_.fails_read = [this, noted](uint64_t offset, uint64_t bytes) {
      const LogLayout layout{kSegment, 12};
      const auto meets = [&](uint64_t lo, uint64_t n) {
        return offset < lo + n && offset + bytes > lo;
      };
      return meets(layout.SegmentOffset(1), kSegment) ||
             meets(layout.NoteOffset(0, 1), kSectorBytes) ||
             (!noted && meets(layout.NoteOffset(1, 1), kSectorBytes));
    };
    Open();
    hooks_ = {};
    EXPECT_EQ(log_->Stats().condemned_segments, 1u);
    EXPECT_EQ(log_->Stats().hidden_blocks, noted ? 3u : 7u);
    for (uint32_t i = 0; i < 3; ++i) {
      EXPECT_FALSE(Has(0, i)) << "purged, or may have been: " << i;
      EXPECT_EQ(Has(1, i), noted) << "another tenant's: " << i;
    }
    EXPECT_EQ(Has(0, 60), noted) << "later than any purge there";
    AppendAll(0, 0, 1);  // computed again: it stays
    Open();
    EXPECT_EQ(log_->Stats().hidden_blocks, 0u);
    EXPECT_TRUE(Has(0, 0));
    EXPECT_FALSE(Has(0, 1)) << "purged";
    EXPECT_EQ(*ReadVersion(*log_, {0, 2}), 2u);
    for (uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(Has(1, i)) << i;
    EXPECT_TRUE(Has(0, 50));
    EXPECT_TRUE(Has(0, 60));
  }
}

// The same of a segment that was full, whose note no start has written again.
TEST_F(LogOutageTest, APurgeInAFullSegmentThatCannotBeReadIsNoted) {
  Make(12);
  AppendAll(0, 0, 3);
  Open();
  ASSERT_TRUE(PurgeOne(0, 1).ok());
  AppendAll(1, 0, 12);  // in that segment, to its end, and beyond
  FailReads(kFirst + kSegment, kFirst + 2 * kSegment);
  Open();
  hooks_ = {};
  EXPECT_EQ(log_->Stats().condemned_segments, 1u);
  EXPECT_FALSE(Has(0, 1)) << "purged";
  EXPECT_TRUE(Has(1, 11)) << "behind it";
}

// What is found in spite of it is like any other block: it is moved when its segment is wanted.
TEST_F(LogOutageTest, WhatNoUnreadPurgeMeansIsMovedOn) {
  keep_ = [](const ReclaimCandidate& block) { return block.tenant == "tenant-0"; };
  Make(12);
  AppendAll(0, 0, 3);
  Open();
  ASSERT_TRUE(PurgeOne(1, 1).ok());
  Open();
  FailReads(kFirst + kSegment, kFirst + 2 * kSegment);
  Open();
  hooks_ = {};
  AppendAll(1, 100, 200);
  EXPECT_GT(log_->Stats().moved_bytes, 0u);
  for (uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(Has(0, i)) << i;
}

// The footer can be read, and neither copy of the purge: it may be one day, and is not replaced.
TEST_F(LogOutageTest, APurgeThatCannotBeReadForAWhileIsNotTakenForMore) {
  Make(12);
  AppendAll(0, 0, 3);
  Open();
  ASSERT_TRUE(PurgeOne(0, 1).ok());
  Open();
  FailReads(kFirst + kSegment + 4096, kFirst + kSegment + 3 * 4096);
  Open();
  for (uint32_t i = 0; i < 3; ++i) EXPECT_FALSE(Has(0, i)) << i;
  hooks_ = {};
  Open();
  for (uint32_t i = 0; i < 3; ++i) EXPECT_EQ(Has(0, i), i != 1) << i;
}

TEST_F(LogOutageTest, PurgesMeanAlsoWhatCannotBeReadNow) {
  for (const uint32_t others : {0u, 200u}) {
    Make(12);
    AppendAll(0, 0, 6);
    Open();
    FailReads(kFirst, kFirst + kSegment);
    Open();
    ASSERT_TRUE(log_->Purge("tenant-0", std::nullopt, {}).ok());
    AppendAll(1, 0, others);
    hooks_ = {};
    Open();
    for (uint32_t i = 0; i < 6; ++i) EXPECT_FALSE(Has(0, i)) << i;
  }
}

TEST_F(LogOutageTest, NobodyFindsWhatAFailedPurgeMeant) {
  Make(40);
  std::vector<BlockId> ids;
  for (uint32_t i = 0; i < 5000; ++i) ids.push_back(OwnedBlock{0, i}.key().id);
  AppendAll(0, 4999, 1);
  hooks_.fails_sync = [] { return true; };
  EXPECT_TRUE(absl::IsUnavailable(log_->Purge("tenant-0", std::nullopt, ids).status()));
  EXPECT_FALSE(log_->Find("tenant-0", ids[4999]).has_value());
}

TEST_F(LogOutageTest, ReadErrorsWhilePurgesAreMovedCostNoBlocks) {
  keep_ = [](const ReclaimCandidate& block) { return block.tenant == "tenant-0"; };
  Make(8);
  AppendAll(0, 0, 4);
  Open();
  ASSERT_TRUE(PurgeOne(0, 3).ok());
  Open();
  hooks_.fails_read = [seen = std::set<uint64_t>()](uint64_t offset, uint64_t) mutable {
    return seen.insert(offset).second;  // the first of each
  };
  AppendAll(1, 0, 60);
  hooks_ = {};
  for (int round = 0; round < 2; ++round) {
    for (uint32_t i = 0; i < 4; ++i) EXPECT_EQ(Has(0, i), i < 3) << i;
    Open();
  }
}

// A write that fails takes nothing away from what is there, and the log goes on afterwards.
TEST_F(LogOutageTest, AWriteOutageDropsNothing) {
  for (const bool kept : {false, true}) {
    keep_ = [kept](const ReclaimCandidate&) { return kept; };
    Make(20);
    uint32_t count = 0;
    for (; log_->Stats().free_segments > 2; ++count) AppendAll(0, count, 1);
    const uint64_t blocks = log_->Stats().blocks;
    hooks_.fails_write = [](uint64_t, uint64_t) { return true; };
    LoggedBatch batch;
    for (uint32_t i = 0; i < 100; ++i) batch.Add({1, i, 1, 30000});
    for (int i = 0; i < 10; ++i) {
      for (const absl::Status& status : log_->Append(batch.blocks())) {
        EXPECT_TRUE(absl::IsUnavailable(status)) << status;
      }
    }
    EXPECT_EQ(log_->Stats().blocks, blocks);
    EXPECT_LE(log_->Stats().condemned_segments, 1u);
    hooks_ = {};
    AppendAll(1, 0, 5);
    EXPECT_TRUE(Has(1, 4));
  }
}

TEST_F(LogOutageTest, ASyncOutageDropsNothing) {
  Make(20);
  for (uint32_t i = 0; log_->Stats().free_segments > 2; ++i) AppendAll(0, i, 1);
  const uint64_t blocks = log_->Stats().blocks;
  hooks_.fails_sync = [] { return true; };
  for (uint32_t i = 0; i < 60; ++i) {
    EXPECT_TRUE(absl::IsUnavailable(AppendOne(*log_, {1, i, 1, 30000})));
    EXPECT_FALSE(PurgeOne(1, i).ok());
  }
  EXPECT_EQ(log_->Stats().blocks, blocks);
  EXPECT_LE(log_->Stats().condemned_segments, 1u);
  hooks_ = {};
  AppendAll(1, 0, 20);
}

// Where everything is to be kept there is still a way on.
TEST_F(LogOutageTest, ALogOfHotBlocksOutlivesSyncsThatFail) {
  keep_ = [](const ReclaimCandidate&) { return true; };
  Make(12);
  AppendAll(0, 0, 200);
  int left = 3;
  hooks_.fails_sync = [&] { return left > 0 && left-- > 0; };
  for (uint32_t i = 0; i < 6; ++i) (void)AppendOne(*log_, {1, i, 1, 30000});
  AppendAll(1, 10, 100);
  ASSERT_TRUE(PurgeOne(1, 109).ok());
}

TEST_F(LogOutageTest, AFewBadFootersDoNotStopTheLog) {
  Make(40);
  for (uint32_t i = 0; log_->Stats().free_segments > 10; ++i) AppendAll(0, i, 1);
  hooks_.fails_read = [](uint64_t offset, uint64_t bytes) {
    for (const uint64_t s : {2, 3, 4, 5}) {
      const uint64_t last = kFirst + (s + 1) * kSegment - 4096;
      if (offset <= last && offset + bytes > last) return true;
    }
    return false;
  };
  for (uint32_t i = 0; i < 600; ++i) {
    const absl::Status status = AppendOne(*log_, {1, i, 1, 30000});
    // A call that meets more than two of them at once may say so.
    if (!status.ok()) {
      EXPECT_TRUE(AppendOne(*log_, {1, i, 1, 30000}).ok()) << status;
    }
    if (i % 50 == 0) {
      ASSERT_TRUE(PurgeOne(1, i).ok());
    }
  }
}

// Whatever segment's beginning cannot be read at one start, and whatever it was used for before.
TEST_F(LogOutageTest, FormerUsesOfASegmentDoNotSpeakForIt) {
  for (uint32_t s = 0; s < 8; ++s) {
    keep_ = [](const ReclaimCandidate& block) { return block.tenant == "tenant-0"; };
    Make(8);
    AppendAll(0, 0, 3);
    AppendAll(1, 0, 80);  // all segments have been used again and again
    Open();
    ASSERT_TRUE(PurgeOne(0, 1).ok());
    AppendAll(1, 100, 3);
    ASSERT_TRUE(PurgeOne(0, 2).ok());
    Open();
    const uint64_t start = kFirst + s * kSegment;
    FailReads(start, start + 8192);
    Open();
    hooks_ = {};
    AppendAll(1, 200, 30);
    Open();
    EXPECT_FALSE(Has(0, 1)) << s;
    EXPECT_FALSE(Has(0, 2)) << s;
  }
}

// The disk has lost the zeros that were written over the footer of an earlier use.
TEST_F(LogOutageTest, AFooterOfAnEarlierUseDoesNotSpeakForASegment) {
  Make(8);
  const auto footer_of = [&](uint32_t s) {
    return disk_->Peek(kFirst + (s + 1) * kSegment - 8192, 8192);
  };
  AppendAll(0, 0, 60);
  std::vector<std::vector<std::byte>> footers;
  for (uint32_t s = 0; s < 8; ++s) footers.push_back(footer_of(s));
  // Until the segment that is written has been sealed before.
  uint32_t reused = 8, count = 60;
  for (; reused == 8; ++count) {
    AppendAll(0, count, 1);
    for (uint32_t s = 0; s < 8; ++s) {
      if (footers[s][4096] == std::byte{0}) continue;
      if (footer_of(s)[4096] == std::byte{0}) reused = s;
    }
  }
  disk_->Corrupt(kFirst + (reused + 1) * kSegment - 8192, footers[reused]);
  Open();
  EXPECT_TRUE(Has(0, count - 1));
}

TEST_F(LogOutageTest, PurgesOfNamespacesDoNotStarveALogWithAnUnreadableSegment) {
  Make(40);
  AppendAll(0, 0, 150);
  Open();
  FailReads(kFirst + 4096, kFirst + kSegment);
  Open();
  hooks_ = {};
  ASSERT_EQ(log_->Stats().condemned_segments, 1u);
  for (uint32_t i = 0; i < 900; ++i) {
    NamespaceDigest name_space;
    std::memcpy(name_space.bytes.data() + 1, &i, sizeof(i));
    const auto purged = log_->Purge("tenant-0", name_space, {});
    ASSERT_TRUE(purged.ok()) << i << ": " << purged.status();
    if (i % 3 == 0) AppendAll(1, i, 1);
  }
  EXPECT_TRUE(Has(1, 897));
}

// Purges of many blocks are put together in frames when they are moved; each is read for itself.
TEST_F(LogOutageTest, ABrokenPurgeIsNotTakenForAnotherOfItsBirth) {
  Make(8, 1 << 20);
  keep_ = [](const ReclaimCandidate&) { return true; };
  Open();
  AppendAll(0, 1, 1);
  Open();
  ASSERT_TRUE(PurgeOne(0, 1).ok());
  std::vector<BlockId> many;
  for (uint32_t i = 0; i < 2048; ++i) many.push_back(OwnedBlock{0, 1000 + i}.key().id);
  ASSERT_TRUE(log_->Purge("tenant-0", std::nullopt, many).ok());
  for (uint32_t i = 0; i < 120; ++i) AppendAll(1, i, 1);  // moves them
  Open();
  // Both copies of each small frame of purges.
  for (uint64_t at = kFirst; at + 8192 <= disk_->bytes(); at += 4096) {
    const auto bytes = disk_->Peek(at, 20);
    if (std::memcmp(bytes.data(), "QRYPURGE", 8) != 0) continue;
    uint32_t frame_bytes;
    std::memcpy(&frame_bytes, bytes.data() + 16, sizeof(frame_bytes));
    if (frame_bytes == 4096) disk_->FlipBit((at + 70) * 8);
  }
  Open();
  EXPECT_FALSE(Has(0, 1));
}

TEST_F(LogOutageTest, AReadOutageDropsNothing) {
  Make(40);
  uint32_t count = 0;
  for (; log_->Stats().free_segments > 2; ++count) AppendAll(0, count, 1);
  const uint64_t blocks = log_->Stats().blocks;
  hooks_.fails_read = [](uint64_t, uint64_t) { return true; };
  LoggedBatch batch;
  for (uint32_t i = 0; i < 20; ++i) batch.Add({1, i, 1, 30000});
  const auto statuses = log_->Append(batch.blocks());
  EXPECT_TRUE(absl::IsUnavailable(statuses.back())) << statuses.back();
  EXPECT_GE(log_->Stats().blocks, blocks);
  EXPECT_EQ(log_->Stats().condemned_segments, 0u);
  hooks_ = {};
  AppendAll(1, 0, 20);
}

TEST_F(LogOutageTest, ABlockThatCannotFitTakesNothingFromOthers) {
  Make(40);
  AppendAll(0, 0, 200);
  const uint64_t blocks = log_->Stats().blocks;
  EXPECT_TRUE(absl::IsInvalidArgument(AppendOne(*log_, {1, 1, 1, 40 * kSegment})));
  EXPECT_EQ(log_->Stats().blocks, blocks);
}

TEST_F(LogOutageTest, AKeyThatFitsNoSegmentCostsNothing) {
  Make(40, 64 << 10);
  AppendAll(0, 0, 20);
  const BlockLogStats before = log_->Stats();
  LoggedBatch batch;
  batch.Add({1, 1, 1, 100});
  BlockKey key = OwnedBlock{1, 1}.key();
  key.full_key = std::string(60000, 'k');
  batch.at(0).key = &key;
  for (int i = 0; i < 50; ++i) {
    EXPECT_TRUE(absl::IsInvalidArgument(log_->Append(batch.blocks())[0]));
  }
  EXPECT_EQ(log_->Stats().free_segments, before.free_segments);
  EXPECT_EQ(log_->Stats().written_bytes, before.written_bytes);
}

TEST_F(LogOutageTest, PurgesDoNotStarveTheLog) {
  for (const uint64_t segment_bytes : {64ull << 10, 256ull << 10}) {
    Make(segment_bytes == kSegment ? 40 : 16, segment_bytes);
    AppendAll(0, 0, 200);
    for (uint32_t i = 0; i < 3000; ++i) {
      const absl::Status status = PurgeOne(0, 1000 + i);
      ASSERT_TRUE(status.ok()) << i << ": " << status;
      if (i % 100 == 0) AppendAll(1, i, 1);
    }
    AppendAll(0, 300, 20);
    EXPECT_TRUE(Has(0, 319));
    const uint64_t before = log_->Stats().written_bytes;
    ASSERT_TRUE(PurgeOne(0, 9999).ok());
    EXPECT_LT(log_->Stats().written_bytes - before, 8 * segment_bytes);
    Open();
    EXPECT_TRUE(Has(0, 319));
  }
}

// A block that is asked for all the time stays, whatever segments it lies in.
TEST_F(LogOutageTest, AHotBlockOverTwoSegmentsStays) {
  Make(12);
  AppendAll(0, 7, 4);
  const OwnedBlock hot{0, 1, 1, 150000};
  ASSERT_TRUE(AppendOne(*log_, hot).ok());
  for (uint32_t i = 0; i < 400; ++i) {
    EXPECT_TRUE(log_->Touch("tenant-0", hot.key().id)) << i;
    AppendAll(1, i, 1);
  }
  EXPECT_EQ(*ReadVersion(*log_, hot), 1u);
}

TEST_F(LogOutageTest, ManyPurgesAreReadInNoTime) {
  Make(20, 4 << 20);
  for (uint32_t i = 0; i < 4000; i += 200) {
    LoggedBatch batch;
    for (uint32_t j = 0; j < 200; ++j) batch.Add({0, i + j, 1, 4000});
    for (const absl::Status& status : log_->Append(batch.blocks())) ASSERT_TRUE(status.ok());
  }
  for (uint32_t p = 0; p < 40; ++p) {
    std::vector<BlockId> ids;
    for (uint32_t i = 0; i < 2000; ++i) ids.push_back(OwnedBlock{0, 10000 + p * 2000 + i}.key().id);
    ASSERT_TRUE(log_->Purge("tenant-0", std::nullopt, ids).ok());
  }
  Open();
  EXPECT_EQ(log_->Stats().blocks, 4000u);
  // 320 million comparisons of ids would take longer.
  EXPECT_LT(log_->Stats().recovery_seconds, 5);
}

}  // namespace
}  // namespace quarry

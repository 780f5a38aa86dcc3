#include "storage/log/block_log.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "storage/log/checksum.h"
#include "tests/storage/disk/hooked_disk.h"
#include "tests/storage/disk/simulated_disk.h"
#include "tests/storage/log/log_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::AppendOne;
using testing::Fault;
using testing::LoggedBatch;
using testing::OwnedBlock;
using testing::ReadVersion;
using testing::SimulatedDisk;

constexpr uint64_t kSegment = 256 << 10;

class BlockLogTest : public ::testing::Test {
 protected:
  // On a disk with room for so many segments.
  void Make(uint32_t segments) {
    auto disk = std::make_unique<SimulatedDisk>(
        testing::SimulatedDiskOptions{.bytes = LogBytes(segments, kSegment), .seed = Seed()});
    Open(std::move(disk));
  }
  void Open(std::unique_ptr<SimulatedDisk> disk) {
    disk_ = disk.get();
    BlockLogOptions options;
    options.segment_bytes = kSegment;
    options.max_part_bytes = 32 << 10;
    options.keep = keep_;
    auto log = BlockLog::Open(std::move(disk), options);
    ASSERT_TRUE(log.ok()) << log.status();
    log_ = *std::move(log);
  }
  // As after a stop: all that was synced is there.
  void Restart() {
    auto disk = disk_->Crashed(testing::PowerCut::kNoneKept, 1);
    log_ = nullptr;
    Open(std::move(disk));
  }

  // Sectors [first, first + count) of the block. Foreign bytes are a failure whatever the status.
  static absl::Status ReadSectors(LoggedBlockReader& reader, const OwnedBlock& block,
                                  std::vector<std::pair<uint64_t, uint64_t>> stretches) {
    std::vector<AlignedBuffer> outs;
    std::vector<PieceToRead> pieces;
    for (const auto& [first, count] : stretches) {
      pieces.push_back({first * kSectorBytes, outs.emplace_back(count * kSectorBytes).bytes()});
    }
    absl::Status read = reader.Read(pieces);
    if (!read.ok()) return read;
    const AlignedBuffer want = block.Make();
    for (const PieceToRead& piece : pieces) {
      EXPECT_EQ(std::memcmp(piece.out.data(), want.bytes().data() + piece.offset, piece.out.size()),
                0)
          << "foreign bytes at " << piece.offset;
    }
    return read;
  }
  // Where a sector of a block's bytes lies on the disk.
  uint64_t Place(const OwnedBlock& block, uint64_t sector) {
    const uint64_t word = block.WordAt(sector * kSectorBytes);
    for (uint64_t at = 0; at < disk_->bytes(); at += kSectorBytes) {
      if (std::memcmp(disk_->Peek(at, 8).data(), &word, 8) == 0) return at;
    }
    ADD_FAILURE() << "sector " << sector << " is not on the disk";
    return 0;
  }

  SimulatedDisk* disk_ = nullptr;
  std::function<bool(const ReclaimCandidate&)> keep_;
  std::unique_ptr<BlockLog> log_;
};

TEST_F(BlockLogTest, BlocksOfAllSizesComeBackAlsoAfterARestart) {
  Make(80);
  const uint64_t sizes[] = {8, 100, 4095, 4096, 4097, 32767, 32768, 40000, 300000, 1000000};
  LoggedBatch batch;
  std::vector<OwnedBlock> blocks;
  for (uint32_t i = 0; i < std::size(sizes); ++i) {
    blocks.push_back({i % 2, i, i + 1, sizes[i]});
    batch.Add(blocks.back());
  }
  for (const absl::Status& status : log_->Append(batch.blocks()))
    EXPECT_TRUE(status.ok()) << status;
  for (int round = 0; round < 3; ++round) {
    for (const OwnedBlock& block : blocks) {
      const auto version = ReadVersion(*log_, block);
      ASSERT_TRUE(version.ok()) << version.status();
      EXPECT_EQ(*version, block.version) << block.bytes << " bytes";
    }
    EXPECT_EQ(log_->Stats().blocks, blocks.size());
    Restart();
    EXPECT_EQ(log_->Stats().recovered_blocks, blocks.size());
  }
}

TEST_F(BlockLogTest, ALaterBlockOfAnIdTakesThePlaceOfTheEarlier) {
  Make(10);
  for (uint32_t version = 1; version < 5; ++version) {
    ASSERT_TRUE(AppendOne(*log_, {0, 1, version, 5000 * version}).ok());
    EXPECT_EQ(*ReadVersion(*log_, {0, 1}), version);
  }
  Restart();
  EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 4u);
}

TEST_F(BlockLogTest, OtherTenantsAndKeysAreMisses) {
  Make(10);
  const OwnedBlock block{0, 1, 1, 5000};
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  EXPECT_FALSE(log_->Find("tenant-1", block.key().id).has_value());
  AlignedBuffer memory(8192);
  BlockKey other = block.key();
  other.full_key = "another key of the same hash";
  EXPECT_TRUE(absl::IsNotFound(log_->Read("tenant-0", other, memory.bytes().first(5000)).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      log_->Read("tenant-0", block.key(), memory.bytes().first(4999)).status()));
  EXPECT_EQ(*ReadVersion(*log_, block), 1u);
}

TEST_F(BlockLogTest, IdsThatDifferInOneBitAreOfDifferentBlocks) {
  Make(10);
  for (const size_t byte : {0, 7, 15, 16, 31}) {
    BlockKey keys[] = {OwnedBlock{0, 1}.key(), OwnedBlock{0, 1}.key()};
    keys[1].id.bytes[byte] ^= 0x80;
    LoggedBatch batch;
    for (uint32_t i = 0; i < 2; ++i) {
      batch.Add({0, 1, i + 1, 5000});
      batch.at(i).key = &keys[i];
    }
    for (const absl::Status& status : log_->Append(batch.blocks())) ASSERT_TRUE(status.ok());
    AlignedBuffer memory(8192);
    for (uint32_t i = 0; i < 2; ++i) {
      const auto read = log_->Read("tenant-0", keys[i], memory.bytes().first(5000));
      ASSERT_TRUE(read.ok()) << "byte " << byte << ": " << read.status();
      EXPECT_EQ(*read, batch.blocks()[i].digest);
    }
  }
}

TEST_F(BlockLogTest, MemoryNeedNotBeAligned) {
  Make(10);
  const OwnedBlock block{0, 1, 1, 70000};
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  std::vector<std::byte> memory(block.bytes + 1);
  const auto out = std::span(memory).subspan(1);
  ASSERT_TRUE(log_->Read("tenant-0", block.key(), out).ok());
  EXPECT_EQ(testing::VersionOf(block, out), 1u);
}

TEST_F(BlockLogTest, BytesThatAreNotTheirDigestsAreNotLogged) {
  Make(10);
  LoggedBatch batch;
  batch.Add({0, 1, 1, 5000});
  batch.Add({0, 2, 1, 5000});
  batch.at(0).digest.low ^= 1;
  const auto statuses = log_->Append(batch.blocks());
  EXPECT_TRUE(absl::IsDataLoss(statuses[0])) << statuses[0];
  EXPECT_TRUE(statuses[1].ok()) << statuses[1];
  EXPECT_FALSE(log_->Find("tenant-0", OwnedBlock{0, 1}.key().id).has_value());
}

TEST_F(BlockLogTest, WhatIsNoLongerWantedIsNotWritten) {
  Make(10);
  LoggedBatch batch;
  batch.Add({0, 1, 1, 5000});
  batch.at(0).still_wanted = [] { return false; };
  EXPECT_TRUE(absl::IsCancelled(log_->Append(batch.blocks())[0]));
  EXPECT_EQ(log_->Stats().blocks, 0u);
}

TEST_F(BlockLogTest, WhatWasPurgedNeverReturns) {
  Make(10);
  for (uint32_t tenant = 0; tenant < 2; ++tenant) {
    for (uint32_t number = 0; number < 6; ++number) {
      ASSERT_TRUE(AppendOne(*log_, {tenant, number, 1, 3000}).ok());
    }
  }
  const BlockId ids[] = {OwnedBlock{0, 4}.key().id, OwnedBlock{0, 77}.key().id};
  EXPECT_EQ(*log_->Purge("tenant-0", std::nullopt, ids), 1u);
  EXPECT_EQ(*log_->Purge("tenant-0", OwnedBlock{0, 1}.key().name_space, {}), 3u);
  EXPECT_EQ(*log_->Purge("tenant-1", std::nullopt, {}), 6u);
  ASSERT_TRUE(AppendOne(*log_, {1, 3, 2, 3000}).ok());  // later: it stays
  for (int round = 0; round < 2; ++round) {
    for (uint32_t number = 0; number < 6; ++number) {
      const bool there = number % 2 == 0 && number != 4;
      EXPECT_EQ(ReadVersion(*log_, {0, number}).ok(), there) << number;
      EXPECT_EQ(ReadVersion(*log_, {1, number}).ok(), number == 3) << number;
    }
    Restart();
  }
}

TEST_F(BlockLogTest, NobodysBlocksAreNotThereToBePurged) {
  Make(10);
  const uint64_t before = disk_->counts().writes;
  EXPECT_EQ(*log_->Purge("", std::nullopt, {}), 0u);
  EXPECT_EQ(disk_->counts().writes, before) << "a purge that no start could read";
}

// Ten times the disk's size is written; what is asked for all the time stays, and purges hold.
TEST_F(BlockLogTest, ReclaimingKeepsWhatIsUsedAndWhatIsPurgedAway) {
  Make(12);
  ASSERT_TRUE(AppendOne(*log_, {1, 5, 1, 30000}).ok());
  ASSERT_TRUE(log_->Purge("tenant-1", std::nullopt, {}).ok());
  const OwnedBlock hot{0, 1000, 7, 50000};
  ASSERT_TRUE(AppendOne(*log_, hot).ok());
  for (uint32_t i = 0; i < 1000; ++i) {
    ASSERT_TRUE(AppendOne(*log_, {0, i, 1, 30000}).ok()) << i;
    const auto version = ReadVersion(*log_, hot);
    ASSERT_TRUE(version.ok()) << i << ": " << version.status();
    ASSERT_EQ(*version, 7u);
    ASSERT_EQ(*ReadVersion(*log_, {0, i}), 1u);
  }
  const BlockLogStats stats = log_->Stats();
  EXPECT_GT(stats.dropped_blocks, 800u);
  EXPECT_GT(stats.moved_bytes, 0u);
  EXPECT_GE(stats.free_segments, 1u);
  EXPECT_EQ(stats.broken_blocks, 0u);
  Restart();
  EXPECT_EQ(*ReadVersion(*log_, hot), 7u);
  EXPECT_FALSE(ReadVersion(*log_, {1, 5}).ok());
}

TEST_F(BlockLogTest, ABrokenBlockIsAMissAndTheOthersStay) {
  Make(10);
  for (uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(AppendOne(*log_, {0, i, 1, 20000}).ok());
  // A byte that only block 1 has.
  const OwnedBlock broken{0, 1, 1, 20000};
  const uint64_t word = broken.WordAt(16000);
  for (uint64_t at = 0; at + 8 <= disk_->bytes(); at += 8) {
    const auto bytes = disk_->Peek(at, 8);
    if (std::memcmp(bytes.data(), &word, 8) == 0) disk_->FlipBit(at * 8 + 3);
  }
  EXPECT_TRUE(absl::IsDataLoss(ReadVersion(*log_, broken).status()));
  EXPECT_TRUE(absl::IsNotFound(ReadVersion(*log_, broken).status()));
  EXPECT_EQ(*ReadVersion(*log_, {0, 0}), 1u);
  EXPECT_EQ(*ReadVersion(*log_, {0, 2}), 1u);
  EXPECT_EQ(log_->Stats().broken_blocks, 1u);
}

TEST_F(BlockLogTest, AFlippedBitOfAnySectorIsFoundWhereThatIsRead) {
  Make(20);
  std::mt19937_64 random(Seed());
  constexpr uint64_t kSectors = 30;  // in four parts, the last sector not full
  for (uint32_t i = 0; i < 40; ++i) {
    const OwnedBlock block{0, i, 1, kSectors * kSectorBytes - 100};
    ASSERT_TRUE(AppendOne(*log_, block).ok());
    const auto reader = log_->OpenBlock(block.tenant_name(), block.key());
    ASSERT_TRUE(reader.ok());
    const uint64_t sector = i < kSectors ? i : random() % kSectors;
    disk_->FlipBit(8 * Place(block, sector) + random() % (8 * kSectorBytes));
    for (uint64_t s = 0; s < kSectors; ++s) {
      if (s == sector) continue;
      ASSERT_TRUE(ReadSectors(**reader, block, {{s, 1}}).ok());
    }
    const absl::Status read = ReadSectors(**reader, block, {{0, kSectors}});
    EXPECT_TRUE(absl::IsDataLoss(read)) << read;
    EXPECT_TRUE(absl::IsNotFound(ReadSectors(**reader, block, {{(sector + 1) % kSectors, 1}})));
    EXPECT_FALSE(log_->Find("tenant-0", block.key().id).has_value());
    EXPECT_EQ(log_->Stats().broken_blocks, i + 1);
  }
}

TEST_F(BlockLogTest, AFailedSyncIsNotTriedAgainAndItsSegmentIsLeft) {
  Make(10);
  ASSERT_TRUE(AppendOne(*log_, {0, 1, 1, 20000}).ok());
  disk_->Schedule({Fault::kFailedSync, disk_->operations()});
  const uint64_t syncs = disk_->counts().syncs;
  EXPECT_TRUE(absl::IsUnavailable(AppendOne(*log_, {0, 2, 1, 20000})));
  EXPECT_EQ(disk_->counts().syncs, syncs + 1);
  EXPECT_EQ(log_->Stats().condemned_segments, 1u);
  EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 1u);
  EXPECT_FALSE(ReadVersion(*log_, {0, 2}).ok());
  ASSERT_TRUE(AppendOne(*log_, {0, 2, 2, 20000}).ok());
  Restart();
  EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 1u);
  EXPECT_EQ(*ReadVersion(*log_, {0, 2}), 2u);
}

TEST_F(BlockLogTest, ADiskOfSomethingElseIsLeftAlone) {
  auto disk = std::make_unique<SimulatedDisk>(testing::SimulatedDiskOptions{.bytes = 8 << 20});
  const std::byte other[] = {std::byte{1}};
  disk->Corrupt(100, other);
  SimulatedDisk* const kept = disk.get();
  auto copy = kept->Clone();
  const absl::Status refused =
      BlockLog::Open(std::move(disk), {.segment_bytes = kSegment}).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused)) << refused;
  EXPECT_NE(std::string(refused.message()).find("not blank"), std::string::npos) << refused;
  EXPECT_EQ(copy->counts().writes, 0u);
}

// Version 1 had nothing between the first MiB and the segments.
TEST_F(BlockLogTest, ADiskOfVersion1IsRefused) {
  Make(8);
  auto disk = disk_->Crashed(testing::PowerCut::kAllKept, 1);
  for (const uint64_t copy : {uint64_t{0}, uint64_t{512 << 10}}) {
    std::vector<std::byte> frame = disk->Peek(copy, kSectorBytes);
    std::memset(frame.data() + 8, 0, 8);
    frame[8] = std::byte{1};
    const uint32_t crc = Crc32c(frame);
    std::memcpy(frame.data() + 12, &crc, sizeof(crc));
    disk->Corrupt(copy, frame);
  }
  disk->Corrupt(LogBytes(8, kSegment) - kSectorBytes, std::vector<std::byte>(kSectorBytes));
  SimulatedDisk* const kept = disk.get();
  testing::DiskHooks hooks;
  const absl::Status refused = BlockLog::Open(std::make_unique<testing::HookedDisk>(kept, &hooks),
                                              {.segment_bytes = kSegment})
                                   .status();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused)) << refused;
  EXPECT_NE(std::string(refused.message()).find("version 1"), std::string::npos) << refused;
  EXPECT_EQ(kept->counts().writes, 0u);
}

TEST_F(BlockLogTest, ADiskThatIsTooSmallIsNamed) {
  auto disk = std::make_unique<SimulatedDisk>(testing::SimulatedDiskOptions{.bytes = 2 << 20});
  const absl::Status refused = BlockLog::Open(std::move(disk), {.segment_bytes = 1 << 20}).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused)) << refused;
  EXPECT_NE(std::string(refused.message()).find("2097152"), std::string::npos) << refused;
}

// Any copy of the superblock is enough, and mends the others.
TEST_F(BlockLogTest, SuperblocksStandInForOneAnother) {
  Make(8);
  ASSERT_TRUE(AppendOne(*log_, {0, 1, 1, 20000}).ok());
  const std::vector<std::byte> garbage(4096, std::byte{0xee});
  const uint64_t copies[] = {0, 512 << 10, LogBytes(8, kSegment) - kSectorBytes};
  for (const uint64_t kept : copies) {
    auto disk = disk_->Crashed(testing::PowerCut::kAllKept, 1);
    for (const uint64_t copy : copies) {
      if (copy != kept) disk->Corrupt(copy, garbage);
    }
    SimulatedDisk* const raw = disk.get();
    auto log = BlockLog::Open(std::move(disk), {.segment_bytes = kSegment});
    ASSERT_TRUE(log.ok()) << log.status();
    EXPECT_EQ(*ReadVersion(**log, {0, 1}), 1u);
    // The others are there again, and outlive it.
    auto later = raw->Crashed(testing::PowerCut::kNoneKept, 1);
    later->Corrupt(kept, garbage);
    log = BlockLog::Open(std::move(later), {.segment_bytes = kSegment});
    ASSERT_TRUE(log.ok()) << log.status();
    EXPECT_EQ(*ReadVersion(**log, {0, 1}), 1u);
  }
}

}  // namespace
}  // namespace quarry

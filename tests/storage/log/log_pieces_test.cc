// Blocks that are read in pieces: they stay as long as somebody does, wherever they are moved to,
// and every sector is checked.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "storage/log/block_log.h"
#include "tests/storage/disk/hooked_disk.h"
#include "tests/storage/disk/simulated_disk.h"
#include "tests/storage/log/log_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::AppendOne;
using testing::OwnedBlock;
using testing::SimulatedDisk;

constexpr uint64_t kSegment = 256 << 10;

class LogPiecesTest : public ::testing::Test {
 protected:
  void Make(uint32_t segments, LogKeyOptions key = {}) {
    const uint64_t bytes = key.environment.empty() ? LogBytes(segments, kSegment)
                                                   : EncryptedLogBytes(segments, kSegment);
    disk_ = std::make_unique<SimulatedDisk>(
        testing::SimulatedDiskOptions{.bytes = bytes, .seed = Seed()});
    BlockLogOptions options;
    options.segment_bytes = kSegment;
    options.max_part_bytes = 32 << 10;
    options.keep = [](const ReclaimCandidate&) { return false; };
    options.key = key;
    auto log = BlockLog::Open(std::make_unique<testing::HookedDisk>(disk_.get(), &hooks_), options);
    ASSERT_TRUE(log.ok()) << log.status();
    log_ = *std::move(log);
  }
  absl::StatusOr<std::unique_ptr<LoggedBlockReader>> OpenBlock(const OwnedBlock& block) {
    return log_->OpenBlock(block.tenant_name(), block.key());
  }
  // So many segments' bytes of other blocks, which nobody keeps.
  void Overwrite(uint32_t segments) {
    for (uint32_t i = 0; i < 2 * segments; ++i) {
      ASSERT_TRUE(AppendOne(*log_, {9, next_++, 1, kSegment / 2}).ok());
    }
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

  testing::DiskHooks hooks_;
  std::unique_ptr<SimulatedDisk> disk_;
  std::unique_ptr<BlockLog> log_;
  uint32_t next_ = 1000;
};

TEST_F(LogPiecesTest, PiecesOfBlocksOfAllSizesAreRight) {
  Make(80);
  std::mt19937_64 random(Seed());
  for (const uint64_t bytes : {8, 4095, 4096, 4097, 32768, 40000, 300000, 1000000}) {
    const OwnedBlock block{0, static_cast<uint32_t>(bytes % 1000), 1, bytes};
    ASSERT_TRUE(AppendOne(*log_, block).ok());
    const auto reader = OpenBlock(block);
    ASSERT_TRUE(reader.ok()) << reader.status();
    EXPECT_EQ((*reader)->bytes(), bytes);
    EXPECT_EQ((*reader)->digest(), DigestOf(block.Make().bytes().first(bytes)));
    const uint64_t sectors = RoundUp(bytes, kSectorBytes) / kSectorBytes;
    EXPECT_TRUE(ReadSectors(**reader, block, {{0, sectors}}).ok());
    for (int i = 0; i < 20; ++i) {
      std::vector<std::pair<uint64_t, uint64_t>> stretches;
      for (uint64_t at = random() % sectors; at < sectors; at += 1 + random() % 8) {
        const uint64_t count = std::min(sectors - at, 1 + random() % 9);
        stretches.push_back({at, count});
        at += count;
      }
      EXPECT_TRUE(ReadSectors(**reader, block, stretches).ok());
    }
  }
}

TEST_F(LogPiecesTest, WhatIsHeldOutlivesReclaiming) {
  Make(8);
  const OwnedBlock held{0, 1, 1, 3 * kSegment / 8}, free{0, 2, 1, kSegment / 4};
  ASSERT_TRUE(AppendOne(*log_, held).ok());
  ASSERT_TRUE(AppendOne(*log_, free).ok());
  auto reader = OpenBlock(held);
  auto second = OpenBlock(held);
  ASSERT_TRUE(reader.ok() && second.ok());
  Overwrite(40);
  EXPECT_FALSE(log_->Find("tenant-0", free.key().id).has_value());
  EXPECT_TRUE(ReadSectors(**reader, held, {{0, 1}, {20, 4}}).ok());
  *reader = nullptr;
  Overwrite(40);
  EXPECT_TRUE(ReadSectors(**second, held, {{0, 1}, {20, 4}}).ok()) << "another still reads it";
  EXPECT_GE(log_->Stats().moved_bytes, 2 * held.bytes);
  *second = nullptr;
  Overwrite(40);
  EXPECT_TRUE(absl::IsNotFound(OpenBlock(held).status()));
}

TEST_F(LogPiecesTest, ABlockThatIsMovedWhileItIsReadIsFollowed) {
  Make(8);
  const OwnedBlock block{0, 1, 1, kSegment / 4};
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  const auto reader = OpenBlock(block);
  ASSERT_TRUE(reader.ok());
  int moves = 0;
  for (const bool after : {true, false}) {
    // Between two reads, or just when one has ended; the segment is used anew and written over.
    const uint64_t before = log_->Stats().moved_bytes;
    bool done = false;
    const auto overwrite = [&] {
      if (std::exchange(done, true)) return;
      Overwrite(20);
      ++moves;
    };
    if (after) {
      hooks_.after_read = [&](uint64_t) { overwrite(); };
    } else {
      hooks_.fails_read = [&](uint64_t, uint64_t) {
        overwrite();
        return false;
      };
    }
    EXPECT_TRUE(ReadSectors(**reader, block, {{0, 2}, {9, 1}}).ok());
    EXPECT_GE(log_->Stats().moved_bytes - before, block.bytes);
    hooks_ = {};
  }
  EXPECT_EQ(moves, 2);
}

TEST_F(LogPiecesTest, WhatIsPurgedOrWrittenAnewIsNotFound) {
  Make(20);
  const OwnedBlock purged{0, 1, 1, 40000}, other{0, 2, 1, 40000}, same{0, 3, 1, 40000};
  for (const OwnedBlock& block : {purged, other, same}) {
    ASSERT_TRUE(AppendOne(*log_, block).ok());
  }
  const auto reads_purged = OpenBlock(purged), reads_other = OpenBlock(other),
             reads_same = OpenBlock(same);
  ASSERT_TRUE(reads_purged.ok() && reads_other.ok() && reads_same.ok());
  const BlockId ids[] = {purged.key().id};
  ASSERT_TRUE(log_->Purge("tenant-0", std::nullopt, ids).ok());
  OwnedBlock newer = other;
  newer.version = 2;
  ASSERT_TRUE(AppendOne(*log_, newer).ok());
  ASSERT_TRUE(AppendOne(*log_, same).ok());
  EXPECT_TRUE(absl::IsNotFound(ReadSectors(**reads_purged, purged, {{0, 1}})));
  EXPECT_TRUE(absl::IsNotFound(ReadSectors(**reads_other, other, {{0, 1}})));
  EXPECT_TRUE(ReadSectors(**reads_same, same, {{0, 1}}).ok());
  EXPECT_TRUE(log_->Find("tenant-0", newer.key().id).has_value());

  BlockKey foreign = same.key();
  foreign.full_key = "another";
  EXPECT_TRUE(absl::IsNotFound(log_->OpenBlock("tenant-0", foreign).status()));
  EXPECT_TRUE(absl::IsNotFound(log_->OpenBlock("tenant-1", same.key()).status()));
}

TEST_F(LogPiecesTest, EveryFlippedBitIsFoundWhereItIsRead) {
  Make(20);
  std::mt19937_64 random(Seed());
  constexpr uint64_t kSectors = 30;  // in four parts, the last sector not full
  for (uint32_t i = 0; i < 40; ++i) {
    const OwnedBlock block{0, i, 1, kSectors * kSectorBytes - 100};
    ASSERT_TRUE(AppendOne(*log_, block).ok());
    const auto reader = OpenBlock(block);
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

TEST_F(LogPiecesTest, ADiskThatFailsIsNotABrokenBlock) {
  Make(20);
  const OwnedBlock block{0, 1, 1, 100000};
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  hooks_.fails_read = [](uint64_t, uint64_t) { return true; };
  EXPECT_TRUE(absl::IsUnavailable(OpenBlock(block).status()));
  hooks_ = {};
  const auto reader = OpenBlock(block);
  ASSERT_TRUE(reader.ok());
  hooks_.fails_read = [](uint64_t, uint64_t) { return true; };
  EXPECT_TRUE(absl::IsUnavailable(ReadSectors(**reader, block, {{3, 2}})));
  hooks_ = {};
  EXPECT_TRUE(ReadSectors(**reader, block, {{3, 2}}).ok());
  EXPECT_EQ(log_->Stats().broken_blocks, 0u);
  EXPECT_EQ(log_->Stats().read_errors, 2u);
}

// Half of the log may be held; what is written goes on in the other half.
TEST_F(LogPiecesTest, WhatMayBeHeldIsBounded) {
  constexpr uint32_t kSegments = 12;
  Make(kSegments);
  std::vector<std::unique_ptr<LoggedBlockReader>> readers;
  std::vector<OwnedBlock> blocks;
  for (uint32_t i = 0; i < 2 * kSegments; ++i) {
    const OwnedBlock block{0, i, 1, kSegment / 3};
    ASSERT_TRUE(AppendOne(*log_, block).ok());
    auto reader = OpenBlock(block);
    if (!reader.ok()) {
      EXPECT_TRUE(absl::IsResourceExhausted(reader.status())) << reader.status();
      EXPECT_GT((readers.size() + 1) * block.bytes, kSegments * kSegment / 2);
      continue;
    }
    readers.push_back(*std::move(reader));
    blocks.push_back(block);
  }
  EXPECT_LE(readers.size() * kSegment / 3, kSegments * kSegment / 2);
  EXPECT_GE((readers.size() + 1) * kSegment / 3, kSegments * kSegment / 2);
  uint32_t refused = 0;
  for (uint32_t i = 0; i < 100; ++i) {
    refused += AppendOne(*log_, {9, next_++, 1, kSegment / 2}).ok() ? 0 : 1;
  }
  EXPECT_EQ(refused, 0u);
  for (size_t i = 0; i < readers.size(); ++i) {
    EXPECT_TRUE(ReadSectors(*readers[i], blocks[i], {{0, 1}, {10, 5}}).ok()) << i;
  }
  readers.clear();
  ASSERT_TRUE(AppendOne(*log_, {0, 500, 1, kSegment / 3}).ok());
  EXPECT_TRUE(OpenBlock({0, 500, 1, kSegment / 3}).ok());
}

TEST_F(LogPiecesTest, EncryptedBlocksAreReadWhole) {
  LogKeyOptions key;
  key.environment = testing::SetTestKey('a');
  Make(20, key);
  const OwnedBlock block{0, 1, 1, 100000};
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(OpenBlock(block).status()));
  EXPECT_TRUE(testing::ReadVersion(*log_, block).ok());
}

}  // namespace
}  // namespace quarry

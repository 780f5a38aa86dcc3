// Blocks that are read in pieces: a flipped bit of any sector is found when that is read.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "storage/log/block_log.h"
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
  void Make(uint32_t segments) {
    auto disk = std::make_unique<SimulatedDisk>(
        testing::SimulatedDiskOptions{.bytes = LogBytes(segments, kSegment), .seed = Seed()});
    disk_ = disk.get();
    BlockLogOptions options;
    options.segment_bytes = kSegment;
    options.max_part_bytes = 32 << 10;
    auto log = BlockLog::Open(std::move(disk), options);
    ASSERT_TRUE(log.ok()) << log.status();
    log_ = *std::move(log);
  }
  absl::StatusOr<std::unique_ptr<LoggedBlockReader>> OpenBlock(const OwnedBlock& block) {
    return log_->OpenBlock(block.tenant_name(), block.key());
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
  std::unique_ptr<BlockLog> log_;
};

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

}  // namespace
}  // namespace quarry

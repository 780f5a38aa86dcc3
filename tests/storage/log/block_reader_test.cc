// Blocks that are held, and read in pieces.
#include <gtest/gtest.h>

#include <functional>
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
constexpr uint32_t kSegments = 10;

// Once plain and once encrypted.
class BlockReaderTest : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    medium_ = std::make_unique<SimulatedDisk>(
        testing::SimulatedDiskOptions{.bytes = GetParam() ? EncryptedLogBytes(kSegments, kSegment)
                                                          : LogBytes(kSegments, kSegment),
                                      .seed = Seed(),
                                      .discards_supported = false});
    BlockLogOptions options;
    options.segment_bytes = kSegment;
    options.max_part_bytes = 32 << 10;
    options.keep = [](const ReclaimCandidate&) { return false; };
    if (GetParam()) options.key.environment = testing::SetTestKey('7');
    auto log =
        BlockLog::Open(std::make_unique<testing::HookedDisk>(medium_.get(), &hooks_), options);
    ASSERT_TRUE(log.ok()) << log.status();
    log_ = *std::move(log);
  }

  std::unique_ptr<LoggedBlockReader> Opened(const OwnedBlock& block) {
    auto reader = log_->OpenBlock(block.tenant_name(), block.key());
    QUARRY_CHECK(reader.ok());
    return *std::move(reader);
  }
  // `sectors` of them from `first` on, in one piece; wrong bytes fail the test.
  absl::Status Read(LoggedBlockReader& reader, const OwnedBlock& block, uint64_t first,
                    uint64_t sectors) {
    AlignedBuffer out(sectors * kSectorBytes);
    const PieceToRead piece{first * kSectorBytes, out.bytes()};
    absl::Status status = reader.Read({&piece, 1});
    if (status.ok()) {
      const AlignedBuffer want = block.Make();
      EXPECT_EQ(std::memcmp(out.bytes().data(), want.bytes().data() + piece.offset, out.size()), 0)
          << "sectors [" << first << ", +" << sectors << ") of " << block.bytes << " bytes";
    }
    return status;
  }
  absl::Status ReadAll(LoggedBlockReader& reader, const OwnedBlock& block) {
    return Read(reader, block, 0, RoundUp(block.bytes, kSectorBytes) / kSectorBytes);
  }
  // So much that everything that is not held is reclaimed, several times.
  void Churn() {
    for (uint32_t i = 0; i < 80; ++i) {
      const absl::Status status = AppendOne(*log_, {3, next_++, 1, 100000});
      ASSERT_TRUE(status.ok()) << status;
    }
  }
  // The byte on the disk where the plain block's bytes at `offset` lie.
  uint64_t PlaceOf(const OwnedBlock& block, uint64_t offset) {
    for (uint64_t at = 0; at < medium_->bytes(); at += kSectorBytes) {
      uint64_t word;
      std::memcpy(&word, medium_->Peek(at, 8).data(), 8);
      if (word == block.WordAt(offset)) return at;
    }
    QUARRY_CHECK(false);
  }

  std::unique_ptr<SimulatedDisk> medium_;
  testing::DiskHooks hooks_;
  std::unique_ptr<BlockLog> log_;
  uint32_t next_ = 100;
};

INSTANTIATE_TEST_SUITE_P(Logs, BlockReaderTest, ::testing::Bool(),
                         [](const auto& param) { return param.param ? "Encrypted" : "Plain"; });

TEST_P(BlockReaderTest, PiecesOfBlocksOfAllSizes) {
  std::mt19937_64 random(Seed());
  uint32_t number = 0;
  for (const uint64_t bytes : {8, 4095, 4096, 4097, 32768, 40000, 200000}) {
    const OwnedBlock block{0, ++number, 1, static_cast<uint64_t>(bytes)};
    ASSERT_TRUE(AppendOne(*log_, block).ok());
    const auto reader = Opened(block);
    EXPECT_EQ(reader->bytes(), block.bytes);
    EXPECT_EQ(reader->digest(),
              DigestOf(std::span<const std::byte>(block.Make().bytes()).first(block.bytes)));
    EXPECT_TRUE(ReadAll(*reader, block).ok());
    const uint64_t sectors = RoundUp(block.bytes, kSectorBytes) / kSectorBytes;
    for (int i = 0; i < 50; ++i) {
      const uint64_t first = random() % sectors;
      const absl::Status read = Read(*reader, block, first, 1 + random() % (sectors - first));
      EXPECT_TRUE(read.ok()) << read;
    }
  }
}

TEST_P(BlockReaderTest, ManyPiecesInAnyOrderAndPiecesThatAdjoinAreOneRead) {
  const OwnedBlock block{0, 1, 1, 200000};
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  const auto reader = Opened(block);
  const AlignedBuffer want = block.Make();
  AlignedBuffer out(4 * kSectorBytes);
  const uint64_t sectors[] = {5, 40, 4, 6};
  std::vector<PieceToRead> pieces;
  for (size_t i = 0; i < std::size(sectors); ++i) {
    pieces.push_back(
        {sectors[i] * kSectorBytes, out.bytes().subspan(i * kSectorBytes, kSectorBytes)});
  }
  const uint64_t before = medium_->counts().reads;
  ASSERT_TRUE(reader->Read(pieces).ok());
  EXPECT_EQ(medium_->counts().reads, before + 2);
  for (const PieceToRead& piece : pieces) {
    EXPECT_EQ(std::memcmp(piece.out.data(), want.bytes().data() + piece.offset, kSectorBytes), 0);
  }
}

TEST_P(BlockReaderTest, WhatIsNotInWholeSectorsOrPassesTheEndIsRefused) {
  const OwnedBlock block{0, 1, 1, 5000};
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  const auto reader = Opened(block);
  AlignedBuffer out(3 * kSectorBytes);
  const PieceToRead refused[] = {{1, out.bytes().first(kSectorBytes)},
                                 {0, out.bytes().first(100)},
                                 {0, out.bytes().subspan(8, kSectorBytes)},
                                 {0, out.bytes()},
                                 {3 * kSectorBytes, {}},
                                 {~0ull - kSectorBytes + 1, out.bytes().first(kSectorBytes)}};
  for (const PieceToRead& piece : refused) {
    EXPECT_TRUE(absl::IsInvalidArgument(reader->Read({&piece, 1}))) << piece.offset;
  }
  EXPECT_TRUE(reader->Read({}).ok());
}

TEST_P(BlockReaderTest, WhatIsNotThereOrOfAnotherKeyIsNotFound) {
  const OwnedBlock block{0, 1, 1, 5000};
  EXPECT_TRUE(absl::IsNotFound(log_->OpenBlock("tenant-0", block.key()).status()));
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  BlockKey other = block.key();
  other.full_key = "another key of the same hash";
  EXPECT_TRUE(absl::IsNotFound(log_->OpenBlock("tenant-0", other).status()));
  EXPECT_TRUE(absl::IsNotFound(log_->OpenBlock("tenant-1", block.key()).status()));
}

TEST_P(BlockReaderTest, HeldBlocksAreMovedAndReadWhereTheyAre) {
  const OwnedBlock held{0, 1, 1, 150000}, small{1, 2, 1, 5000}, other{0, 3, 1, 5000};
  for (const OwnedBlock& block : {held, small, other}) ASSERT_TRUE(AppendOne(*log_, block).ok());
  const uint64_t born = log_->Find("tenant-0", held.key().id)->born;
  const auto reader = Opened(held), second = Opened(held), third = Opened(small);
  Churn();
  // Victims without held blocks come first, and there are always some.
  EXPECT_EQ(log_->Find("tenant-0", held.key().id)->born, born);
  for (const auto& [read, block] :
       {std::pair(reader.get(), held), {second.get(), held}, {third.get(), small}}) {
    const absl::Status status = ReadAll(*read, block);
    EXPECT_TRUE(status.ok()) << status;
  }
}

// Every segment has some of a held block, so that only moving makes room.
TEST_P(BlockReaderTest, WhereEverySegmentHasHeldBlocksTheyAreCompacted) {
  std::vector<OwnedBlock> blocks;
  std::vector<std::unique_ptr<LoggedBlockReader>> readers;
  std::vector<uint64_t> born;
  for (uint32_t i = 0; i < 12; ++i) {
    blocks.push_back({0, i, 1, 30000});
    ASSERT_TRUE(AppendOne(*log_, blocks.back()).ok());
    readers.push_back(Opened(blocks.back()));
    born.push_back(log_->Find("tenant-0", blocks[i].key().id)->born);
    ASSERT_TRUE(AppendOne(*log_, {3, next_++, 1, 150000}).ok());
  }
  Churn();
  int moved = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto info = log_->Find("tenant-0", blocks[i].key().id);
    ASSERT_TRUE(info.has_value()) << i;
    moved += info->born != born[i];
    const absl::Status status = ReadAll(*readers[i], blocks[i]);
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_GT(moved, 0);
  // Held no more, they go like others.
  readers.clear();
  Churn();
  for (const OwnedBlock& block : blocks) {
    EXPECT_FALSE(log_->Find("tenant-0", block.key().id).has_value());
  }
}

// The read has begun when its segment is reclaimed and used anew.
TEST_P(BlockReaderTest, APieceThatIsMovedWhileItIsReadIsReadAgain) {
  std::vector<OwnedBlock> blocks;
  std::vector<std::unique_ptr<LoggedBlockReader>> readers;
  for (uint32_t i = 0; i < 12; ++i) {
    blocks.push_back({0, i, 1, 30000});
    ASSERT_TRUE(AppendOne(*log_, blocks.back()).ok());
    readers.push_back(Opened(blocks.back()));
    ASSERT_TRUE(AppendOne(*log_, {3, next_++, 1, 150000}).ok());
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    bool churned = false;
    const auto churn = [&] {
      if (std::exchange(churned, true)) return;
      Churn();
    };
    hooks_.fails_read = [&](uint64_t, uint64_t) { return churn(), false; };
    const absl::Status status = ReadAll(*readers[i], blocks[i]);
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_EQ(log_->Stats().broken_blocks, 0u);
}

TEST_P(BlockReaderTest, AfterAPurgeOrALaterBlockOfItsIdItIsNotFound) {
  for (const bool purged : {true, false}) {
    const OwnedBlock block{0, 1, 1, 50000};
    ASSERT_TRUE(AppendOne(*log_, block).ok());
    const auto reader = Opened(block);
    ASSERT_TRUE(ReadAll(*reader, block).ok());
    if (purged) {
      ASSERT_TRUE(log_->Purge("tenant-0", std::nullopt, {}).ok());
    } else {
      ASSERT_TRUE(AppendOne(*log_, {0, 1, 2, 50000}).ok());
    }
    EXPECT_TRUE(absl::IsNotFound(ReadAll(*reader, block)));
  }
}

TEST_P(BlockReaderTest, HalfOfTheLogMayBeHeld) {
  std::vector<std::unique_ptr<LoggedBlockReader>> readers;
  absl::Status status;
  uint32_t number = 0;
  for (; number < 30 && status.ok(); ++number) {
    const OwnedBlock block{0, number, 1, 100000};
    ASSERT_TRUE(AppendOne(*log_, block).ok()) << number;
    auto reader = log_->OpenBlock("tenant-0", block.key());
    status = reader.status();
    if (reader.ok()) readers.push_back(*std::move(reader));
  }
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_GE(readers.size(), kSegments * kSegment / 2 / 110000);
  Churn();
  for (uint32_t i = 0; i < readers.size(); ++i) {
    const absl::Status read = ReadAll(*readers[i], {0, i, 1, 100000});
    EXPECT_TRUE(read.ok()) << i << ": " << read;
  }
  readers.pop_back();
  EXPECT_TRUE(AppendOne(*log_, {1, 1, 1, 50000}).ok());
  EXPECT_TRUE(log_->OpenBlock("tenant-1", OwnedBlock{1, 1}.key()).ok());
}

TEST_P(BlockReaderTest, ABrokenSectorIsDataLossOnceAndOthersAreRightUntilThen) {
  if (GetParam()) GTEST_SKIP() << "finds the sector by its bytes";
  const OwnedBlock block{0, 1, 1, 100000};
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  const auto reader = Opened(block);
  medium_->FlipBit((PlaceOf(block, 10 * kSectorBytes) + 77) * 8);
  EXPECT_TRUE(Read(*reader, block, 0, 10).ok());
  EXPECT_TRUE(Read(*reader, block, 11, 14).ok());
  EXPECT_TRUE(absl::IsDataLoss(Read(*reader, block, 10, 1)));
  EXPECT_EQ(log_->Stats().broken_blocks, 1u);
  EXPECT_TRUE(absl::IsNotFound(Read(*reader, block, 0, 1)));
  EXPECT_FALSE(log_->Find("tenant-0", block.key().id).has_value());
}

TEST_P(BlockReaderTest, WhatCannotBeReadIsUnavailableAndStays) {
  const OwnedBlock block{0, 1, 1, 100000};
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  hooks_.fails_read = [](uint64_t, uint64_t) { return true; };
  EXPECT_TRUE(absl::IsUnavailable(log_->OpenBlock("tenant-0", block.key()).status()));
  hooks_.fails_read = nullptr;
  const auto reader = Opened(block);
  hooks_.fails_read = [](uint64_t, uint64_t) { return true; };
  EXPECT_TRUE(absl::IsUnavailable(ReadAll(*reader, block)));
  hooks_.fails_read = nullptr;
  EXPECT_TRUE(ReadAll(*reader, block).ok());
  EXPECT_EQ(log_->Stats().read_errors, 2u);
}

}  // namespace
}  // namespace quarry

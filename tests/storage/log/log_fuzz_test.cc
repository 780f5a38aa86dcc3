// Changed bytes for all that reads the log's own: with wrong checksums, and with mended ones, so
// that what is behind them is reached. Nothing crashes; what is taken keeps to its bounds; nothing
// wrong is read where checksums are wrong, and nothing but what has its digest in any case.
//
//   QUARRY_FUZZ_RUNS=N   executions of each target
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <optional>

#include <spdlog/spdlog.h>

#include "storage/log/footer.h"
#include "storage/log/log_recovery.h"
#include "storage/log/part_cipher.h"
#include "storage/log/purge_note.h"
#include "storage/log/tenant_keys.h"
#include "storage/slot_size.h"
#include "tests/storage/log/mended_frames.h"
#include "tests/storage/log/small_log.h"
#include "tests/support/byte_mutator.h"
#include "tests/support/given_number.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::ByteMutator;
using testing::SimulatedDisk;
using testing::SmallLog;

class LogFuzzTest : public ::testing::Test {
 protected:
  void SetUp() override { spdlog::set_level(spdlog::level::off); }
  void TearDown() override { spdlog::set_level(spdlog::level::info); }
  // Prints how many executions got behind the checksums.
  static void Report(uint64_t runs, uint64_t taken) {
    std::printf("%lu executions, %lu taken\n", runs, taken);
    EXPECT_GT(taken, runs / 100) << "next to nothing is read";
  }

  const SmallLog small_{false};
  ByteMutator mutator_{Seed()};
};

TEST_F(LogFuzzTest, Superblock) {
  const uint64_t runs = FuzzRuns(20000);
  Superblock whole;
  static_cast<LogLayout&>(whole) = small_.layout();
  whole.device = {1, 2, 3};
  SimulatedDisk disk({.bytes = whole.bytes()});
  uint64_t taken = 0;
  for (uint64_t run = 0; run < runs && !HasFailure(); ++run) {
    // By itself, or beside a right copy.
    if (mutator_.Below(4) == 0) {
      disk.Corrupt(whole.SuperblockOffset(2),
                   EncodeSuperblock(whole, whole.SuperblockOffset(2)).bytes());
    }
    const int copy = static_cast<int>(mutator_.Below(2));
    AlignedBuffer frame = EncodeSuperblock(whole, whole.SuperblockOffset(copy));
    for (uint64_t n = mutator_.Below(4); n > 0; --n) mutator_.Change(frame.bytes().first(80));
    if (mutator_.Below(4) != 0) testing::MendFrame(frame.bytes());
    const auto decoded = DecodeSuperblock(frame.bytes(), whole.SuperblockOffset(copy));
    if (decoded.ok()) {
      EXPECT_GE(decoded->segment_bytes, kMinSegmentBytes);
      EXPECT_LE(decoded->segment_bytes, kMaxSegmentBytes);
      EXPECT_GT(decoded->segments, 0u);
      EXPECT_LE(decoded->key_slots, LogLayout::kMostKeySlots);
    }
    disk.Corrupt(whole.SuperblockOffset(copy), frame.bytes());
    const auto opened = OpenSuperblock(&disk, SmallLog::kSegment, std::nullopt, [] { return 1; });
    if (opened.ok()) {
      ++taken;
      EXPECT_LE(opened->bytes(), disk.bytes());
    } else {
      EXPECT_TRUE(absl::IsFailedPrecondition(opened.status())) << opened.status();
    }
    for (int i = 0; i < LogLayout::kSuperblocks; ++i) {
      disk.Corrupt(whole.SuperblockOffset(i), AlignedBuffer(kSectorBytes).bytes());
    }
  }
  Report(runs, taken);
}

TEST_F(LogFuzzTest, Frames) {
  const uint64_t runs = FuzzRuns(20000);
  const FramePlace place{{1}, 3, 99, 1 << 20};
  PartFrame part;
  part.tenant = "tenant";
  part.key.full_key = "a whole key";
  part.block_bytes = 20000;
  part.part_offset = 8192;
  part.part_bytes = 11808;
  part.born = 7;
  PartFrame sealed = part;
  part.sums = {1, 2, 3};
  sealed.tags.resize(3);
  sealed.seal = {{1}, {2}, {3}};
  const PurgeFrame purge{"tenant", true, {}, {{BlockId{}, 1}, {BlockId{}, 2}, {BlockId{}, 3}}, 3};
  PurgeNote note;
  for (uint32_t i = 0; i < 10; ++i) note.Add(absl::StrCat("tenant-", i), i);
  uint64_t taken = 0;
  for (uint64_t run = 0; run < runs && !HasFailure(); ++run) {
    AlignedBuffer frames[] = {EncodePart(place, 8, part),   EncodePart(place, 8, sealed),
                              EncodePurge(place, 8, purge), EncodeCommit(place, 8, {3, 5}),
                              EncodeSegmentStart(place, 8), note.Encode(place, 8)};
    const std::span<std::byte> frame = frames[run % std::size(frames)].bytes();
    for (uint64_t n = mutator_.Below(4); n > 0; --n) mutator_.Change(frame.first(400));
    if (mutator_.Below(4) != 0) testing::MendFrame(frame);
    const auto as_part = DecodePart(frame, place, 8);
    if (as_part.ok()) {
      EXPECT_LE(as_part->part_bytes, kMaxSegmentBytes);
      EXPECT_LE(as_part->part_offset + as_part->part_bytes, as_part->block_bytes);
      EXPECT_LE(as_part->born, 8u);
    }
    const auto as_purge = DecodePurge(frame, place, 8);
    const auto as_commit = DecodeCommit(frame, place, 8);
    if (as_commit.ok()) {
      EXPECT_LE(as_commit->first + as_commit->count, 8u);
    }
    const auto as_note = DecodeNote(frame);
    if (as_note.ok()) {
      // It has room in its sector, and says the same again.
      const auto again = DecodeNote(as_note->second.Encode(place, 8).bytes());
      ASSERT_TRUE(again.ok()) << again.status();
      for (const char* const tenant : {"tenant-3", "another"}) {
        EXPECT_EQ(again->second.BoundOf(tenant), as_note->second.BoundOf(tenant));
      }
    }
    taken += as_part.ok() || as_purge.ok() || as_commit.ok() || as_note.ok() ||
             DecodeSegmentStart(frame).ok();
  }
  Report(runs, taken);
}

TEST_F(LogFuzzTest, Footer) {
  const uint64_t runs = FuzzRuns(20000);
  const auto disk = small_.Sealed();
  const auto superblock =
      OpenSuperblock(disk.get(), SmallLog::kSegment, std::nullopt, [] { return 1; });
  ASSERT_TRUE(superblock.ok()) << superblock.status();
  const uint64_t start = superblock->SegmentOffset(0), end = superblock->SegmentOffset(1);
  // The last entries, and the sector that names them.
  const std::vector<std::byte> whole = disk->Peek(end - 2 * kSectorBytes, 2 * kSectorBytes);
  const auto before = ReadFooter(disk.get(), *superblock, 0, std::nullopt);
  ASSERT_TRUE(before.ok()) << before.status();
  uint64_t entry_bytes = 0, taken = 0;
  for (const FooterEntry& entry : before->entries) entry_bytes += FooterEntryBytes(entry.tenant);
  ASSERT_LE(entry_bytes, kSectorBytes);
  for (uint64_t run = 0; run < runs && !HasFailure(); ++run) {
    std::vector<std::byte> bytes = whole;
    for (uint64_t n = mutator_.Below(4); n > 0; --n) {
      mutator_.Change(mutator_.Below(4) == 0 ? std::span(bytes).subspan(kSectorBytes, 80)
                                             : std::span(bytes).first(entry_bytes));
    }
    if (mutator_.Below(4) != 0) testing::MendFooter(bytes);
    disk->Corrupt(end - bytes.size(), bytes);
    const auto footer = ReadFooter(disk.get(), *superblock, 0, std::nullopt);
    if (!footer.ok()) {
      EXPECT_TRUE(absl::IsDataLoss(footer.status())) << footer.status();
      continue;
    }
    ++taken;
    uint64_t at = start + kSectorBytes;
    for (const FooterEntry& entry : footer->entries) {
      ASSERT_TRUE(entry.kind == FrameKind::kPart || entry.kind == FrameKind::kPurge);
      ASSERT_GE(entry.offset, at) << "one lies over another";
      const bool is_part = entry.kind == FrameKind::kPart;
      at = entry.offset + entry.frame_bytes;
      if (is_part) at += RoundUp(entry.part_bytes, kSectorBytes);
      ASSERT_LE(at, end);
      ASSERT_LE(entry.frame_bytes, kMaxFrameBytes);
      ASSERT_LE(entry.born, entry.sequence);
      ASSERT_LT(entry.sequence, footer->sequence);
    }
  }
  Report(runs, taken);
}

// Of a slot whose copies are changed no other key comes, and beside one that is right the other may
// be anything.
TEST_F(LogFuzzTest, KeySlots) {
  const uint64_t runs = FuzzRuns(20000);
  Superblock superblock;
  static_cast<LogLayout&>(superblock) = {SmallLog::kSegment, SmallLog::kSegments, 2};
  superblock.device = {1, 2, 3};
  SimulatedDisk disk({.bytes = superblock.bytes()});
  const std::array<uint8_t, Secret::kBytes> bytes{7};
  const Secret log_key(bytes);
  auto keys = TenantKeys::Recover(&disk, superblock, log_key);
  ASSERT_TRUE(keys.ok()) << keys.status();
  const auto drawn = (*keys)->Draw("tenant", 5);
  ASSERT_TRUE(drawn.ok()) << drawn.status();
  const uint64_t places[] = {superblock.KeyOffset(0, 0), superblock.KeyOffset(1, 0)};
  std::vector<std::byte> wholes[2];
  for (int area = 0; area < 2; ++area) wholes[area] = disk.Peek(places[area], kSectorBytes);
  uint64_t taken = 0;
  for (uint64_t run = 0; run < runs && !HasFailure(); ++run) {
    bool right = false;  // one of them, or both
    for (int area = 0; area < 2; ++area) {
      std::vector<std::byte> slot = wholes[area];
      for (uint64_t n = mutator_.Below(3); n > 0; --n) {
        mutator_.Change(std::span(slot).first(200));
      }
      right |= slot == wholes[area];
      if (mutator_.Below(4) != 0) testing::MendFrame(slot);
      disk.Corrupt(places[area], slot);
    }
    keys = TenantKeys::Recover(&disk, superblock, log_key);
    ASSERT_TRUE(keys.ok()) << keys.status();
    ASSERT_TRUE(disk.Sync().ok());  // what was mended, that the disk keeps it once
    const auto writing = (*keys)->ForWriting("tenant");
    if (right) {
      EXPECT_TRUE(writing.has_value());
    }
    if (!writing.has_value()) continue;
    ++taken;
    EXPECT_EQ(writing->seal.key, drawn->seal.key);
    const auto key = (*keys)->Find(writing->seal.key);
    ASSERT_NE(key, nullptr);
    EXPECT_TRUE(std::ranges::equal(PartKey(*key, drawn->seal).bytes(), drawn->part_key->bytes()));
  }
  Report(runs, taken);
}

// Reads what a log has of any name; whatever it gives has its digest.
void ReadAnything(BlockLog& log) {
  for (uint32_t tenant = 0; tenant < 2; ++tenant) {
    for (uint32_t number = 1; number < 5; ++number) {
      const testing::OwnedBlock block{tenant, number};
      const auto info = log.Find(block.tenant_name(), block.key().id);
      if (!info.has_value()) continue;
      ASSERT_LE(info->bytes, SmallLog::kSegments * SmallLog::kSegment);
      AlignedBuffer memory(RoundUp(info->bytes, kSectorBytes));
      const auto out = memory.bytes().first(info->bytes);
      const auto read = log.Read(block.tenant_name(), block.key(), out);
      if (read.ok()) {
        EXPECT_TRUE(*read == DigestOf(out)) << tenant << "/" << number;
      }
    }
  }
}

class ImageFuzzTest : public LogFuzzTest, public ::testing::WithParamInterface<bool> {};

TEST_P(ImageFuzzTest, Image) {
  const uint64_t runs = FuzzRuns(1500);
  const SmallLog small(GetParam());
  const LogLayout& layout = small.layout();
  const std::unique_ptr<SimulatedDisk> wholes[] = {small.Stopped(), small.Sealed()};
  std::vector<uint64_t> metadata[2];
  for (int i = 0; i < 2; ++i) metadata[i] = SmallLog::MetadataSectors(*wholes[i]);
  uint64_t taken = 0, mended = 0;
  for (uint64_t run = 0; run < runs && !HasFailure(); ++run) {
    SCOPED_TRACE(absl::StrCat("run ", run));
    auto disk = wholes[run % 2]->Clone();
    const bool mends = mutator_.Below(4) != 0;
    // Of what was purged no one broken sector brings back anything; two may.
    for (uint64_t n = mends ? 1 + mutator_.Below(3) : 1; n > 0; --n) {
      const std::vector<uint64_t>& sectors = metadata[run % 2];
      const uint64_t sector = sectors[mutator_.Below(sectors.size())];
      std::vector<std::byte> bytes = disk->Peek(sector * kSectorBytes, kSectorBytes);
      if (mutator_.Below(8) == 0) {  // a whole one, from elsewhere
        bytes = disk->Peek(sectors[mutator_.Below(sectors.size())] * kSectorBytes, kSectorBytes);
      }
      const bool frame = PeekFrame(bytes).ok();
      for (uint64_t changes = 1 + mutator_.Below(3); changes > 0; --changes) {
        mutator_.Change(std::span(bytes).first(frame ? 400 : 2600));
      }
      disk->Corrupt(sector * kSectorBytes, bytes);
      if (!mends) continue;
      const uint64_t offset = sector * kSectorBytes;
      if (offset < layout.SegmentOffset(0) || offset >= layout.SegmentOffset(layout.segments)) {
        testing::MendFrame(bytes);
        disk->Corrupt(offset, bytes);
        continue;
      }
      const uint64_t start = offset - (offset - layout.SegmentOffset(0)) % SmallLog::kSegment;
      std::vector<std::byte> segment = disk->Peek(start, SmallLog::kSegment);
      testing::MendSegment(segment);
      disk->Corrupt(start, segment);
    }
    SimulatedDisk* const raw = disk.get();
    auto log = small.Open(std::move(disk));
    if (!log.ok()) {
      EXPECT_TRUE(absl::IsFailedPrecondition(log.status())) << log.status();
      continue;
    }
    ++taken;
    mended += mends ? 1 : 0;
    if (!mends) (void)small.Check(**log);
    ReadAnything(**log);
    if (run % 8 != 0) continue;
    // The log goes on, and so it does after another start.
    for (uint32_t number = 2; number < 4; ++number) {
      (void)testing::AppendOne(**log, {0, number, 9, 20000});
    }
    (void)(*log)->Purge("tenant-1", std::nullopt, {});
    auto restarted = small.Open(raw->Crashed(testing::PowerCut::kAllKept, 1));
    if (restarted.ok()) ReadAnything(**restarted);
  }
  std::printf("%lu with mended checksums\n", mended);
  Report(runs, taken);
}

INSTANTIATE_TEST_SUITE_P(Logs, ImageFuzzTest, ::testing::Bool(), [](const auto& instance) {
  return instance.param ? "Encrypted" : "Plain";
});

}  // namespace
}  // namespace quarry

// Logs that are encrypted: what is on the disk, what of it is believed, and what is left of keys.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <set>
#include <string_view>
#include <tuple>

#include "storage/log/checksum.h"
#include "storage/log/frame_codec.h"
#include "tests/storage/disk/hooked_disk.h"
#include "tests/storage/disk/simulated_disk.h"
#include "tests/storage/log/log_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::AppendOne;
using testing::Fault;
using testing::OwnedBlock;
using testing::ReadVersion;
using testing::SimulatedDisk;

constexpr uint64_t kSegment = 256 << 10;
constexpr uint32_t kSegments = 12;
constexpr LogLayout kLayout = LogLayout::Encrypted(kSegment, kSegments);

class LogEncryptionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    disk_ = std::make_unique<SimulatedDisk>(
        testing::SimulatedDiskOptions{.bytes = kLayout.bytes(), .seed = Seed()});
    Open();
  }
  absl::StatusOr<std::unique_ptr<BlockLog>> TryOpen(SimulatedDisk* disk) {
    BlockLogOptions options;
    options.segment_bytes = kSegment;
    options.max_part_bytes = 32 << 10;
    options.keep = keep_;
    if (digit_ != 0) options.key.environment = testing::SetTestKey(digit_);
    return BlockLog::Open(std::make_unique<testing::HookedDisk>(disk, &hooks_), options);
  }
  void Open() {
    log_ = nullptr;
    auto log = TryOpen(disk_.get());
    ASSERT_TRUE(log.ok()) << log.status();
    log_ = *std::move(log);
  }
  // On another disk from here on.
  void Use(std::unique_ptr<SimulatedDisk> disk) {
    log_ = nullptr;
    disk_ = std::move(disk);
  }
  absl::Status PurgeTenant(uint32_t tenant) {
    return log_->Purge(OwnedBlock{tenant}.tenant_name(), std::nullopt, {}).status();
  }
  std::string Image() const {
    const std::vector<std::byte> bytes = disk_->Peek(0, disk_->bytes());
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  // Places of frames with this magic.
  std::vector<uint64_t> Frames(std::string_view magic) const {
    std::vector<uint64_t> out;
    for (uint64_t at = 0; at < disk_->bytes(); at += kSectorBytes) {
      if (std::memcmp(disk_->Peek(at, 8).data(), magic.data(), 8) == 0) out.push_back(at);
    }
    return out;
  }
  // Copies of keys that name the tenant.
  size_t Keys(uint32_t tenant) const {
    size_t count = 0;
    for (const uint64_t at : Frames("QRYTNKEY")) {
      const std::vector<std::byte> bytes = disk_->Peek(at, kSectorBytes);
      const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
      count += text.find(OwnedBlock{tenant}.tenant_name()) != std::string_view::npos ? 1 : 0;
    }
    return count;
  }

  char digit_ = '7';
  testing::DiskHooks hooks_;
  std::function<bool(const ReclaimCandidate&)> keep_;
  std::unique_ptr<SimulatedDisk> disk_;
  std::unique_ptr<BlockLog> log_;
};

TEST_F(LogEncryptionTest, BlocksOfAllSizesComeBackAlsoAfterARestart) {
  const uint64_t sizes[] = {8, 100, 4095, 4096, 4097, 32767, 32768, 40000, 200000};
  for (uint32_t i = 0; i < std::size(sizes); ++i) {
    const absl::Status status = AppendOne(*log_, {i % 3, i, i + 1, sizes[i]});
    ASSERT_TRUE(status.ok()) << status;
  }
  for (int round = 0; round < 3; ++round) {
    for (uint32_t i = 0; i < std::size(sizes); ++i) {
      const auto version = ReadVersion(*log_, {i % 3, i});
      ASSERT_TRUE(version.ok()) << version.status();
      EXPECT_EQ(*version, i + 1);
    }
    Open();
  }
}

TEST_F(LogEncryptionTest, NothingOfThePlaintextIsOnTheDisk) {
  const std::string marker = "what the prompt says, word for word";
  std::string text;
  while (text.size() < 100000) text += marker;
  BlockKey key = OwnedBlock{0, 1}.key();
  key.full_key = "key of " + marker;
  AlignedBuffer buffer(RoundUp(text.size(), kSectorBytes));
  std::memcpy(buffer.bytes().data(), text.data(), text.size());
  const std::span<const std::byte> bytes = std::as_const(buffer).bytes().first(text.size());
  const BlockToLog block{"tenant-0", &key, DigestOf(bytes), bytes, nullptr};
  const absl::Status appended = log_->Append({&block, 1})[0];
  ASSERT_TRUE(appended.ok()) << appended;
  Open();  // seals
  std::vector<std::byte> out(text.size());
  const auto read = log_->Read("tenant-0", key, out);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_TRUE(std::equal(out.begin(), out.end(), bytes.begin()));
  const std::string image = Image();
  for (size_t i = 0; i + 8 <= marker.size(); ++i) {
    ASSERT_EQ(image.find(marker.substr(i, 8)), std::string::npos) << i;
  }
  std::string digest(16, '\0');
  for (uint64_t part = 0; part <= bytes.size(); part += 32 << 10) {
    const ByteDigest of = part == 0 ? *read : DigestOf(bytes.subspan(part - (32 << 10), 32 << 10));
    std::memcpy(digest.data(), &of, 16);
    EXPECT_EQ(image.find(digest.substr(0, 8)), std::string::npos) << "a fingerprint";
  }
  EXPECT_EQ(image.find(std::string(32, '\x77')), std::string::npos) << "the key";
}

// Every byte of a frame and some of the payload: with the frame's checksum made right again.
TEST_F(LogEncryptionTest, WhatWasTamperedWithIsAMiss) {
  const OwnedBlock block{0, 1, 1, 5000};
  ASSERT_TRUE(AppendOne(*log_, block).ok());
  Open();
  const std::vector<uint64_t> frames = Frames("QRYBLOCK");
  ASSERT_EQ(frames.size(), 1u);
  PartFrame part;
  part.tenant = block.tenant_name();
  part.key = block.key();
  const uint64_t frame_end = PartSecretOffset(part) + PartSecretBytes(part);
  const auto sealed = disk_->Clone();
  for (uint64_t at = 0; at < kSectorBytes + block.bytes; at += at < frame_end ? 1 : 997) {
    if ((at >= kFrameCrcOffset && at < kFrameCrcOffset + kFrameCrcBytes) ||
        (at >= frame_end && at < kSectorBytes)) {
      continue;  // means nothing
    }
    Use(sealed->Clone());
    disk_->FlipBit((frames[0] + at) * 8 + at % 8);
    std::vector<std::byte> frame = disk_->Peek(frames[0], kSectorBytes);
    std::memset(frame.data() + kFrameCrcOffset, 0, kFrameCrcBytes);
    const uint32_t crc = Crc32c(frame);
    std::memcpy(frame.data() + kFrameCrcOffset, &crc, sizeof(crc));
    disk_->Corrupt(frames[0], frame);
    Open();
    const auto version = ReadVersion(*log_, block);
    ASSERT_TRUE(absl::IsDataLoss(version.status())) << at << ": " << version.status();
    ASSERT_EQ(log_->Stats().broken_blocks, 1u);
    ASSERT_TRUE(absl::IsNotFound(ReadVersion(*log_, block).status()));
  }
}

TEST_F(LogEncryptionTest, SwappedBytesAreMisses) {
  for (uint32_t i = 0; i < 2; ++i) ASSERT_TRUE(AppendOne(*log_, {0, i, 1, 8192}).ok());
  const std::vector<uint64_t> frames = Frames("QRYBLOCK");
  ASSERT_EQ(frames.size(), 2u);
  const auto first = disk_->Peek(frames[0] + kSectorBytes, 8192);
  disk_->Corrupt(frames[0] + kSectorBytes, disk_->Peek(frames[1] + kSectorBytes, 8192));
  disk_->Corrupt(frames[1] + kSectorBytes, first);
  for (uint32_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(absl::IsDataLoss(ReadVersion(*log_, {0, i}).status()));
  }
  EXPECT_EQ(log_->Stats().broken_blocks, 2u);
}

TEST_F(LogEncryptionTest, AnotherKeyIsRefusedAndNothingIsChanged) {
  ASSERT_TRUE(AppendOne(*log_, {0, 1, 1, 5000}).ok());
  log_ = nullptr;
  const auto refused = [&](SimulatedDisk* disk) {
    const uint64_t writes = disk->counts().writes;
    const absl::Status status = TryOpen(disk).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(disk->counts().writes, writes);
    return std::string(status.message());
  };
  digit_ = '8';
  EXPECT_NE(refused(disk_.get()).find("QUARRY_TEST_DISK_KEY"), std::string::npos);
  digit_ = 0;
  EXPECT_NE(refused(disk_.get()).find("is encrypted"), std::string::npos);
  digit_ = '7';
  Open();
  EXPECT_TRUE(ReadVersion(*log_, {0, 1}).ok());
  // And one for a log that has none.
  digit_ = 0;
  Use(std::make_unique<SimulatedDisk>(testing::SimulatedDiskOptions{.bytes = kLayout.bytes()}));
  Open();
  log_ = nullptr;
  digit_ = '7';
  EXPECT_NE(refused(disk_.get()).find("is not encrypted"), std::string::npos);
}

// All that is ever encrypted in a life of crashes, reclaiming and a disk that is put back.
TEST_F(LogEncryptionTest, NoNonceIsUsedTwiceWithAKey) {
  std::set<std::tuple<KeyId, std::array<uint8_t, 16>, uint64_t>> used;
  uint64_t written = 0;
  hooks_.before_write = [&](WritePieces pieces) {
    for (const auto& piece : pieces) {
      if (piece.size() % kSectorBytes != 0 || std::memcmp(piece.data(), "QRYBLOCK", 8) != 0)
        continue;
      const auto head = PeekFrame(piece.first(kSectorBytes));
      ASSERT_TRUE(head.ok());
      const auto part = DecodePart(piece, head->place, head->sequence);
      ASSERT_TRUE(part.ok()) << part.status();
      ASSERT_TRUE(part->seal.sealed());
      ++written;
      EXPECT_TRUE(used.insert({part->seal.key, part->seal.salt, head->sequence}).second)
          << "sequence " << head->sequence;
    }
  };
  keep_ = [](const ReclaimCandidate& block) { return block.tenant == "tenant-0"; };
  std::mt19937_64 random(Seed());
  std::unique_ptr<SimulatedDisk> backup;
  uint32_t version = 0;
  for (int life = 0; life < 30; ++life) {
    disk_->Schedule({Fault::kCrash, 40 + random() % 300});
    auto log = TryOpen(disk_.get());
    for (int i = 0; log.ok() && i < 100 && disk_->struck(Fault::kCrash) == 0; ++i) {
      (void)AppendOne(**log,
                      {static_cast<uint32_t>(random() % 2), static_cast<uint32_t>(random() % 50),
                       ++version, 8 + random() % 60000});
      if (random() % 40 == 0) (void)(*log)->Purge("tenant-1", std::nullopt, {});
    }
    if (log.ok()) log->reset();
    disk_ = disk_->Crashed(random());
    if (life == 10) backup = disk_->Clone();
    if (life == 20) disk_ = std::move(backup);
  }
  EXPECT_GT(written, 500u);
}

TEST_F(LogEncryptionTest, APurgedTenantsKeyIsNowhere) {
  for (uint32_t tenant = 0; tenant < 2; ++tenant) {
    ASSERT_TRUE(AppendOne(*log_, {tenant, 1, 1, 5000}).ok());
    EXPECT_EQ(Keys(tenant), 2u) << "two copies";
  }
  // Some of a tenant's blocks take none with them.
  const BlockId id[] = {OwnedBlock{0, 77}.key().id};
  ASSERT_TRUE(log_->Purge("tenant-0", std::nullopt, id).ok());
  ASSERT_TRUE(log_->Purge("tenant-0", OwnedBlock{0, 2}.key().name_space, {}).ok());
  EXPECT_EQ(Keys(0), 2u);
  EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 1u);
  const auto before = disk_->Peek(kLayout.KeyOffset(0, 0), kSectorBytes);
  ASSERT_TRUE(PurgeTenant(0).ok());
  // Acknowledged: whatever the power cut takes.
  for (int cut = 0; cut < testing::kPowerCuts; ++cut) {
    Use(disk_->Crashed(static_cast<testing::PowerCut>(cut), 1));
    EXPECT_EQ(Keys(0), 0u);
    EXPECT_EQ(Keys(1), 2u);
  }
  Open();
  EXPECT_FALSE(ReadVersion(*log_, {0, 1}).ok());
  EXPECT_EQ(*ReadVersion(*log_, {1, 1}), 1u);
  // What comes then has another key.
  ASSERT_TRUE(AppendOne(*log_, {0, 1, 2, 5000}).ok());
  EXPECT_NE(disk_->Peek(kLayout.KeyOffset(0, 0), kSectorBytes), before);
  EXPECT_EQ(Keys(0), 2u);
  Open();
  EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 2u);
}

// The power goes at any operation of a purge: the key is gone if the purge counts, and if it does
// not what is found is right.
TEST_F(LogEncryptionTest, PowerCutsInAPurgeOfATenant) {
  ASSERT_TRUE(AppendOne(*log_, {0, 1, 1, 5000}).ok());
  ASSERT_TRUE(AppendOne(*log_, {1, 1, 1, 5000}).ok());
  const auto before = disk_->Clone();
  bool ended = false;
  for (uint64_t at = 0; !ended; ++at) {
    for (int cut = 0; cut < testing::kPowerCuts; ++cut) {
      SCOPED_TRACE(absl::StrCat("operation ", at, ", cut ", cut));
      Use(before->Clone());
      Open();
      disk_->Schedule({Fault::kCrash, disk_->operations() + at});
      ended = PurgeTenant(0).ok() && disk_->struck(Fault::kCrash) == 0;
      Use(disk_->Crashed(static_cast<testing::PowerCut>(cut), at));
      Open();
      const bool purged = !log_->Find("tenant-0", OwnedBlock{0, 1}.key().id).has_value();
      if (ended) {
        EXPECT_TRUE(purged);
      }
      if (purged) {
        EXPECT_EQ(Keys(0), 0u);
      }
      EXPECT_EQ(*ReadVersion(*log_, {1, 1}), 1u);
      ASSERT_TRUE(AppendOne(*log_, {0, 1, 2, 5000}).ok());
      Open();
      EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 2u);
    }
  }
}

// A purge that failed may count after a restart, and end the keys of before; what was logged after
// it has another.
TEST_F(LogEncryptionTest, WhatComesAfterAFailedPurgeOutlivesItsKeys) {
  ASSERT_TRUE(AppendOne(*log_, {0, 1, 1, 5000}).ok());
  hooks_.fails_sync = [] { return true; };
  EXPECT_FALSE(PurgeTenant(0).ok());
  hooks_ = {};
  ASSERT_TRUE(AppendOne(*log_, {0, 2, 1, 5000}).ok());
  Use(disk_->Crashed(testing::PowerCut::kAllKept, 1));
  Open();
  EXPECT_FALSE(ReadVersion(*log_, {0, 1}).ok());
  EXPECT_EQ(*ReadVersion(*log_, {0, 2}), 1u);
  EXPECT_EQ(Keys(0), 2u) << "of the later one";
}

TEST_F(LogEncryptionTest, EitherCopyOfAKeyIsEnoughAndMendsTheOther) {
  ASSERT_TRUE(AppendOne(*log_, {0, 1, 1, 5000}).ok());
  for (const int area : {0, 1, 0}) {
    disk_->FlipBit((kLayout.KeyOffset(area, 0) + 100) * 8);
    Open();
    EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 1u);
    EXPECT_EQ(log_->Stats().unreadable_keys, 0u);
  }
  hooks_.fails_read = [](uint64_t offset, uint64_t bytes) {
    const uint64_t at = kLayout.KeyOffset(1, 0);
    return offset < at + kSectorBytes && offset + bytes > at;
  };
  Open();
  EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 1u);
}

// Its frame is right, its tag is not.
TEST_F(LogEncryptionTest, ACopyOfAKeyThatCannotBeUnwrappedIsMendedByTheOther) {
  ASSERT_TRUE(AppendOne(*log_, {0, 1, 1, 5000}).ok());
  for (const int area : {0, 1, 0}) {
    const uint64_t at = kLayout.KeyOffset(area, 0);
    disk_->FlipBit((at + kFrameHeadBytes + 20) * 8);
    std::vector<std::byte> frame = disk_->Peek(at, kSectorBytes);
    std::memset(frame.data() + kFrameCrcOffset, 0, kFrameCrcBytes);
    const uint32_t crc = Crc32c(frame);
    std::memcpy(frame.data() + kFrameCrcOffset, &crc, sizeof(crc));
    disk_->Corrupt(at, frame);
    Open();
    EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 1u) << area;
    EXPECT_EQ(log_->Stats().unreadable_keys, 0u);
  }
}

TEST_F(LogEncryptionTest, BlocksOfAKeyThatCannotBeReadAreMissesUntilItCan) {
  ASSERT_TRUE(AppendOne(*log_, {0, 1, 1, 5000}).ok());
  ASSERT_TRUE(AppendOne(*log_, {1, 1, 1, 5000}).ok());
  hooks_.fails_read = [](uint64_t offset, uint64_t bytes) {
    for (const int area : {0, 1}) {
      const uint64_t at = kLayout.KeyOffset(area, 0);
      if (offset < at + kSectorBytes && offset + bytes > at) return true;
    }
    return false;
  };
  Open();
  EXPECT_EQ(log_->Stats().unreadable_keys, 1u);
  EXPECT_TRUE(absl::IsDataLoss(ReadVersion(*log_, {0, 1}).status()));
  EXPECT_EQ(log_->Stats().broken_blocks, 1u);
  EXPECT_EQ(*ReadVersion(*log_, {1, 1}), 1u);
  ASSERT_TRUE(AppendOne(*log_, {0, 2, 1, 5000}).ok());  // with a new key
  EXPECT_EQ(*ReadVersion(*log_, {0, 2}), 1u);
  hooks_ = {};
  Open();
  EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 1u);
  EXPECT_EQ(*ReadVersion(*log_, {0, 2}), 1u);
  ASSERT_TRUE(PurgeTenant(0).ok());
  EXPECT_EQ(Keys(0), 0u) << "both";
}

// A wrapped key that is put into another tenant's slot, its frame made right.
TEST_F(LogEncryptionTest, AKeyIsOfItsSlotAndTenant) {
  ASSERT_TRUE(AppendOne(*log_, {0, 1, 1, 5000}).ok());
  ASSERT_TRUE(AppendOne(*log_, {1, 1, 1, 5000}).ok());
  for (const int area : {0, 1}) {
    std::vector<std::byte> frame = disk_->Peek(kLayout.KeyOffset(area, 0), kSectorBytes);
    const std::string name = OwnedBlock{0}.tenant_name();
    const auto at = std::search(frame.begin(), frame.end(), name.begin(), name.end(),
                                [](std::byte a, char b) { return static_cast<char>(a) == b; });
    ASSERT_NE(at, frame.end());
    *(at + 7) = std::byte{'1'};
    std::memset(frame.data() + kFrameCrcOffset, 0, kFrameCrcBytes);
    const uint32_t crc = Crc32c(frame);
    std::memcpy(frame.data() + kFrameCrcOffset, &crc, sizeof(crc));
    disk_->Corrupt(kLayout.KeyOffset(area, 0), frame);
  }
  Open();
  EXPECT_EQ(log_->Stats().unreadable_keys, 1u);
  EXPECT_FALSE(ReadVersion(*log_, {0, 1}).ok());
  EXPECT_EQ(*ReadVersion(*log_, {1, 1}), 1u);
}

// A key whose commit failed is not known to be there: nothing durable is encrypted with it.
TEST_F(LogEncryptionTest, AKeyOfAFailedCommitIsNotUsed) {
  for (const bool writes : {false, true}) {
    SetUp();
    int left = 1;
    if (writes) {
      hooks_.fails_write = [&left](uint64_t offset, uint64_t) {
        return offset == kLayout.KeyOffset(1, 0) && left-- > 0;
      };
    } else {
      // That of the commit, after the one of the segment's start.
      left = 2;
      hooks_.fails_sync = [&left] { return --left == 0; };
    }
    EXPECT_TRUE(absl::IsUnavailable(AppendOne(*log_, {0, 1, 1, 5000})));
    hooks_ = {};
    ASSERT_TRUE(AppendOne(*log_, {0, 1, 2, 5000}).ok());
    EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 2u);
    Use(disk_->Crashed(testing::PowerCut::kNoneKept, 1));
    Open();
    EXPECT_EQ(*ReadVersion(*log_, {0, 1}), 2u);
    ASSERT_TRUE(PurgeTenant(0).ok());
    EXPECT_EQ(Keys(0), 0u) << "all that may be there";
  }
}

TEST_F(LogEncryptionTest, WithoutASlotATenantIsNotLoggedAndOthersAre) {
  for (uint32_t i = 0; i < kLayout.key_slots; ++i) {
    ASSERT_TRUE(AppendOne(*log_, {i, 1, 1, 8}).ok()) << i;
  }
  EXPECT_TRUE(absl::IsFailedPrecondition(AppendOne(*log_, {kLayout.key_slots, 1, 1, 8})));
  ASSERT_TRUE(AppendOne(*log_, {5, 2, 1, 8}).ok());
  ASSERT_TRUE(PurgeTenant(5).ok());
  ASSERT_TRUE(AppendOne(*log_, {kLayout.key_slots, 1, 1, 8}).ok());
  Open();
  EXPECT_EQ(*ReadVersion(*log_, {kLayout.key_slots, 1}), 1u);
}

}  // namespace
}  // namespace quarry

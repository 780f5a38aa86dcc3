#include "storage/log/frames.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "storage/log/checksum.h"
#include "storage/log/footer.h"

namespace quarry {
namespace {

const FramePlace kPlace{{1, 2, 3}, 7, 0x1234567890abcdef, 5 * kSectorBytes};
constexpr uint64_t kSequence = 99;

PartFrame Part() {
  PartFrame part;
  part.tenant = "a tenant";
  part.key.id.bytes[0] = 1;
  part.key.parent.bytes[1] = 2;
  part.key.name_space.bytes[2] = 3;
  part.key.full_key = std::string("whole\0key", 9);
  part.block_digest = {4, 5};
  part.digest = {6, 7};
  part.block_bytes = 20000;
  part.part_offset = 8192;
  part.part_bytes = 11808;
  part.born = 98;
  part.sums = {11, 12, 13};
  return part;
}

TEST(FramesTest, ChecksumIsCrc32c) {
  const std::string text = "123456789";
  EXPECT_EQ(Crc32c(std::as_bytes(std::span(text))), 0xe3069283u);
  EXPECT_EQ(Crc32c(std::as_bytes(std::span(text).subspan(4)),
                   Crc32c(std::as_bytes(std::span(text).first(4)))),
            0xe3069283u);
}

TEST(FramesTest, PartsComeBack) {
  const AlignedBuffer frame = EncodePart(kPlace, kSequence, Part());
  EXPECT_EQ(frame.size(),
            PartFrameBytes(Part().tenant, Part().key, Part().part_bytes, Sealing::kPlain));
  const auto head = PeekFrame(frame.bytes().first(kSectorBytes));
  ASSERT_TRUE(head.ok()) << head.status();
  EXPECT_EQ(head->kind, FrameKind::kPart);
  EXPECT_EQ(head->place, kPlace);
  EXPECT_EQ(head->sequence, kSequence);
  const auto part = DecodePart(frame.bytes(), kPlace, kSequence);
  ASSERT_TRUE(part.ok()) << part.status();
  EXPECT_EQ(part->tenant, "a tenant");
  EXPECT_EQ(part->key.full_key, Part().key.full_key);
  EXPECT_EQ(part->key.id, Part().key.id);
  EXPECT_EQ(part->key.parent, Part().key.parent);
  EXPECT_EQ(part->key.name_space, Part().key.name_space);
  EXPECT_EQ(part->block_digest, Part().block_digest);
  EXPECT_EQ(part->digest, Part().digest);
  EXPECT_EQ(part->part_offset, 8192u);
  EXPECT_EQ(part->born, 98u);
  EXPECT_EQ(part->sums, Part().sums);
}

TEST(FramesTest, KeysOfSeveralSectors) {
  PartFrame long_key = Part();
  long_key.key.full_key.assign(9000, 'k');
  const AlignedBuffer frame = EncodePart(kPlace, kSequence, long_key);
  EXPECT_EQ(frame.size(), 3 * kSectorBytes);
  const auto part = DecodePart(frame.bytes(), kPlace, kSequence);
  ASSERT_TRUE(part.ok()) << part.status();
  EXPECT_EQ(part->key.full_key, long_key.key.full_key);
}

// Whatever is elsewhere, of another use of the segment, of another disk or number, is refused.
TEST(FramesTest, FramesOfOtherPlacesAreDataLoss) {
  const AlignedBuffer frame = EncodePart(kPlace, kSequence, Part());
  FramePlace other = kPlace;
  other.offset += kSectorBytes;
  EXPECT_TRUE(absl::IsDataLoss(DecodePart(frame.bytes(), other, kSequence).status()));
  other = kPlace;
  ++other.segment;
  EXPECT_TRUE(absl::IsDataLoss(DecodePart(frame.bytes(), other, kSequence).status()));
  other = kPlace;
  ++other.generation;
  EXPECT_TRUE(absl::IsDataLoss(DecodePart(frame.bytes(), other, kSequence).status()));
  other = kPlace;
  ++other.device[15];
  EXPECT_TRUE(absl::IsDataLoss(DecodePart(frame.bytes(), other, kSequence).status()));
  EXPECT_TRUE(absl::IsDataLoss(DecodePart(frame.bytes(), kPlace, kSequence + 1).status()));
  EXPECT_TRUE(absl::IsDataLoss(DecodePurge(frame.bytes(), kPlace, kSequence).status()));
}

TEST(FramesTest, EveryFlippedBitIsSeen) {
  const Superblock superblock{{kMinSegmentBytes, 5}, {9}};
  const PurgeFrame purge{"a tenant", true, {}, {{BlockId{}, 1}, {BlockId{}, 2}}, 3};
  FooterEntry entry = EntryOf(Part());
  entry.offset = 0;
  entry.frame_bytes = kSectorBytes;
  entry.sequence = 98;
  FooterEntry purge_entry = EntryOf(purge);
  purge_entry.offset = 4 * kSectorBytes;
  purge_entry.frame_bytes = kSectorBytes;
  purge_entry.sequence = 99;
  const FooterEntry entries[] = {entry, purge_entry};
  const FramePlace end{kPlace.device, 7, 1, 8 * kSectorBytes};
  AlignedBuffer frames[] = {
      EncodeSuperblock(superblock, 4096),       EncodeSegmentStart(kPlace, 1),
      EncodePart(kPlace, kSequence, Part()),    EncodePurge(kPlace, kSequence, purge),
      EncodeCommit(kPlace, kSequence, {90, 5}), EncodeFooter(end, 100, entries)};
  const auto decoded = [&](size_t i, std::span<const std::byte> frame) {
    switch (i) {
      case 0:
        return DecodeSuperblock(frame, 4096).ok();
      case 1:
        return DecodeSegmentStart(frame).ok();
      case 2:
        return DecodePart(frame, kPlace, kSequence).ok();
      case 3:
        return DecodePurge(frame, kPlace, kSequence).ok();
      case 4:
        return DecodeCommit(frame, kPlace, kSequence).ok();
      default: {
        const auto place = DecodeFooterPlace(frame.last(kSectorBytes));
        return place.ok() && DecodeFooter(*place, frame.first(frame.size() - kSectorBytes)).ok();
      }
    }
  };
  for (size_t i = 0; i < std::size(frames); ++i) {
    const std::span<std::byte> bytes = frames[i].bytes();
    ASSERT_TRUE(decoded(i, bytes)) << i;
    for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
      const std::byte flipped{static_cast<uint8_t>(1u << bit % 8)};
      bytes[bit / 8] ^= flipped;
      ASSERT_FALSE(decoded(i, bytes)) << "frame " << i << ", bit " << bit;
      bytes[bit / 8] ^= flipped;
    }
  }
}

TEST(FramesTest, FootersTellOfTheirFrames) {
  std::vector<FooterEntry> entries;
  for (uint64_t i = 0; i < 100; ++i) {
    FooterEntry entry = EntryOf(Part());
    entry.offset = 4 * i * kSectorBytes;  // the frame, and 11,808 bytes
    entry.frame_bytes = kSectorBytes;
    entry.sequence = 98 + i;
    entry.tenant = std::string(1 + i, 't');
    entries.push_back(std::move(entry));
  }
  const FramePlace end{kPlace.device, kPlace.segment, kPlace.generation, 500 * kSectorBytes};
  const AlignedBuffer footer = EncodeFooter(end, 1000, entries);
  const auto place = DecodeFooterPlace(footer.bytes().last(kSectorBytes));
  ASSERT_TRUE(place.ok()) << place.status();
  EXPECT_EQ(place->head.place.offset, end.offset - kSectorBytes);
  EXPECT_EQ(place->entries_offset + footer.size(), end.offset);
  const auto got = DecodeFooter(*place, footer.bytes().first(place->entries_bytes));
  ASSERT_TRUE(got.ok()) << got.status();
  ASSERT_EQ(got->size(), entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    EXPECT_EQ((*got)[i].tenant, entries[i].tenant);
    EXPECT_EQ((*got)[i].offset, entries[i].offset);
    EXPECT_EQ((*got)[i].sequence, 98 + i);
    EXPECT_EQ((*got)[i].part_bytes, 11808u);
  }
}

TEST(FramesTest, DisksOfOtherVersionsAreRefusedByName) {
  AlignedBuffer frame = EncodeSuperblock({{kMinSegmentBytes, 5}, {9}}, 0);
  const std::span<std::byte> bytes = frame.bytes();
  const uint32_t later = kLogVersion + 1;
  std::memcpy(bytes.data() + 8, &later, sizeof(later));
  EXPECT_TRUE(absl::IsDataLoss(DecodeSuperblock(bytes, 0).status())) << "a flipped bit";
  std::memset(bytes.data() + 12, 0, 4);
  const uint32_t crc = Crc32c(bytes);
  std::memcpy(bytes.data() + 12, &crc, sizeof(crc));
  const absl::Status refused = DecodeSuperblock(bytes, 0).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused)) << refused;
  EXPECT_NE(std::string(refused.message()).find(absl::StrCat("version ", later)), std::string::npos)
      << refused;
}

}  // namespace
}  // namespace quarry

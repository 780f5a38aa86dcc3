#include "storage/log/purge_note.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace quarry {
namespace {

const FramePlace kPlace{{1, 2, 3}, 7, 99, 5 * kSectorBytes};

PurgeNote Decoded(const PurgeNote& note) {
  const AlignedBuffer frame = note.Encode(kPlace, 5);
  EXPECT_EQ(frame.size(), kSectorBytes);
  const auto decoded = DecodeNote(frame.bytes());
  EXPECT_TRUE(decoded.ok()) << decoded.status();
  if (!decoded.ok()) return {};
  EXPECT_EQ(decoded->first.place, kPlace);
  return decoded->second;
}

TEST(PurgeNoteTest, SaysTheLargestBoundOfEachTenant) {
  PurgeNote note;
  note.Add("a", 5);
  note.Add("a", 3);
  note.Add("b", 9);
  for (const PurgeNote& one : {note, Decoded(note)}) {
    EXPECT_EQ(one.BoundOf("a"), 5u);
    EXPECT_EQ(one.BoundOf("b"), 9u);
    EXPECT_EQ(one.BoundOf("c"), 0u);
  }
}

TEST(PurgeNoteTest, BeyondSoManyTenantsItMeansAny) {
  PurgeNote note;
  for (uint32_t i = 0; i <= PurgeNote::kMaxTenants; ++i) note.Add(absl::StrCat(i), 1000 - i);
  note.Add("0", 2000);
  const uint64_t rest = 1000 - PurgeNote::kMaxTenants;
  for (const PurgeNote& one : {note, Decoded(note)}) {
    EXPECT_EQ(one.BoundOf("0"), 2000u);
    EXPECT_EQ(one.BoundOf("1"), 999u);
    EXPECT_EQ(one.BoundOf(absl::StrCat(PurgeNote::kMaxTenants)), rest);
    EXPECT_EQ(one.BoundOf("another"), rest);
  }
}

TEST(PurgeNoteTest, EveryFlippedBitIsSeen) {
  PurgeNote note;
  note.Add("a", 5);
  AlignedBuffer frame = note.Encode(kPlace, 5);
  for (size_t bit = 0; bit < frame.size() * 8; ++bit) {
    const std::byte flipped{static_cast<uint8_t>(1u << bit % 8)};
    frame.bytes()[bit / 8] ^= flipped;
    ASSERT_FALSE(DecodeNote(frame.bytes()).ok()) << bit;
    frame.bytes()[bit / 8] ^= flipped;
  }
}

}  // namespace
}  // namespace quarry

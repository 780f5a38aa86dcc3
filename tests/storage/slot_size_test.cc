#include "storage/slot_size.h"

#include <random>
#include <set>

#include <gtest/gtest.h>

#include "tests/support/seed.h"

namespace quarry {
namespace {

void CheckSlot(uint64_t bytes) {
  const uint64_t slot = SlotBytesFor(bytes);
  const uint64_t unit = bytes < 4096 ? 64 : 4096;
  ASSERT_GE(slot, bytes);
  ASSERT_EQ(slot % unit, 0u) << bytes;
  ASSERT_LT(slot - bytes, bytes / 8 + unit) << bytes;
  ASSERT_EQ(SlotBytesFor(slot), slot) << bytes;
}

TEST(SlotSizeTest, SlotsHoldTheirBytesAndWasteAtMostAnEighthBeyondTheUnit) {
  for (uint64_t bytes = 1; bytes < 300'000; ++bytes) CheckSlot(bytes);
  std::mt19937_64 random(Seed());
  for (int i = 0; i < 100'000; ++i) CheckSlot((random() >> (random() % 40 + 2)) + 1);
}

TEST(SlotSizeTest, EightSizesPerDoublingAtMost) {
  for (uint64_t low = 4096; low < (1ull << 26); low *= 2) {
    std::set<uint64_t> sizes;
    for (uint64_t bytes = low + 1; bytes <= 2 * low; bytes += 512) sizes.insert(SlotBytesFor(bytes));
    EXPECT_LE(sizes.size(), 8u) << low;
  }
}

TEST(SlotSizeTest, BlocksOfCommonModelsWasteNothing) {
  // layers * kv_heads * head_dim * 2 parts * 2 bytes * 256 tokens
  for (uint64_t elements : {32ull * 8 * 128, 32ull * 32 * 96, 28ull * 4 * 128, 36ull * 8 * 128,
                            80ull * 8 * 128, 24ull * 2 * 64}) {
    EXPECT_EQ(SlotBytesFor(elements * 1024), elements * 1024);
  }
}

TEST(SlotSizeTest, RoomIsWhatExtentsOfItHold) {
  for (uint64_t slot : {64ull, 576ull, 1088ull, 4096ull, 12288ull, 3ull << 20}) {
    for (uint64_t extent : {4096ull, 64ull << 10, 2ull << 20}) {
      for (uint64_t room = 0; room < (8ull << 20); room += 52 * 4096) {
        // Cut extents one by one, as the arena may.
        uint64_t left = room, slots = 0;
        while (left >= slot) {
          const uint64_t n = std::min(SlotsPerExtent(slot, extent), left / slot);
          slots += n;
          left -= RoundUp(n * slot, 4096);
        }
        ASSERT_EQ(SlotsInRoom(room, slot, extent), slots) << slot << " " << extent << " " << room;
      }
    }
  }
}

}  // namespace
}  // namespace quarry

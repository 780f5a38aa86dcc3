// Reserving, and who goes when there is no room.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/storage/store_fixture.h"

namespace quarry {
namespace {

using ::testing::HasSubstr;

// The arena has room for 8 blocks of 1 MiB.
class EvictionTest : public StoreTest {
 protected:
  uint64_t Evictions() { return store_->Stats().evictions; }
};

TEST_F(EvictionTest, TheLeastRecentlyUsedGoesFirst) {
  for (uint64_t n = 1; n <= 8; ++n) Cached("t", n, kMiB);
  store_->Release(store_->Acquire("t", KeyOf(1))->handle);
  ASSERT_TRUE(Press("t", kMiB, 2).ok());
  EXPECT_TRUE(Has("t", 1));
  EXPECT_FALSE(Has("t", 2));
  EXPECT_FALSE(Has("t", 3));
  EXPECT_TRUE(Has("t", 4));
  EXPECT_EQ(Evictions(), 2u);
}

TEST_F(EvictionTest, NothingIsEvictedWhileThereIsRoom) {
  for (uint64_t n = 1; n <= 6; ++n) Cached("t", n, kMiB);
  ASSERT_TRUE(store_->Reserve("t", kMiB, 2).ok());
  EXPECT_EQ(Evictions(), 0u);
  ASSERT_TRUE(store_->Reserve("t", kMiB, 1).ok());
  EXPECT_EQ(Evictions(), 1u);
}

TEST_F(EvictionTest, NoParentGoesBeforeItsChildren) {
  for (uint64_t n = 1; n <= 8; ++n) Cached("t", n, kMiB, n - 1);
  for (uint64_t gone = 0; gone < 8; ++gone) {
    ASSERT_TRUE(Press("t", kMiB, static_cast<uint32_t>(gone + 1)).ok());
    for (uint64_t n = 1; n <= 8; ++n) {
      EXPECT_EQ(Has("t", n, n - 1), n < 8 - gone) << n << " after " << gone;
    }
  }
}

TEST_F(EvictionTest, AParentComputedAgainAfterItsPurgeStillOutlivesItsChildren) {
  Cached("t", 1, kMiB);
  Cached("t", 2, kMiB, 1);
  Cached("t", 3, kMiB, 1);
  const std::vector<BlockId> parent = {IdOf(1)};
  ASSERT_EQ(*store_->Purge("t", std::nullopt, parent), 1u);
  Cached("t", 1, kMiB);
  EXPECT_EQ(store_->List("t", 1)[0].children, 2u);
  // The parent is used least recently, its children are in use all the time.
  for (int i = 0; i < 3; ++i) {
    for (uint64_t n : {2, 3}) store_->Release(store_->Acquire("t", KeyOf(n, 1))->handle);
  }
  ASSERT_TRUE(Press("t", kMiB, 6).ok());
  EXPECT_TRUE(Has("t", 1));
  EXPECT_FALSE(Has("t", 2, 1));
  EXPECT_TRUE(Has("t", 3, 1));
}

TEST_F(EvictionTest, AChildPublishedBeforeItsParentIsLinkedLater) {
  Cached("t", 2, kMiB, 1);
  EXPECT_TRUE(Has("t", 2, 1));
  Cached("t", 1, kMiB);
  ASSERT_TRUE(Press("t", kMiB, 7).ok());
  EXPECT_TRUE(Has("t", 1));
  EXPECT_FALSE(Has("t", 2, 1));
}

TEST_F(EvictionTest, ALeaseOnALeafProtectsAllItsAncestors) {
  Cached("t", 1, kMiB);
  Cached("t", 2, kMiB, 1);
  const BlockView leaf = Leased("t", 3, kMiB, 2);
  for (uint64_t n = 4; n <= 8; ++n) Cached("t", n, kMiB);
  ASSERT_TRUE(Press("t", kMiB, 5).ok());
  EXPECT_TRUE(Has("t", 1) && Has("t", 2, 1) && Has("t", 3, 2));
  EXPECT_TRUE(absl::IsResourceExhausted(Press("t", kMiB, 6)));
  EXPECT_TRUE(Has("t", 1) && Has("t", 2, 1) && Has("t", 3, 2));
  store_->Release(leaf.handle);
  EXPECT_TRUE(Press("t", kMiB, 8).ok());
  EXPECT_EQ(store_->Stats().published, 0u);
}

TEST_F(EvictionTest, ReservedAndUnfinishedMemoryIsNobodyElses) {
  ASSERT_TRUE(store_->Reserve("t", kMiB, 3).ok());
  const BlockView writing = Begin("t", kMiB);
  EXPECT_TRUE(Press("t", kMiB, 4).ok());
  const absl::Status status = Press("t", kMiB, 5);
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  const std::string message(status.message());
  EXPECT_THAT(message, HasSubstr("5 blocks of 1048576 bytes wanted, capacity 8388608"));
  EXPECT_THAT(message, HasSubstr("in use 4194304"));
  EXPECT_THAT(message, HasSubstr("1 blocks unfinished or retiring, 0 leased, 0 pinned"));
  EXPECT_THAT(message, HasSubstr("3145728 bytes reserved"));
  store_->Release(writing.handle);
  EXPECT_TRUE(Press("t", kMiB, 5).ok());
}

TEST_F(EvictionTest, ARefusalChangesNothing) {
  for (uint64_t n = 1; n <= 6; ++n) Cached("t", n, kMiB);
  Leased("t", 7, kMiB);
  const BlockStoreStats before = store_->Stats();
  for (const auto& [bytes, count] : {std::pair<uint64_t, uint32_t>{kMiB, 8}, {8 * kMiB, 1},
                                     {kMiB, ~0u}, {~0ull, 2}, {~0ull, 1}, {3 * kMiB, 3}}) {
    EXPECT_TRUE(absl::IsResourceExhausted(store_->Reserve("t", bytes, count)));
    EXPECT_TRUE(absl::IsResourceExhausted(store_->Reserve("stranger", bytes, count)));
  }
  const BlockStoreStats after = store_->Stats();
  EXPECT_EQ(after.refused, before.refused + 12);
  EXPECT_EQ(after.evictions, 0u);
  EXPECT_EQ(after.published, 7u);
  EXPECT_EQ(after.reserved_bytes, 0u);
  EXPECT_EQ(after.arena.used_bytes, before.arena.used_bytes);
  EXPECT_EQ(after.arena.extent_bytes, before.arena.extent_bytes);
}

TEST_F(EvictionTest, AnotherSizeGetsItsRoomOutOfWholeExtents) {
  // Filled with small blocks, every second of them leased: no extent can be emptied.
  std::vector<BlockHandle> leased;
  for (uint64_t n = 1; n <= 32; ++n) {
    const BlockView view = Leased("t", n, 256 << 10);
    if (n % 2 == 0) {
      leased.push_back(view.handle);
    } else {
      store_->Release(view.handle);
    }
  }
  EXPECT_TRUE(absl::IsResourceExhausted(Press("t", kMiB, 1)));
  EXPECT_EQ(Evictions(), 0u);  // it would not have helped
  EXPECT_TRUE(Press("t", 256 << 10, 16).ok());
  for (BlockHandle block : leased) store_->Release(block);
  EXPECT_TRUE(Press("t", kMiB, 8).ok());
  EXPECT_EQ(store_->Stats().published, 0u);
}

TEST_F(EvictionTest, TheColdestExtentOfOthersGoesBeforeOwnBlocksThatAreWarmer) {
  Cached("cold", 1, 2 * kMiB);
  for (uint64_t n = 2; n <= 4; ++n) Cached("t", n, 2 * kMiB);
  ASSERT_TRUE(Press("t", 2 * kMiB, 1).ok());
  EXPECT_FALSE(Has("cold", 1));
  for (uint64_t n = 2; n <= 4; ++n) EXPECT_TRUE(Has("t", n));
  Cached("warm", 5, 2 * kMiB);
  ASSERT_TRUE(Press("t", 2 * kMiB, 1).ok());
  EXPECT_FALSE(Has("t", 2));
  EXPECT_TRUE(Has("warm", 5));
}

TEST_F(EvictionTest, ATenantThatNeedsNothingLosesNothingWithoutNeed) {
  Cached("quiet", 1, 2 * kMiB);
  for (uint64_t n = 2; n < 200; ++n) {
    Cached("busy", n, 2 * kMiB);
    if (n % 3 == 0) store_->Release(store_->Acquire("quiet", KeyOf(1))->handle);
  }
  EXPECT_TRUE(Has("quiet", 1));
}

TEST_F(EvictionTest, FamiliesOfMixedSizesAreEvictedLeafFirst) {
  // Parents of 1 MiB, each with a child of another size; only parents are of the wanted size.
  for (uint64_t n = 1; n <= 4; ++n) {
    Cached("t", n, kMiB);
    Cached("t", 10 + n, 512 << 10, n);
  }
  ASSERT_TRUE(store_->Reserve("t", kMiB, 4).ok());
  for (uint64_t n = 1; n <= 4; ++n) EXPECT_TRUE(Has("t", n) || !Has("t", 10 + n, n)) << n;
  EXPECT_TRUE(store_->Reserve("t", kMiB, 4).ok());
  EXPECT_EQ(store_->Stats().published, 0u);
}

TEST_F(EvictionTest, MixedFamiliesYieldEvenWhereNoLeafIsOfTheWantedSize) {
  // One extent of parents; children of another size share their extent with a leased block, so
  // that only the parents' slots can be had, and only after the children.
  for (uint64_t n = 1; n <= 2; ++n) Cached("t", n, kMiB);
  for (uint64_t n = 1; n <= 2; ++n) Cached("t", 10 + n, 512 << 10, n);
  const BlockView leased = Leased("t", 20, 512 << 10);
  ASSERT_TRUE(store_->Reserve("other", 2 * kMiB, 2).ok());
  ASSERT_TRUE(store_->Reserve("t", kMiB, 2).ok());
  EXPECT_FALSE(Has("t", 11, 1) || Has("t", 12, 2) || Has("t", 1) || Has("t", 2));
  EXPECT_TRUE(Has("t", 20));
  store_->Release(leased.handle);
}

TEST_F(EvictionTest, PinnedBlocksAndTheirAncestorsStayUntilUnpinned) {
  for (uint64_t n = 1; n <= 8; ++n) Cached("t", n, kMiB, n == 2 ? 1 : 0);
  Pin("t", "prompt", {2});
  EXPECT_TRUE(Press("t", kMiB, 6).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(Press("t", kMiB, 7)));
  EXPECT_TRUE(Has("t", 1) && Has("t", 2, 1));
  ASSERT_TRUE(store_->Unpin("t", "prompt").ok());
  EXPECT_TRUE(Press("t", kMiB, 8).ok());
}

TEST_F(EvictionTest, APinEndsAtItsTimeAndNotBefore) {
  Cached("t", 1, kMiB);
  Pin("t", "p", {1}, now_ + absl::Seconds(60));
  now_ += absl::Seconds(60) - absl::Nanoseconds(1);
  EXPECT_TRUE(absl::IsResourceExhausted(Press("t", kMiB, 8)));
  now_ += absl::Nanoseconds(1);
  EXPECT_TRUE(Press("t", kMiB, 8).ok());
  EXPECT_FALSE(Has("t", 1));
  EXPECT_TRUE(absl::IsNotFound(store_->Unpin("t", "p")));
  EXPECT_EQ(store_->Stats().pinned, 0u);
}

TEST_F(EvictionTest, TheLongerOfTwoPinsCounts) {
  Cached("t", 1, kMiB);
  Pin("t", "short", {1}, now_ + absl::Seconds(1));
  Pin("t", "long", {1}, now_ + absl::Seconds(100));
  now_ += absl::Seconds(50);
  EXPECT_TRUE(absl::IsResourceExhausted(Press("t", kMiB, 8)));
  Pin("t", "long", {1}, now_ + absl::Seconds(1));  // set again: ends sooner
  now_ += absl::Seconds(1);
  EXPECT_TRUE(Press("t", kMiB, 8).ok());
}

TEST_F(EvictionTest, AFullArenaRefusesEverySizeAndRecovers) {
  std::vector<BlockHandle> leased;
  for (uint64_t n = 1; n <= 8; ++n) leased.push_back(Leased("t", n, kMiB).handle);
  for (uint64_t bytes : {1ull, 4096ull, 1ull << 20, 8ull << 20}) {
    EXPECT_TRUE(absl::IsResourceExhausted(Press("t", bytes, 1)));
    EXPECT_TRUE(absl::IsResourceExhausted(Press("other", bytes, 1)));
  }
  for (BlockHandle block : leased) store_->Release(block);
  for (uint64_t bytes : {1ull, 4096ull, 1ull << 20, 8ull << 20}) {
    EXPECT_TRUE(Press("other", bytes, 1).ok()) << bytes;
  }
}

TEST_F(EvictionTest, EvictingManyBlocksCostsNoScanOfAll) {
  BlockStoreOptions options = SmallOptions();
  options.arena.capacity_bytes = 32 * kMiB;
  options.arena.extent_bytes = 32 * kMiB;
  Start(options);
  constexpr uint64_t kBlocks = 32 * kMiB / 64;
  ASSERT_TRUE(store_->Reserve("t", 64, kBlocks).ok());
  for (uint64_t n = 1; n <= kBlocks; ++n) {
    auto view = store_->Begin("t", 64);
    store_->Release(Publish(view->handle, KeyOf(n)).handle);
  }
  const absl::Time start = absl::Now();
  for (uint64_t n = 1; n <= 50'000; ++n) Cached("t", kBlocks + n, 64);
  // Half a million blocks: a scan per eviction would take many minutes.
  EXPECT_LT(absl::Now() - start, absl::Seconds(30));
  EXPECT_EQ(Evictions(), 50'000u);
  EXPECT_FALSE(Has("t", 1));
  EXPECT_TRUE(Has("t", 50'001));
}

}  // namespace
}  // namespace quarry

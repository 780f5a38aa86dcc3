// The policies that choose what is evicted, and what all of them must keep.
#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <set>

#include <gtest/gtest.h>

#include "tests/storage/store_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

// The arena has room for 8 blocks of 1 MiB.
class PolicyTest : public StoreTest {
 protected:
  void StartWith(EvictionKind kind) {
    BlockStoreOptions options = SmallOptions();
    options.eviction = {
        .kind = kind, .recompute_bytes_per_s = 1 << 30, .recompute_doubling_blocks = 1};
    Start(options);
  }
  void Use(uint64_t n, uint64_t parent = 0) {
    const auto found = store_->Acquire("t", KeyOf(n, parent));
    ASSERT_TRUE(found.ok()) << found.status();
    store_->Release(found->handle);
  }
  void NoteDiskCopy(uint64_t n, std::optional<double> bytes_per_s) {
    const auto found = store_->Acquire("t", KeyOf(n));
    ASSERT_TRUE(found.ok()) << found.status();
    store_->NoteDiskCopy(found->handle, bytes_per_s);
    store_->Release(found->handle);
  }
  void Scan(uint64_t first, uint64_t count) {
    for (uint64_t n = first; n < first + count; ++n) Cached("t", n, kMiB);
  }
};

TEST_F(PolicyTest, S3FifoKeepsWhatWasUsedAgainFromAScanThatLruLosesItTo) {
  for (const EvictionKind kind : {EvictionKind::kLru, EvictionKind::kS3Fifo}) {
    StartWith(kind);
    Scan(1, 4);
    for (uint64_t n = 1; n <= 4; ++n) Use(n);
    Scan(100, 40);
    for (uint64_t n = 1; n <= 4; ++n) EXPECT_EQ(Has("t", n), kind == EvictionKind::kS3Fifo) << n;
  }
}

TEST_F(PolicyTest, S3FifoKeepsWhatComesBackWhileItsGhostIsRemembered) {
  StartWith(EvictionKind::kS3Fifo);
  Scan(1, 9);
  ASSERT_FALSE(Has("t", 1));
  Cached("t", 1, kMiB);
  EXPECT_EQ(store_->Stats().ghost_hits, 1u);
  Scan(20, 20);
  EXPECT_TRUE(Has("t", 1));
  EXPECT_EQ(store_->Stats().ghost_hits, 1u);
}

TEST_F(PolicyTest, S3FifoRemembersNoMoreGhostsThanThereAreBlocks) {
  StartWith(EvictionKind::kS3Fifo);
  Scan(1, 8 + 9);  // evicts 1 to 9
  Cached("t", 1, kMiB);
  EXPECT_EQ(store_->Stats().ghost_hits, 0u);
  Cached("t", 9, kMiB);
  EXPECT_EQ(store_->Stats().ghost_hits, 1u);
}

TEST_F(PolicyTest, S3FifoLetsTheMainQueueGoInTheEndToo) {
  StartWith(EvictionKind::kS3Fifo);
  Scan(1, 8);
  for (int use = 0; use < 5; ++use) {
    for (uint64_t n = 1; n <= 8; ++n) Use(n);
  }
  ASSERT_TRUE(Press("t", kMiB, 8).ok());
  EXPECT_EQ(store_->Stats().published, 0u);
}

TEST_F(PolicyTest, FlushingLooksAreNotUses) {
  StartWith(EvictionKind::kS3Fifo);
  Scan(1, 8);
  const auto looked_at = store_->AcquireInRam("t", IdOf(1));
  ASSERT_TRUE(looked_at.ok());
  store_->Release(looked_at->view.handle);
  Use(2);
  ASSERT_TRUE(Press("t", kMiB, 1).ok());
  EXPECT_FALSE(Has("t", 1));
  EXPECT_TRUE(Has("t", 2));
}

TEST_F(PolicyTest, CostKeepsWhatLiesFurtherBehindThoughItWasUsedBefore) {
  StartWith(EvictionKind::kCost);
  for (uint64_t n = 1; n <= 3; ++n) Cached("t", n, kMiB, n - 1);
  Scan(10, 5);
  ASSERT_TRUE(Press("t", kMiB, 5).ok());
  for (uint64_t n = 10; n < 15; ++n) EXPECT_FALSE(Has("t", n)) << n;
  EXPECT_TRUE(Has("t", 3, 2));
}

TEST_F(PolicyTest, CostLetsGoInTheEndOfWhatNobodyUses) {
  StartWith(EvictionKind::kCost);
  for (uint64_t n = 1; n <= 3; ++n) Cached("t", n, kMiB, n - 1);
  Scan(10, 40);
  EXPECT_FALSE(Has("t", 3, 2));
}

TEST_F(PolicyTest, CostEvictsFirstWhatTheDiskBringsBackSooner) {
  StartWith(EvictionKind::kCost);
  Scan(1, 8);
  NoteDiskCopy(7, 1e11);
  NoteDiskCopy(8, 1e11);
  NoteDiskCopy(8, std::nullopt);  // the disk gave it up
  ASSERT_TRUE(Press("t", kMiB, 1).ok());
  EXPECT_FALSE(Has("t", 7));
  EXPECT_TRUE(Has("t", 8));
  // A disk that is slower than computing it again does not make a block dearer.
  NoteDiskCopy(8, 1e3);
  ASSERT_TRUE(Press("t", kMiB, 8).ok());
  EXPECT_EQ(store_->Stats().published, 0u);
}

TEST_F(PolicyTest, CostsThatWouldDivideByZeroAreRefused) {
  BlockStoreOptions options = SmallOptions();
  options.eviction.recompute_bytes_per_s = 0;
  EXPECT_TRUE(absl::IsInvalidArgument(BlockStore::Create(options).status()));
  options = SmallOptions();
  options.eviction.recompute_doubling_blocks = 0;
  EXPECT_TRUE(absl::IsInvalidArgument(BlockStore::Create(options).status()));
}

// ---- Whatever the policy, by seeds: no parent goes before its children, nothing that is leased or
// pinned goes, bytes are exact, and Reserve is refused exactly where nothing could make room.

class PolicyInvariantsTest : public StoreTest, public ::testing::WithParamInterface<EvictionKind> {
 protected:
  static constexpr uint64_t kBytes = 64 << 10, kSlots = 24, kIds = 60;

  struct Published {
    uint64_t parent = 0;
    std::vector<BlockHandle> leases;
    bool pinned = false;
  };

  void SetUp() override {
    BlockStoreOptions options = SmallOptions();
    options.arena.capacity_bytes = kSlots * kBytes;
    options.arena.extent_bytes = 4 * kBytes;
    options.eviction.kind = GetParam();
    Start(options);
  }
  // Ids form a tree: the parent of n is n / 3, and ids below 3 are roots.
  static BlockKey Key(uint64_t n) { return KeyOf(n, n / 3); }
  uint64_t Pick(uint64_t n) { return random_() % n; }

  bool Held(uint64_t n) const {
    const Published& block = blocks_.at(n);
    if (block.pinned || !block.leases.empty()) return true;
    return std::any_of(blocks_.begin(), blocks_.end(), [&](const auto& other) {
      return other.second.parent == n && Held(other.first);
    });
  }
  // Takes what was evicted out of the model, and checks that it was allowed to go.
  void NoteEvictions() {
    std::set<uint64_t> gone;
    for (const auto& [n, block] : blocks_) {
      if (store_->Contains("t", Key(n))) continue;
      ASSERT_FALSE(Held(n)) << n;
      gone.insert(n);
    }
    for (const auto& [n, block] : blocks_) {
      ASSERT_TRUE(gone.contains(n) || !gone.contains(block.parent)) << "child " << n << " stays";
    }
    for (const uint64_t n : gone) blocks_.erase(n);
    evictions_ += gone.size();
  }
  bool Reserve(uint32_t count) {
    const auto evictable = static_cast<uint64_t>(std::count_if(
        blocks_.begin(), blocks_.end(), [&](const auto& block) { return !Held(block.first); }));
    const bool room = kSlots - blocks_.size() + evictable >= count;
    const absl::Status status = store_->Reserve("t", kBytes, count);
    EXPECT_EQ(status.ok(), room) << status;
    NoteEvictions();
    return status.ok();
  }
  void Publish() {
    const uint64_t n = 1 + Pick(kIds);
    if (blocks_.contains(n) || !Reserve(1)) return;
    const auto begun = store_->Begin("t", kBytes);
    ASSERT_TRUE(begun.ok());
    bool existed = false;
    const auto view = store_->Publish(begun->handle, Key(n), ByteDigest{n, n}, &existed);
    ASSERT_TRUE(view.ok()) << view.status();
    ASSERT_FALSE(existed);
    blocks_[n].parent = n / 3;
    store_->Release(view->handle);
  }
  void Acquire() {
    const uint64_t n = 1 + Pick(kIds);
    const auto found = store_->Acquire("t", Key(n));
    ASSERT_EQ(found.ok(), blocks_.contains(n));
    if (!found.ok()) return;
    if (Pick(2) == 0) store_->NoteDiskCopy(found->handle, static_cast<double>(1 + Pick(1u << 31)));
    blocks_[n].leases.push_back(found->handle);
  }
  void Release() {
    for (auto& [n, block] : blocks_) {
      if (block.leases.empty() || Pick(3) > 0) continue;
      store_->Release(block.leases.back());
      block.leases.pop_back();
    }
  }
  void PinOrUnpin() {
    if (blocks_.empty()) return;
    auto& [n, block] = *std::next(blocks_.begin(), static_cast<int64_t>(Pick(blocks_.size())));
    const std::string name = std::to_string(n);
    if (block.pinned) {
      ASSERT_TRUE(store_->Unpin("t", name).ok());
      block.pinned = false;
      return;
    }
    // A pin covers ancestors too; one of a root covers itself alone, and is all the model knows.
    if (block.parent != 0) return;
    Pin("t", name, {n});
    block.pinned = true;
  }
  void Purge() {
    if (blocks_.empty()) return;
    const auto it = std::next(blocks_.begin(), static_cast<int64_t>(Pick(blocks_.size())));
    if (!it->second.leases.empty() || it->second.pinned) return;
    const std::vector<BlockId> ids = {IdOf(it->first)};
    ASSERT_EQ(*store_->Purge("t", std::nullopt, ids), 1u);
    blocks_.erase(it);
  }
  void CheckCounts() {
    const BlockStoreStats stats = store_->Stats();
    ASSERT_EQ(stats.published, blocks_.size());
    ASSERT_EQ(stats.bytes, blocks_.size() * kBytes);
    ASSERT_EQ(stats.evictions, evictions_);
    ASSERT_EQ(stats.reserved_bytes, 0u);
    ASSERT_EQ(stats.arena.used_bytes, stats.bytes);
  }

  std::map<uint64_t, Published> blocks_;
  uint64_t evictions_ = 0;
  std::mt19937_64 random_{Seed()};
};

TEST_P(PolicyInvariantsTest, HoldUnderRandomOperations) {
  for (int step = 0; step < 6000 && !HasFatalFailure(); ++step) {
    switch (Pick(8)) {
      case 0:
      case 1:
      case 2:
        Publish();
        break;
      case 3:
        Acquire();
        break;
      case 4:
      case 5:
        Release();
        break;
      case 6:
        PinOrUnpin();
        break;
      default:
        if (Pick(4) == 0) {
          Purge();
        } else if (const auto count = static_cast<uint32_t>(1 + Pick(kSlots)); Reserve(count)) {
          store_->Unreserve("t", kBytes, count);
        }
    }
    CheckCounts();
  }
  EXPECT_GT(evictions_, 200u);  // the mix reaches evictions at all
}

INSTANTIATE_TEST_SUITE_P(Policies, PolicyInvariantsTest,
                         ::testing::Values(EvictionKind::kLru, EvictionKind::kS3Fifo,
                                           EvictionKind::kCost));

}  // namespace
}  // namespace quarry

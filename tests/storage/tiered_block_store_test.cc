#include "storage/tiered_block_store.h"

#include <gtest/gtest.h>

#include <cstring>
#include <set>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "proto/byte_digest.h"
#include "proto/status_macros.h"
#include "tests/storage/disk/hooked_disk.h"
#include "tests/storage/disk/simulated_disk.h"
#include "tests/support/eventually.h"

namespace quarry {
namespace {

using testing::Eventually;
using testing::Fault;
using testing::SimulatedDisk;

constexpr uint64_t kBlock = 48 << 10;

// A store of 16 blocks in RAM over a disk of many, which outlives it.
class TieredBlockStoreTest : public ::testing::Test {
 protected:
  void SetUp() override { Open(); }
  void Open(uint64_t segment_bytes = 512 << 10) {
    store_ = nullptr;
    BlockStoreOptions options;
    options.arena.capacity_bytes = 16 * kBlock;
    options.arena.extent_bytes = 4 * kBlock;
    options.arena.spare_bytes = 0;
    options.eviction = eviction_;
    options.arena.huge_pages = ArenaOptions::HugePages::kNever;
    auto ram = BlockStore::Create(options);
    ASSERT_TRUE(ram.ok()) << ram.status();
    auto log = BlockLog::Open(std::make_unique<testing::HookedDisk>(disk_.get(), &hooks_),
                              {.segment_bytes = segment_bytes});
    ASSERT_TRUE(log.ok()) << log.status();
    store_ = std::make_unique<TieredBlockStore>(
        *std::move(ram), *std::move(log),
        TieredOptions{.max_queued_bytes = 64 * kBlock, .retry_after = absl::Milliseconds(20)});
  }

  static BlockKey KeyOf(uint32_t number) {
    BlockKey key;
    std::memcpy(key.id.bytes.data(), &number, sizeof(number));
    key.id.bytes[31] = 7;
    key.full_key = absl::StrCat("block ", number);
    return key;
  }
  absl::Status Put(uint32_t number, const std::string& tenant = "t", int fill = -1) {
    QUARRY_RETURN_IF_ERROR(store_->Reserve(tenant, kBlock, 1));
    auto view = store_->Begin(tenant, kBlock);
    EXPECT_TRUE(view.ok()) << view.status();
    std::memset(view->memory.data, fill >= 0 ? fill : static_cast<int>(number + 1), kBlock);
    bool existed = false;
    auto published = store_->Publish(view->handle, KeyOf(number), std::nullopt, &existed);
    EXPECT_TRUE(published.ok()) << published.status();
    store_->Release(published->handle);
    if (existed) store_->Release(view->handle);
    return absl::OkStatus();
  }
  // Whether it is found, and right.
  bool Has(uint32_t number, const std::string& tenant = "t") {
    auto view = store_->Acquire(tenant, KeyOf(number));
    if (!view.ok()) {
      EXPECT_TRUE(absl::IsNotFound(view.status())) << view.status();
      return false;
    }
    EXPECT_EQ(view->memory.data[0], std::byte{static_cast<uint8_t>(number + 1)});
    EXPECT_EQ(DigestOf({view->memory.data, view->memory.bytes}), view->digest);
    EXPECT_TRUE(store_->CopyOut(view->handle, 0, {}).ok());
    store_->Release(view->handle);
    return true;
  }
  void AwaitWritten() {
    ASSERT_TRUE(Eventually([&] { return store_->Stats().disk->queued_bytes == 0; }));
  }

  std::unique_ptr<SimulatedDisk> disk_ = std::make_unique<SimulatedDisk>(
      testing::SimulatedDiskOptions{.bytes = LogBytes(60, 512 << 10)});
  EvictionOptions eviction_;
  testing::DiskHooks hooks_;
  std::unique_ptr<TieredBlockStore> store_;
};

TEST_F(TieredBlockStoreTest, WhatRamEvictsIsReadFromTheDisk) {
  for (uint32_t i = 0; i < 100; ++i) ASSERT_TRUE(Put(i).ok()) << i;
  AwaitWritten();
  EXPECT_GT(store_->Stats().evictions, 80u);
  for (uint32_t i = 0; i < 100; ++i) {
    EXPECT_TRUE(store_->Contains("t", KeyOf(i))) << i;
    EXPECT_TRUE(Has(i)) << i;
    EXPECT_FALSE(Has(i, "other"));
  }
  const BlockStoreStats stats = store_->Stats();
  EXPECT_GT(stats.disk->promoted, 80u);
  EXPECT_EQ(stats.disk->log.blocks, 100u);
  EXPECT_EQ(stats.disk->log.appended_blocks, 100u) << "what came from the disk was written again";
}

TEST_F(TieredBlockStoreTest, ARestartIsWarm) {
  for (uint32_t i = 0; i < 30; ++i) ASSERT_TRUE(Put(i).ok());
  Open();  // the end of the store before waits for what is queued
  for (uint32_t i = 0; i < 30; ++i) EXPECT_TRUE(Has(i)) << i;
}

TEST_F(TieredBlockStoreTest, WhatIsPurgedIsGoneFromBothTiersAndStaysAway) {
  for (uint32_t i = 0; i < 30; ++i) ASSERT_TRUE(Put(i).ok());
  const BlockId one[] = {KeyOf(3).id};
  // Some are in RAM alone, some on the disk alone, some wait between.
  EXPECT_EQ(*store_->Purge("t", std::nullopt, one), 1u);
  EXPECT_FALSE(Has(3));
  EXPECT_TRUE(Has(4));
  ASSERT_TRUE(store_->Purge("t", std::nullopt, {}).ok());
  for (int round = 0; round < 2; ++round) {
    for (uint32_t i = 0; i < 30; ++i) EXPECT_FALSE(Has(i)) << i;
    Open();
  }
}

TEST_F(TieredBlockStoreTest, APurgeThatIsNotDurableSaysSo) {
  ASSERT_TRUE(Put(1).ok());
  AwaitWritten();
  disk_->Schedule({Fault::kFailedSync, disk_->operations()});
  EXPECT_TRUE(absl::IsUnavailable(store_->Purge("t", std::nullopt, {}).status()));
  EXPECT_FALSE(Has(1));
}

// Between the reading of a block and its publishing in RAM it is purged, and put again with other
// bytes, and these are pushed out of RAM.
TEST_F(TieredBlockStoreTest, WhatWasReadBeforeAPurgeIsNotPublishedAfterIt) {
  ASSERT_TRUE(Put(1, "t", 'A').ok());
  for (uint32_t i = 100; i < 130; ++i) ASSERT_TRUE(Put(i).ok());
  AwaitWritten();
  hooks_.after_read = [&](uint64_t bytes) {
    if (bytes < kBlock) return;
    hooks_.after_read = nullptr;
    EXPECT_TRUE(store_->Purge("t", std::nullopt, {}).ok());
    EXPECT_TRUE(Put(1, "t", 'B').ok());
    for (uint32_t i = 200; i < 230; ++i) EXPECT_TRUE(Put(i).ok());
    AwaitWritten();
  };
  const auto view = store_->Acquire("t", KeyOf(1));
  if (view.ok()) {
    EXPECT_EQ(view->memory.data[0], std::byte{'B'});
    store_->Release(view->handle);
  }
  EXPECT_EQ(store_->Stats().leased, 0u);
}

TEST_F(TieredBlockStoreTest, AFullDiskLeavesRamServing) {
  ASSERT_TRUE(Put(0).ok());
  AwaitWritten();
  for (int i = 0; i < 2000; ++i) disk_->Schedule({Fault::kNoSpace, disk_->operations()});
  for (uint32_t i = 1; i < 40; ++i) {
    ASSERT_TRUE(Put(i).ok()) << i;
    EXPECT_TRUE(Has(i)) << i;
  }
  AwaitWritten();
  EXPECT_GT(store_->Stats().disk->not_admitted, 0u);
  EXPECT_TRUE(Has(0)) << "reads go on";
}

TEST_F(TieredBlockStoreTest, WhatWasRefusedIsWrittenWhenItIsAskedForAgain) {
  disk_->Schedule({Fault::kError, disk_->operations()});
  ASSERT_TRUE(Put(1).ok());
  AwaitWritten();
  EXPECT_EQ(store_->Stats().disk->log.blocks, 0u);
  EXPECT_TRUE(Eventually([&] {
    EXPECT_TRUE(Has(1));
    return store_->Stats().disk->log.blocks == 1;
  }));
}

TEST_F(TieredBlockStoreTest, ByCostWhatTheDiskLacksStaysInRam) {
  eviction_ = {.kind = EvictionKind::kCost, .recompute_bytes_per_s = 1 << 10};
  Open();
  disk_->Schedule({Fault::kError, disk_->operations()});
  ASSERT_TRUE(Put(0).ok());
  AwaitWritten();
  ASSERT_TRUE(Eventually([&] { return !store_->Stats().disk->refuses; }));
  for (uint32_t i = 1; i < 20; ++i) {
    ASSERT_TRUE(Put(i).ok()) << i;
    AwaitWritten();
  }
  const auto in_ram = [&](uint32_t i) {
    const auto place = store_->Locate("t", KeyOf(i));
    return place.has_value() && place->in_ram;
  };
  EXPECT_TRUE(in_ram(0));
  EXPECT_FALSE(in_ram(1));
  // What came from there is as cheap to have again.
  ASSERT_TRUE(Has(1));
  for (uint32_t i = 20; i < 40; ++i) {
    ASSERT_TRUE(Put(i).ok()) << i;
    AwaitWritten();
  }
  EXPECT_TRUE(in_ram(0));
  EXPECT_FALSE(in_ram(1));
}

TEST_F(TieredBlockStoreTest, AFlushSaysWhatIsDurableAndSeesToTheRest) {
  ASSERT_TRUE(Put(1).ok());
  ASSERT_TRUE(Put(2).ok());
  const BlockId named[] = {KeyOf(1).id, KeyOf(9).id, KeyOf(2).id};
  absl::StatusOr<FlushResult> result;
  const auto settled = [&] {
    result = store_->Flush("t", named);
    return result.ok() && result->pending_blocks == 0;
  };
  ASSERT_TRUE(Eventually(settled)) << result.status();
  EXPECT_EQ(result->durable_blocks, 2u);
  EXPECT_EQ(result->durable_bytes, 2 * kBlock);
  EXPECT_EQ(result->leading_blocks, 1u);
  EXPECT_EQ(result->missing_blocks, 1u);
  EXPECT_EQ(store_->Flush("other", named)->missing_blocks, 3u);
  EXPECT_EQ(store_->Flush("other", std::nullopt)->durable_blocks, 0u);
  // As the disk was at this instant, with nothing of what was not synced.
  std::unique_ptr<SimulatedDisk> crashed = disk_->Crashed(testing::PowerCut::kNoneKept, 1);
  store_ = nullptr;
  disk_ = std::move(crashed);
  Open();
  EXPECT_TRUE(Has(1));
  EXPECT_TRUE(Has(2));
}

TEST_F(TieredBlockStoreTest, AFlushBringsToTheDiskWhatItRefusedWhenItCame) {
  disk_->Schedule({Fault::kError, disk_->operations()});
  ASSERT_TRUE(Put(1).ok());
  AwaitWritten();
  const absl::StatusOr<FlushResult> refused = store_->Flush("t", std::nullopt);
  ASSERT_TRUE(refused.ok()) << refused.status();
  EXPECT_EQ(refused->refused_blocks, 1u);
  EXPECT_FALSE(refused->refusal.empty());
  EXPECT_TRUE(Eventually([&] {
    const absl::StatusOr<FlushResult> result = store_->Flush("t", std::nullopt);
    return result.ok() && result->durable_blocks == 1 && result->refused_blocks == 0;
  }));
  EXPECT_EQ(store_->Stats().leased, 0u);
}

TEST_F(TieredBlockStoreTest, ABlockThatTheLogNeverTakesIsRefusedAndNotPending) {
  disk_ = std::make_unique<SimulatedDisk>(
      testing::SimulatedDiskOptions{.bytes = LogBytes(4, 64 << 10)});
  Open(64 << 10);
  ASSERT_TRUE(Put(1).ok());
  const absl::StatusOr<FlushResult> result = store_->Flush("t", std::nullopt);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->refused_blocks, 1u);
  EXPECT_NE(result->refusal.find("more than an eighth"), std::string::npos) << result->refusal;
}

TEST_F(TieredBlockStoreTest, AListHasBothTiersAndEachBlockOnce) {
  for (uint32_t i = 0; i < 40; ++i) ASSERT_TRUE(Put(i).ok());
  AwaitWritten();
  std::set<BlockId> seen;
  uint32_t in_ram = 0;
  for (const BlockInfo& info : store_->List("t", 1000)) {
    EXPECT_TRUE(seen.insert(info.id).second);
    EXPECT_TRUE(info.on_disk);
    EXPECT_EQ(info.bytes, kBlock);
    in_ram += info.in_ram ? 1 : 0;
  }
  EXPECT_EQ(seen.size(), 40u);
  EXPECT_GT(in_ram, 8u);
  EXPECT_LE(in_ram, 16u);
  EXPECT_EQ(store_->List("t", 30).size(), 30u);
  EXPECT_EQ(store_->List("t", 5).size(), 5u);
  EXPECT_TRUE(store_->List("other", 30).empty());
}

TEST_F(TieredBlockStoreTest, ABrokenDiskIsAMiss) {
  for (uint32_t i = 0; i < 40; ++i) ASSERT_TRUE(Put(i).ok());
  AwaitWritten();
  // All payload that there is, spoilt; the frames are right.
  const std::vector<std::byte> spoilt(64, std::byte{0xaa});
  for (uint64_t at = 1 << 20; at < disk_->bytes(); at += 4096) {
    const auto bytes = disk_->Peek(at, 64);
    if (bytes[0] == bytes[63] && bytes[0] != std::byte{0}) disk_->Corrupt(at, spoilt);
  }
  uint32_t found = 0;
  for (uint32_t i = 0; i < 40; ++i) found += Has(i) ? 1 : 0;
  EXPECT_LE(found, 16u) << "those in RAM";
  EXPECT_GT(store_->Stats().disk->log.broken_blocks, 20u);
}

// Blocks come and go on several threads, in both tiers, with purges between: nothing is wrong, and
// nothing hangs.
TEST_F(TieredBlockStoreTest, ThreadsTogether) {
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 4; ++t) {
    threads.emplace_back([this, t] {
      const std::string tenant = absl::StrCat("t", t % 2);
      for (uint32_t i = 0; i < 150; ++i) {
        const uint32_t number = (i * 7 + t) % 40;
        if (!Has(number, tenant)) (void)Put(number, tenant);
        if (i % 50 != 49) continue;
        EXPECT_TRUE(store_->Purge(tenant, std::nullopt, {}).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  AwaitWritten();
  const BlockStoreStats stats = store_->Stats();
  EXPECT_EQ(stats.leased, 0u);
  EXPECT_EQ(stats.digest_failures, 0u);
  EXPECT_EQ(stats.disk->log.broken_blocks, 0u);
}

}  // namespace
}  // namespace quarry

// The n-th call of the disk, the n-th reservation of memory and the n-th admission to the queue
// fails, for all n of a life in both tiers: afterwards leases, pins, bytes on their way and bytes
// accounted are what they must be.
//
//   QUARRY_FAILURE_STRIDE=N   every N-th call of the disk (5 by default, of an encrypted one 20; 1:
//                             all)
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "proto/byte_digest.h"
#include "proto/check.h"
#include "proto/status_macros.h"
#include "storage/slot_size.h"
#include "storage/tiered_block_store.h"
#include "tests/storage/disk/hooked_disk.h"
#include "tests/storage/disk/simulated_disk.h"
#include "tests/storage/log/log_case.h"
#include "tests/support/eventually.h"
#include "tests/support/given_number.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::Eventually;
using testing::Fault;
using testing::SimulatedDisk;

constexpr uint64_t kBlock = 48 << 10, kSegment = 256 << 10;
constexpr uint32_t kRamBlocks = 8;

// A RAM store of which the n-th call that takes memory is refused.
class RefusingStore final : public BlockStore {
 public:
  // `calls` counts on; counted from 0.
  RefusingStore(std::unique_ptr<BlockStore> store, uint64_t refused, std::atomic<uint64_t>* calls)
      : store_(std::move(store)), refused_(refused), calls_(calls) {}

  absl::Status Reserve(std::string_view tenant, uint64_t bytes, uint32_t count) override {
    QUARRY_RETURN_IF_ERROR(Count());
    return store_->Reserve(tenant, bytes, count);
  }
  void Unreserve(std::string_view tenant, uint64_t bytes, uint32_t count) override {
    store_->Unreserve(tenant, bytes, count);
  }
  absl::StatusOr<BlockView> Begin(std::string_view tenant, uint64_t bytes) override {
    QUARRY_RETURN_IF_ERROR(Count());
    return store_->Begin(tenant, bytes);
  }
  absl::StatusOr<BlockView> Publish(BlockHandle block, BlockKey key,
                                    std::optional<ByteDigest> digest, bool* existed) override {
    *existed = false;
    QUARRY_RETURN_IF_ERROR(Count());
    return store_->Publish(block, std::move(key), digest, existed);
  }
  absl::StatusOr<BlockView> Acquire(std::string_view tenant, const BlockKey& key) override {
    return store_->Acquire(tenant, key);
  }
  absl::StatusOr<BlockView> AcquirePaged(std::string_view tenant, const BlockKey& key) override {
    return store_->AcquirePaged(tenant, key);
  }
  uint64_t page_bytes() const override { return store_->page_bytes(); }
  void Retain(BlockHandle block) override { store_->Retain(block); }
  void Release(BlockHandle block) override { store_->Release(block); }
  void NoteDiskCopy(BlockHandle block, std::optional<double> bytes_per_s) override {
    store_->NoteDiskCopy(block, bytes_per_s);
  }
  absl::StatusOr<KeyedBlock> AcquireInRam(std::string_view tenant, const BlockId& id) override {
    return store_->AcquireInRam(tenant, id);
  }
  std::optional<BlockPlace> Locate(std::string_view tenant, const BlockKey& key) const override {
    return store_->Locate(tenant, key);
  }
  absl::Duration ExpectedLoad(uint64_t bytes) const override { return store_->ExpectedLoad(bytes); }
  absl::Status CopyOut(BlockHandle block, uint64_t offset, std::span<std::byte> out) override {
    return store_->CopyOut(block, offset, out);
  }
  absl::Status Pin(std::string_view tenant, std::string_view name, std::span<const BlockId> blocks,
                   absl::Time expires) override {
    return store_->Pin(tenant, name, blocks, expires);
  }
  absl::Status Unpin(std::string_view tenant, std::string_view name) override {
    return store_->Unpin(tenant, name);
  }
  absl::StatusOr<uint64_t> Purge(std::string_view tenant, std::optional<NamespaceDigest> name_space,
                                 std::span<const BlockId> blocks) override {
    return store_->Purge(tenant, name_space, blocks);
  }
  absl::StatusOr<FlushResult> Flush(std::string_view tenant,
                                    std::optional<std::span<const BlockId>> blocks) override {
    return store_->Flush(tenant, blocks);
  }
  bool IsPublished(BlockHandle block) const override { return store_->IsPublished(block); }
  uint64_t PublishedBytes(std::string_view tenant, std::span<const BlockId> blocks) const override {
    return store_->PublishedBytes(tenant, blocks);
  }
  std::vector<BlockInfo> List(std::string_view tenant, uint32_t limit) const override {
    return store_->List(tenant, limit);
  }
  BlockStoreStats Stats() const override { return store_->Stats(); }
  const Arena& arena() const override { return store_->arena(); }

 private:
  absl::Status Count() {
    if ((*calls_)++ != refused_) return absl::OkStatus();
    return absl::ResourceExhaustedError("refused by the test");
  }

  const std::unique_ptr<BlockStore> store_;
  const uint64_t refused_;
  std::atomic<uint64_t>* const calls_;
};

BlockStoreOptions SmallRam() {
  BlockStoreOptions options;
  options.arena.capacity_bytes = kRamBlocks * kBlock;
  options.arena.extent_bytes = 4 * kBlock;
  options.arena.spare_bytes = 0;
  options.arena.huge_pages = ArenaOptions::HugePages::kNever;
  return options;
}

constexpr uint64_t kNone = ~0ull;

// Puts, reads from both tiers, pins and purges; every call may fail, none may leave anything
// behind.
class TieredLife {
 public:
  // Memory is refused at the `refused`-th call that takes some; kNone: at none.
  explicit TieredLife(bool encrypted, uint64_t refused = kNone)
      : disk_({.bytes = encrypted ? EncryptedLogBytes(8, kSegment) : LogBytes(8, kSegment),
               .seed = 5}) {
    auto ram = BlockStore::Create(SmallRam());
    QUARRY_CHECK(ram.ok());
    BlockLogOptions of_log{.segment_bytes = kSegment, .max_part_bytes = 16 << 10};
    if (encrypted) of_log.key.environment = testing::SetTestKey('7');
    auto log = BlockLog::Open(std::make_unique<testing::HookedDisk>(&disk_, &hooks_), of_log);
    QUARRY_CHECK(log.ok());
    opening_ = disk_.operations();
    store_ = std::make_unique<TieredBlockStore>(
        std::make_unique<RefusingStore>(*std::move(ram), refused, &calls_), *std::move(log),
        TieredOptions{.retry_after = absl::ZeroDuration(), .reserve_wait = absl::ZeroDuration()});
  }

  // Of the disk, at the n-th call after it was opened.
  void Schedule(Fault::Kind kind, uint64_t n) { disk_.Schedule({kind, opening_ + n}); }
  uint64_t operations() const { return disk_.operations() - opening_; }
  uint64_t calls() const { return calls_; }
  uint64_t struck(Fault::Kind kind) const { return disk_.struck(kind); }

  void Run() {
    for (uint32_t i = 0; i < 12; ++i) Put(i);
    const BlockId pinned[] = {KeyOf(11).id};
    pinned_ = store_->Pin("t", "pin", pinned, absl::InfiniteFuture()).ok();
    for (uint32_t i = 0; i < 12; i += 3) Get(i);
    const BlockId ids[] = {KeyOf(0).id, KeyOf(10).id};
    (void)store_->Purge("t", std::nullopt, ids);
    Settle();
    // The disk is full once round, and segments are reclaimed.
    for (uint32_t i = 12; i < 30; ++i) Put(i);
    (void)store_->Flush("t", std::nullopt);
    Settle();
    for (uint32_t i = 0; i < 30; i += 4) Get(i);
    Check();
    (void)store_->Unpin("t", "pin");
    pinned_ = false;
    (void)store_->Purge("t", std::nullopt, {});
    Settle();
    const BlockStoreStats stats = store_->Stats();
    EXPECT_EQ(stats.blocks, 0u);
    EXPECT_EQ(stats.bytes, 0u);
    EXPECT_EQ(stats.arena.used_bytes, 0u);
    EXPECT_EQ(stats.pinned, 0u);
  }

 private:
  static BlockKey KeyOf(uint32_t number) {
    BlockKey key;
    std::memcpy(key.id.bytes.data(), &number, sizeof(number));
    key.id.bytes[31] = 7;
    key.full_key = absl::StrCat("block ", number);
    return key;
  }
  // So that calls of the disk have an order.
  void Settle() {
    EXPECT_TRUE(Eventually([&] { return store_->Stats().disk->queued_bytes == 0; }));
  }
  void Put(uint32_t number) {
    if (!store_->Reserve("t", kBlock, 1).ok()) return;
    const auto view = store_->Begin("t", kBlock);
    if (!view.ok()) return store_->Unreserve("t", kBlock, 1);
    std::memset(view->memory.data, static_cast<int>(number + 1), kBlock);
    bool existed = false;
    const auto published = store_->Publish(view->handle, KeyOf(number), std::nullopt, &existed);
    if (published.ok()) store_->Release(published->handle);
    if (!published.ok() || existed) store_->Release(view->handle);
    Settle();
  }
  void Get(uint32_t number) {
    const auto view = store_->Acquire("t", KeyOf(number));
    if (view.ok()) {
      EXPECT_EQ(view->memory.data[0], std::byte{static_cast<uint8_t>(number + 1)});
      EXPECT_EQ(DigestOf({view->memory.data, view->memory.bytes}), view->digest);
      store_->Release(view->handle);
    } else {
      EXPECT_TRUE(absl::IsNotFound(view.status())) << view.status();
    }
    Settle();
  }
  void Check() {
    const BlockStoreStats stats = store_->Stats();
    EXPECT_EQ(stats.leased, 0u);
    EXPECT_EQ(stats.reserved_bytes, 0u);
    EXPECT_EQ(stats.disk->queued_bytes, 0u);
    EXPECT_EQ(stats.pinned, pinned_ ? 1u : 0u);
    EXPECT_EQ(stats.blocks, stats.published) << "some are neither found nor gone";
    EXPECT_LE(stats.published, kRamBlocks);
    EXPECT_EQ(stats.bytes, stats.published * kBlock);
    EXPECT_EQ(stats.arena.used_bytes, stats.published * SlotBytesFor(kBlock));
    const std::vector<BlockInfo> listed = store_->List("t", 100);  // of both tiers
    const auto on_disk = std::count_if(listed.begin(), listed.end(),
                                       [](const BlockInfo& info) { return info.on_disk; });
    EXPECT_EQ(on_disk, static_cast<ptrdiff_t>(stats.disk->log.blocks));
    EXPECT_GE(listed.size(), stats.published);
    EXPECT_LE(listed.size(), stats.published + stats.disk->log.blocks);
    EXPECT_EQ(stats.digest_failures, 0u);
  }

  SimulatedDisk disk_;
  const testing::DiskHooks hooks_;  // none: the disk outlives the log
  std::atomic<uint64_t> calls_{0};
  uint64_t opening_ = 0;
  std::unique_ptr<TieredBlockStore> store_;
  bool pinned_ = false;
};

class TieredFailureTest : public ::testing::Test {
 protected:
  void SetUp() override { spdlog::set_level(spdlog::level::off); }  // thousands of errors
  void TearDown() override { spdlog::set_level(spdlog::level::info); }

  static void AnyCallOf(bool encrypted) {
    SCOPED_TRACE(encrypted ? "encrypted" : "plain");
    TieredLife whole(encrypted);
    whole.Run();
    ASSERT_GT(whole.operations(), 100u);
    const uint64_t stride = GivenNumber("QUARRY_FAILURE_STRIDE", encrypted ? 20 : 5);
    for (int i = 0; i < Fault::kKinds; ++i) {
      const auto kind = static_cast<Fault::Kind>(i);
      if (kind == Fault::kStall) continue;  // fails nothing
      uint64_t struck = 0;
      for (uint64_t n = Seed() % stride; n < whole.operations() && !HasFailure(); n += stride) {
        SCOPED_TRACE(absl::StrCat(std::string(NameOf(kind)), " at ", n));
        TieredLife life(encrypted);
        life.Schedule(kind, n);
        life.Run();
        struck += life.struck(kind);
      }
      EXPECT_GT(struck, 50 / stride) << NameOf(kind);
    }
    std::printf("%lu calls of the disk, every %lu-th\n", whole.operations(), stride);
  }
};

TEST_F(TieredFailureTest, AnyCallOfTheDisk) {
  for (const bool encrypted : {false, true}) AnyCallOf(encrypted);
}

TEST_F(TieredFailureTest, AnyCallThatTakesMemory) {
  TieredLife whole(false);
  whole.Run();
  ASSERT_GT(whole.calls(), 90u);
  for (uint64_t n = 0; n < whole.calls() && !HasFailure(); ++n) {
    SCOPED_TRACE(absl::StrCat("refused at ", n));
    TieredLife life(false, n);
    life.Run();
  }
}

// While the disk stalls, so many blocks are taken and the others are not; then all is as ever.
TEST_F(TieredFailureTest, AnyAdmissionToTheQueue) {
  constexpr uint32_t kBlocks = 6;
  for (uint32_t admitted = 1; admitted <= kBlocks; ++admitted) {
    SCOPED_TRACE(absl::StrCat(admitted, " admitted"));
    absl::Notification goes_on;
    SimulatedDisk disk(
        {.bytes = LogBytes(20, kSegment), .stall = [&] { goes_on.WaitForNotification(); }});
    const testing::DiskHooks hooks;
    auto ram = BlockStore::Create(SmallRam());
    ASSERT_TRUE(ram.ok()) << ram.status();
    auto log = BlockLog::Open(std::make_unique<testing::HookedDisk>(&disk, &hooks),
                              {.segment_bytes = kSegment});
    ASSERT_TRUE(log.ok()) << log.status();
    TieredBlockStore store(*std::move(ram), *std::move(log),
                           {.max_queued_bytes = admitted * kBlock});
    disk.Schedule({Fault::kStall, disk.operations()});
    for (uint32_t i = 0; i < kBlocks; ++i) {
      ASSERT_TRUE(store.Reserve("t", kBlock, 1).ok());
      const auto view = store.Begin("t", kBlock);
      ASSERT_TRUE(view.ok()) << view.status();
      std::memset(view->memory.data, static_cast<int>(i + 1), kBlock);
      BlockKey key;
      key.id.bytes[0] = static_cast<uint8_t>(i + 1);
      bool existed = false;
      ASSERT_TRUE(store.Publish(view->handle, key, std::nullopt, &existed).ok());
      store.Release(view->handle);
    }
    BlockStoreStats stats = store.Stats();
    EXPECT_EQ(stats.disk->queued_bytes, admitted * kBlock);
    EXPECT_EQ(stats.disk->not_admitted, kBlocks - admitted);
    EXPECT_EQ(stats.leased, admitted) << "what waits is held, and nothing else";
    goes_on.Notify();
    ASSERT_TRUE(Eventually([&] { return store.Stats().disk->queued_bytes == 0; }));
    stats = store.Stats();
    EXPECT_EQ(stats.leased, 0u);
    EXPECT_EQ(stats.published, kBlocks);
    EXPECT_EQ(stats.disk->log.blocks, admitted);
    EXPECT_EQ(stats.arena.used_bytes, kBlocks * SlotBytesFor(kBlock));
  }
}

}  // namespace
}  // namespace quarry

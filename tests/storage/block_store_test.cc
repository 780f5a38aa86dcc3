// Publishing, finding, leases, purges, pins and digests. Evictions have a file of their own.
#include "storage/block_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/byte_digest.h"
#include "tests/storage/store_fixture.h"

namespace quarry {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class BlockStoreTest : public StoreTest {};

TEST_F(BlockStoreTest, NothingIsFoundBeforeItIsPublished) {
  EXPECT_TRUE(absl::IsNotFound(store_->Acquire("t", KeyOf(1)).status()));
  const BlockView writing = Begin("t", 5000);
  EXPECT_EQ(writing.state, BlockState::kWriting);
  EXPECT_FALSE(Has("t", 1));
  const BlockView published = Publish(writing.handle, KeyOf(1));
  EXPECT_EQ(published.state, BlockState::kPublished);
  EXPECT_EQ(published.handle, writing.handle);
  EXPECT_TRUE(Has("t", 1));
  const BlockStoreStats stats = store_->Stats();
  EXPECT_EQ(stats.hits, 0u);
  EXPECT_EQ(stats.misses, 1u);  // Contains does not count
}

TEST_F(BlockStoreTest, AFoundBlockHasItsBytesAndTheirDigest) {
  Cached("t", 7, 5000);
  auto view = store_->Acquire("t", KeyOf(7));
  ASSERT_TRUE(view.ok());
  EXPECT_EQ(view->id, IdOf(7));
  EXPECT_EQ(view->memory.bytes, 5000u);
  EXPECT_EQ(view->digest, DigestOf({view->memory.data, 5000}));
  std::vector<std::byte> out(5000);
  EXPECT_TRUE(store_->CopyOut(view->handle, 0, out).ok());
  EXPECT_EQ(out, std::vector<std::byte>(5000, std::byte{7}));
}

TEST_F(BlockStoreTest, EveryFieldOfTheKeyMustMatch) {
  Publish(Begin("t", 4096).handle, KeyOf(1, 9, 3));
  EXPECT_TRUE(store_->Contains("t", KeyOf(1, 9, 3)));
  BlockKey other = KeyOf(1, 9, 3);
  other.full_key += "!";
  EXPECT_FALSE(store_->Contains("t", other));
  EXPECT_FALSE(store_->Contains("t", KeyOf(1, 8, 3)));
  EXPECT_FALSE(store_->Contains("t", KeyOf(1, 0, 3)));
  EXPECT_FALSE(store_->Contains("t", KeyOf(1, 9, 4)));
  EXPECT_FALSE(store_->Contains("t", KeyOf(2, 9, 3)));
  EXPECT_FALSE(store_->Contains("other", KeyOf(1, 9, 3)));
  EXPECT_TRUE(absl::IsNotFound(store_->Acquire("t", other).status()));
}

TEST_F(BlockStoreTest, OneIdOfTwoTenantsIsTwoBlocks) {
  Cached("alice", 1, 4096);
  EXPECT_FALSE(Has("bob", 1));
  Publish(Begin("bob", 4096, 'b').handle, KeyOf(1));
  auto alices = store_->Acquire("alice", KeyOf(1)), bobs = store_->Acquire("bob", KeyOf(1));
  ASSERT_TRUE(alices.ok() && bobs.ok());
  EXPECT_EQ(alices->memory.data[0], std::byte{1});
  EXPECT_EQ(bobs->memory.data[0], std::byte{'b'});
  EXPECT_NE(alices->memory.extent, bobs->memory.extent);
  EXPECT_EQ(*store_->Purge("bob", std::nullopt, {}), 1u);
  EXPECT_TRUE(Has("alice", 1));
}

TEST_F(BlockStoreTest, TheFirstOfTwoWritersWins) {
  const BlockView first = Begin("t", 4096, '1'), second = Begin("t", 4096, '2');
  Publish(first.handle, KeyOf(1));
  bool existed = false;
  auto winner = store_->Publish(second.handle, KeyOf(1), std::nullopt, &existed);
  ASSERT_TRUE(winner.ok()) << winner.status();
  EXPECT_TRUE(existed);
  EXPECT_EQ(winner->handle, first.handle);
  EXPECT_EQ(winner->memory.data[0], std::byte{'1'});
  // The loser stays readable for its writer and can be published no more.
  EXPECT_EQ(second.memory.data[0], std::byte{'2'});
  EXPECT_TRUE(absl::IsFailedPrecondition(
      store_->Publish(second.handle, KeyOf(2), std::nullopt, &existed).status()));
  EXPECT_FALSE(existed);
  EXPECT_EQ(store_->Stats().duplicate_publishes, 1u);
  EXPECT_EQ(store_->Stats().blocks, 2u);
  store_->Release(second.handle);
  EXPECT_EQ(store_->Stats().blocks, 1u);
  store_->Release(winner->handle);
  EXPECT_EQ(store_->Stats().leased, 1u);  // the first writer's
  store_->Release(first.handle);
  EXPECT_EQ(store_->Stats().leased, 0u);
  EXPECT_TRUE(Has("t", 1));
}

TEST_F(BlockStoreTest, AnIdOfAnotherKeyIsNeverServed) {
  Cached("t", 1, 4096);
  BlockKey collision = KeyOf(1);
  collision.full_key = "another";
  const BlockView writing = Begin("t", 4096, 'c');
  bool existed = true;
  EXPECT_TRUE(absl::IsAlreadyExists(
      store_->Publish(writing.handle, collision, std::nullopt, &existed).status()));
  EXPECT_FALSE(existed);
  EXPECT_FALSE(store_->Contains("t", collision));
  EXPECT_TRUE(Has("t", 1));
  store_->Release(writing.handle);
  EXPECT_EQ(store_->Stats().blocks, 1u);
}

TEST_F(BlockStoreTest, AnAbandonedBlockIsFreedAndFoundByNobody) {
  const BlockView writing = Begin("t", 4096);
  EXPECT_EQ(store_->Stats().blocks, 1u);
  store_->Release(writing.handle);
  const BlockStoreStats stats = store_->Stats();
  EXPECT_EQ(stats.blocks, 0u);
  EXPECT_EQ(stats.bytes, 0u);
  EXPECT_EQ(stats.arena.used_bytes, 0u);
}

TEST_F(BlockStoreTest, BeginNeedsAReservationOfThatSizeAndTenant) {
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->Begin("t", 4096).status()));
  ASSERT_TRUE(store_->Reserve("t", 4096, 2).ok());
  EXPECT_EQ(store_->Stats().reserved_bytes, 8192u);
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->Begin("t", 4095).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->Begin("other", 4096).status()));
  ASSERT_TRUE(store_->Begin("t", 4096).ok());
  store_->Unreserve("t", 4096, 1);
  EXPECT_EQ(store_->Stats().reserved_bytes, 0u);
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->Begin("t", 4096).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(store_->Reserve("t", 0, 1)));
  EXPECT_TRUE(store_->Reserve("t", 4096, 0).ok());
}

TEST_F(BlockStoreTest, StaleHandlesAreRefused) {
  const BlockView old = Begin("t", 4096);
  store_->Release(old.handle);
  bool existed = false;
  EXPECT_TRUE(absl::IsFailedPrecondition(
      store_->Publish(old.handle, KeyOf(1), std::nullopt, &existed).status()));
  const BlockView reuse = Begin("t", 4096);
  EXPECT_EQ(reuse.handle.slot, old.handle.slot);
  EXPECT_GT(reuse.handle.generation, old.handle.generation);
  EXPECT_TRUE(absl::IsFailedPrecondition(
      store_->Publish(old.handle, KeyOf(1), std::nullopt, &existed).status()));
  std::vector<std::byte> out(10);
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->CopyOut(old.handle, 0, out)));
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->CopyOut({99, 1}, 0, out)));
  EXPECT_DEATH(store_->Release(old.handle), "QUARRY_CHECK");
  Publish(reuse.handle, KeyOf(1));
}

TEST_F(BlockStoreTest, AFlippedByteIsDataLossAndRetiresTheBlock) {
  for (const uint64_t at : {0ull, 4999ull, 9999ull}) {
    const BlockView view = Leased("t", at + 1, 10000);
    auto other = store_->Acquire("t", KeyOf(at + 1));
    ASSERT_TRUE(other.ok());
    std::vector<std::byte> out(100);
    ASSERT_TRUE(store_->CopyOut(view.handle, 5000, out).ok());
    view.memory.data[at] ^= std::byte{0x10};
    const absl::Status status = store_->CopyOut(view.handle, 5000, out);
    EXPECT_TRUE(absl::IsDataLoss(status));
    EXPECT_THAT(std::string(status.message()), HasSubstr(IdOf(at + 1).Hex()));
    EXPECT_FALSE(Has("t", at + 1));
    // Leases go on; a second reader is told as well, and the block goes with the last lease.
    EXPECT_TRUE(absl::IsDataLoss(store_->CopyOut(other->handle, 0, {})));
    store_->Release(view.handle);
    EXPECT_EQ(store_->Stats().blocks, 1u);
    store_->Release(other->handle);
    EXPECT_EQ(store_->Stats().blocks, 0u);
  }
  EXPECT_EQ(store_->Stats().digest_failures, 6u);
  // The id is free for bytes that are good.
  Cached("t", 1, 10000);
  EXPECT_TRUE(Has("t", 1));
}

TEST_F(BlockStoreTest, AGivenDigestIsKeptAndChecked) {
  const BlockView writing = Begin("t", 4096);
  bool existed = false;
  auto view = store_->Publish(writing.handle, KeyOf(1), ByteDigest{1, 2}, &existed);
  ASSERT_TRUE(view.ok());
  EXPECT_EQ(view->digest, (ByteDigest{1, 2}));
  std::vector<std::byte> out(4096);
  EXPECT_TRUE(absl::IsDataLoss(store_->CopyOut(view->handle, 0, out)));
}

TEST_F(BlockStoreTest, CopyOutChecksItsRangeAndItsBlock) {
  const BlockView view = Begin("t", 100);
  std::vector<std::byte> out(100);
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->CopyOut(view.handle, 0, out)));
  Publish(view.handle, KeyOf(1));
  EXPECT_TRUE(absl::IsInvalidArgument(store_->CopyOut(view.handle, 1, out)));
  EXPECT_TRUE(absl::IsInvalidArgument(store_->CopyOut(view.handle, 101, {})));
  EXPECT_TRUE(absl::IsInvalidArgument(store_->CopyOut(view.handle, ~0ull, {out.data(), 2})));
  EXPECT_TRUE(store_->CopyOut(view.handle, 100, {}).ok());
  EXPECT_TRUE(store_->CopyOut(view.handle, 99, {out.data(), 1}).ok());
  EXPECT_EQ(out[0], std::byte{'x'});
}

TEST_F(BlockStoreTest, GetAfterPurgeIsNotFound) {
  Cached("t", 1, 4096);
  Cached("t", 2, 4096, 1);
  Publish(Begin("t", 4096).handle, KeyOf(3, 0, 5));
  Cached("other", 1, 4096);
  NamespaceDigest five;
  five.bytes[0] = 5;
  EXPECT_EQ(*store_->Purge("t", five, {}), 1u);
  EXPECT_FALSE(store_->Contains("t", KeyOf(3, 0, 5)));
  const std::vector<BlockId> ids = {IdOf(1), IdOf(77), IdOf(1)};
  EXPECT_EQ(*store_->Purge("t", five, ids), 0u);  // both must match
  EXPECT_EQ(*store_->Purge("t", std::nullopt, ids), 1u);
  EXPECT_FALSE(Has("t", 1));
  EXPECT_TRUE(Has("t", 2, 1));
  EXPECT_EQ(*store_->Purge("stranger", std::nullopt, {}), 0u);
  EXPECT_EQ(*store_->Purge("t", std::nullopt, {}), 1u);
  EXPECT_FALSE(Has("t", 2, 1));
  EXPECT_TRUE(Has("other", 1));
}

TEST_F(BlockStoreTest, APurgedBlockStaysReadableWhileItIsLeased) {
  const BlockView view = Leased("t", 1, 4096);
  ASSERT_TRUE(store_->Acquire("t", KeyOf(1)).ok());
  EXPECT_EQ(*store_->Purge("t", std::nullopt, {}), 1u);
  EXPECT_FALSE(Has("t", 1));
  EXPECT_EQ(*store_->Purge("t", std::nullopt, {}), 0u);
  // Its memory serves nobody else meanwhile, even when everything is asked for.
  while (true) {
    if (!store_->Reserve("t", 4096, 1).ok()) break;
    std::memset(store_->Begin("t", 4096)->memory.data, 'n', 4096);
  }
  EXPECT_EQ(view.memory.data[17], std::byte{1});
  std::vector<std::byte> out(4096);
  EXPECT_TRUE(store_->CopyOut(view.handle, 0, out).ok());
  store_->Release(view.handle);
  EXPECT_EQ(view.memory.data[17], std::byte{1});
  const uint64_t blocks = store_->Stats().blocks;
  store_->Release(view.handle);
  EXPECT_EQ(store_->Stats().blocks, blocks - 1);
  EXPECT_TRUE(store_->Reserve("t", 4096, 1).ok());
}

TEST_F(BlockStoreTest, AnIdMayBePublishedAgainWhileItsPurgedBlockIsLeased) {
  const BlockView old = Leased("t", 1, 4096);
  EXPECT_TRUE(store_->Purge("t", std::nullopt, {}).ok());
  const BlockView anew = Publish(Begin("t", 4096, 'n').handle, KeyOf(1));
  EXPECT_NE(anew.memory.data, old.memory.data);
  store_->Release(old.handle);
  EXPECT_TRUE(Has("t", 1));
  EXPECT_EQ(store_->Acquire("t", KeyOf(1))->handle, anew.handle);
}

TEST_F(BlockStoreTest, PurgeTakesPinnedBlocksAndTheirPinsForgetThem) {
  Cached("t", 1, 4096);
  Cached("t", 2, 4096);
  Pin("t", "p", {1, 2});
  const std::vector<BlockId> one = {IdOf(1)};
  EXPECT_EQ(*store_->Purge("t", std::nullopt, one), 1u);
  EXPECT_EQ(store_->Stats().pinned, 1u);
  Cached("t", 1, 4096);
  auto list = store_->List("t", 10);
  for (const BlockInfo& info : list) {
    EXPECT_EQ(info.pins.size(), info.id == IdOf(2) ? 1u : 0u);
  }
  EXPECT_TRUE(store_->Unpin("t", "p").ok());
  EXPECT_EQ(store_->Stats().pinned, 0u);
}

TEST_F(BlockStoreTest, PinsAreOwnedAndNameWhatIsThere) {
  Cached("alice", 1, 4096);
  Cached("bob", 2, 4096);
  const std::vector<BlockId> both = {IdOf(1), IdOf(2)}, one = {IdOf(1)};
  const absl::Time never = absl::InfiniteFuture();
  EXPECT_TRUE(absl::IsNotFound(store_->Pin("alice", "p", both, never)));
  EXPECT_EQ(store_->Stats().pinned, 0u);
  EXPECT_TRUE(absl::IsNotFound(store_->Pin("bob", "p", one, never)));
  EXPECT_TRUE(absl::IsInvalidArgument(store_->Pin("alice", "", one, never)));
  EXPECT_TRUE(absl::IsInvalidArgument(store_->Pin("alice", std::string(257, 'p'), one, never)));
  EXPECT_TRUE(absl::IsInvalidArgument(store_->Pin("alice", "p", {}, never)));
  Pin("alice", "p", {1, 1, 1});
  EXPECT_TRUE(absl::IsNotFound(store_->Unpin("bob", "p")));
  EXPECT_TRUE(absl::IsNotFound(store_->Unpin("alice", "q")));
  EXPECT_EQ(store_->Stats().pinned, 1u);
  EXPECT_TRUE(store_->Unpin("alice", "p").ok());
  EXPECT_TRUE(absl::IsNotFound(store_->Unpin("alice", "p")));
}

TEST_F(BlockStoreTest, APinOfTooManyIdsIsRefusedWithItsNumber) {
  const std::vector<BlockId> ids((1 << 16) + 1, IdOf(1));
  Leased("t", 1, 4096);
  EXPECT_TRUE(store_->Pin("t", "p", std::span(ids).first(1 << 16), absl::InfiniteFuture()).ok());
  EXPECT_EQ(store_->Stats().pinned, 1u);
  const absl::Status status = store_->Pin("t", "p", ids, absl::InfiniteFuture());
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("65537 blocks; at most 65536"));
}

TEST_F(BlockStoreTest, PinsOverTheQuotaAreRefusedAndChangeNothing) {
  BlockStoreOptions options = SmallOptions();
  options.max_pinned_bytes_per_tenant = 10000;
  options.max_pins_per_tenant = 2;
  Start(options);
  for (uint64_t n : {1, 2, 3}) Cached("t", n, 4096);
  Pin("t", "a", {1, 2});
  const std::vector<BlockId> third = {IdOf(3)}, first = {IdOf(1)};
  EXPECT_TRUE(absl::IsResourceExhausted(store_->Pin("t", "b", third, absl::InfiniteFuture())));
  EXPECT_EQ(store_->Stats().pinned, 2u);
  Pin("t", "b", {1});
  EXPECT_TRUE(absl::IsResourceExhausted(store_->Pin("t", "c", first, absl::InfiniteFuture())));
}

TEST_F(BlockStoreTest, APinnedLeafIsChargedWithTheAncestorsItKeeps) {
  BlockStoreOptions options = SmallOptions();
  options.max_pinned_bytes_per_tenant = 10000;
  Start(options);
  for (uint64_t n : {1, 2, 3}) Cached("t", n, 4096, n - 1);
  const std::vector<BlockId> leaf = {IdOf(3)};
  EXPECT_TRUE(absl::IsResourceExhausted(store_->Pin("t", "leaf", leaf, absl::InfiniteFuture())));
  EXPECT_EQ(store_->Stats().pinned, 0u);
  Pin("t", "middle", {2});
  EXPECT_EQ(store_->Stats().pinned, 2u);  // with its parent
}

TEST_F(BlockStoreTest, ListShowsPublishedBlocksOfTheTenant) {
  Cached("t", 1, 4096);
  Leased("t", 2, 5000, 1);
  Begin("t", 4096);
  Cached("other", 3, 4096);
  Pin("t", "p", {2});
  std::vector<BlockInfo> list = store_->List("t", 10);
  ASSERT_EQ(list.size(), 2u);
  if (list[0].id != IdOf(1)) std::swap(list[0], list[1]);
  EXPECT_EQ(list[0].children, 1u);
  EXPECT_EQ(list[0].leases, 0u);
  EXPECT_EQ(list[1].id, IdOf(2));
  EXPECT_EQ(list[1].parent, IdOf(1));
  EXPECT_EQ(list[1].bytes, 5000u);
  EXPECT_EQ(list[1].leases, 1u);
  EXPECT_EQ(list[1].tenant, "t");
  EXPECT_EQ(list[1].state, BlockState::kPublished);
  EXPECT_THAT(list[1].pins, ElementsAre("p"));
  EXPECT_EQ(store_->List("t", 1).size(), 1u);
  EXPECT_THAT(store_->List("stranger", 10), IsEmpty());
  const std::vector<BlockId> ids = {IdOf(1), IdOf(2), IdOf(2), IdOf(3), IdOf(4)};
  EXPECT_EQ(store_->PublishedBytes("t", ids), 9096u);
}

TEST_F(BlockStoreTest, ListAndPurgeGoThroughMoreBlocksThanOneHoldOfTheLock) {
  BlockStoreOptions options = SmallOptions();
  options.arena.capacity_bytes = 64 * kMiB;
  Start(options);
  constexpr uint64_t kBlocks = 10000;
  for (uint64_t n = 1; n <= kBlocks; ++n) Cached(n % 2 == 0 ? "even" : "odd", n, 64);
  EXPECT_EQ(store_->List("even", 100000).size(), kBlocks / 2);
  EXPECT_EQ(store_->List("even", 4321).size(), 4321u);
  EXPECT_EQ(*store_->Purge("even", std::nullopt, {}), kBlocks / 2);
  EXPECT_EQ(store_->List("even", 100000).size(), 0u);
  EXPECT_EQ(store_->Stats().published, kBlocks / 2);
}

}  // namespace
}  // namespace quarry

// Blocks under engine keys, leases, pins and purges through the engine.
#include <string>
#include <vector>

#include "proto/byte_digest.h"
#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

std::span<const std::byte> Bytes(const std::string& s) { return std::as_bytes(std::span(s)); }

class EngineStoreTest : public EngineTest {
 protected:
  void SetUp() override { Start(); }
  std::string value_ = std::string(5000, 'x') + "end";
};

TEST_F(EngineStoreTest, GetReturnsWhatWasPutWithItsDigest) {
  auto put = engine_->Put(session_, "vllm", "key", Bytes(value_), DigestOf(Bytes(value_)));
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_FALSE(put->existed);
  EXPECT_EQ(put->digest, DigestOf(Bytes(value_)));
  ByteDigest digest;
  auto got = engine_->Get(session_, "vllm", "key", &digest);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(*got, value_);
  EXPECT_EQ(digest, put->digest);

  const std::string other = "other bytes";
  auto again = engine_->Put(session_, "vllm", "key", Bytes(other), std::nullopt);
  ASSERT_TRUE(again.ok());
  EXPECT_TRUE(again->existed);
  EXPECT_EQ(again->digest, put->digest);
  EXPECT_EQ(*engine_->Get(session_, "vllm", "key", nullptr), value_);
}

TEST_F(EngineStoreTest, NamespacesKeysAndTenantsDoNotMeet) {
  ASSERT_TRUE(engine_->Put(session_, "ab", "c", Bytes(value_), std::nullopt).ok());
  EXPECT_TRUE(absl::IsNotFound(engine_->Get(session_, "a", "bc", nullptr).status()));
  EXPECT_TRUE(absl::IsNotFound(engine_->Get(session_, "abc", "c", nullptr).status()));
  EXPECT_TRUE(absl::IsNotFound(engine_->Get(NewSession("mallory"), "ab", "c", nullptr).status()));
  const std::vector<std::string> keys = {"x", "c"};
  auto exists = engine_->Exists(session_, "ab", keys);
  ASSERT_TRUE(exists.ok());
  EXPECT_EQ(*exists, (std::vector<bool>{false, true}));
}

TEST_F(EngineStoreTest, BadPutsAreRefusedAndLeaveNothing) {
  const ByteDigest wrong{1, 2};
  EXPECT_TRUE(absl::IsDataLoss(engine_->Put(session_, "n", "k", Bytes(value_), wrong).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(engine_->Put(session_, "n", "", Bytes(value_), {}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      engine_->Put(session_, "n", std::string(257, 'k'), Bytes(value_), {}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(engine_->Put(session_, "n", "k", {}, {}).status()));
  EXPECT_TRUE(engine_->Put(session_, "n", std::string(256, 'k'), Bytes(value_), {}).ok());
  EXPECT_TRUE(absl::IsNotFound(engine_->Get(session_, "n", "k", nullptr).status()));
  const BlockStoreStats stats = engine_->Stats().store;
  EXPECT_EQ(stats.blocks, 1u);
  EXPECT_EQ(stats.leased, 0u);
  EXPECT_EQ(stats.reserved_bytes, 0u);
}

TEST_F(EngineStoreTest, ALeaseEndsWithItsSession) {
  ASSERT_TRUE(engine_->Put(session_, "n", "k", Bytes(value_), {}).ok());
  const SessionId other = NewSession("alice");
  auto lease = engine_->LeaseEngineBlock(other, "n", "k");
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_EQ(lease->bytes, value_.size());
  EXPECT_EQ(lease->digest, DigestOf(Bytes(value_)));
  EXPECT_EQ(engine_->Stats().store.leased, 1u);
  EXPECT_TRUE(absl::IsNotFound(engine_->ReleaseLease(session_, lease->lease)));
  engine_->EndSession(other);
  EXPECT_EQ(engine_->Stats().store.leased, 0u);
  EXPECT_EQ(engine_->Stats().leases, 0u);
}

TEST_F(EngineStoreTest, ALeasedBlockOutlivesItsPurge) {
  ASSERT_TRUE(engine_->Put(session_, "n", "k", Bytes(value_), {}).ok());
  auto lease = engine_->LeaseEngineBlock(session_, "n", "k");
  ASSERT_TRUE(lease.ok());
  auto purged = engine_->Purge(session_, {.whole_tenant = true});
  ASSERT_TRUE(purged.ok());
  EXPECT_EQ(*purged, 1u);
  EXPECT_TRUE(absl::IsNotFound(engine_->Get(session_, "n", "k", nullptr).status()));
  EXPECT_EQ(engine_->Stats().store.blocks, 1u);
  ASSERT_OK(engine_->ReleaseLease(session_, lease->lease));
  EXPECT_EQ(engine_->Stats().store.blocks, 0u);
}

TEST_F(EngineStoreTest, AContextGoesOnAfterItsBlocksArePurged) {
  const KvData data(SmallShape(), 600, Seed());
  const OpenRequest request = OpenFor(SmallModel(), Tokens(600), 600);
  const OpenResult opened = OpenAndFill(session_, request, data);
  ASSERT_TRUE(engine_->Seal(session_, opened.context).ok());
  ASSERT_TRUE(engine_->Purge(session_, {.whole_tenant = true}).ok());
  EXPECT_EQ(Reused(session_, request), 0u);
  const auto row = AttendOne(*engine_, session_, SmallShape(), opened.context, 0, {0, 600}, 1);
  ASSERT_TRUE(row->answer.status.ok());
  EXPECT_LE(WorstError(data, *row), 1e-3);
}

TEST_F(EngineStoreTest, APurgeNamesExactlyOneThing) {
  EXPECT_TRUE(absl::IsInvalidArgument(engine_->Purge(session_, {}).status()));
  EXPECT_TRUE(
      absl::IsInvalidArgument(engine_->Purge(session_, {true, NamespaceDigest{}, {}}).status()));
  EXPECT_TRUE(engine_->Purge(session_, {false, NamespaceDigest{}, {}}).ok());
}

TEST_F(EngineStoreTest, PinnedContextsSurvivePressureAndOutliveTheirSession) {
  EngineOptions options = SmallOptions();
  options.arena.capacity_bytes = 8 << 20;
  options.max_pinned_bytes_per_tenant = 4 * SmallShape().block_bytes();
  Start(options);
  const KvData data(SmallShape(), 600, Seed());
  const OpenRequest pinned = OpenFor(SmallModel(), Tokens(600), 600);
  const SessionId owner = NewSession("alice");
  const OpenResult opened = OpenAndFill(owner, pinned, data);
  PinRequest pin;
  pin.name = "prompt";
  pin.context = opened.context;
  pin.blocks = {BlockId{}};
  EXPECT_TRUE(absl::IsInvalidArgument(engine_->Pin(owner, pin).status()));
  pin.blocks.clear();
  ASSERT_TRUE(engine_->Seal(owner, opened.context).ok());
  auto bytes = engine_->Pin(owner, pin);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_EQ(*bytes, 2 * SmallShape().block_bytes());
  engine_->EndSession(owner);
  for (uint32_t i = 0; engine_->Stats().store.evictions < 50; ++i) {
    ASSERT_LT(i, 1000u);
    Cache(session_, OpenFor(SmallModel(), Tokens(600, 100000 + 1000 * i), 600), data);
  }
  EXPECT_EQ(Reused(session_, pinned), 512u);
  EXPECT_TRUE(absl::IsNotFound(engine_->Unpin(NewSession("mallory"), "prompt")));
  EXPECT_OK(engine_->Unpin(session_, "prompt"));
  const uint64_t evictions = engine_->Stats().store.evictions;
  for (uint32_t i = 0; engine_->Stats().store.evictions < evictions + 100; ++i) {
    ASSERT_LT(i, 1000u);
    Cache(session_, OpenFor(SmallModel(), Tokens(600, 10000000 + 1000 * i), 600), data);
  }
  EXPECT_EQ(Reused(session_, pinned), 0u);
}

TEST_F(EngineStoreTest, APinsBytesAreThoseOfItsDistinctBlocksAlone) {
  const auto small = engine_->Put(session_, "n", "small", Bytes(value_), {});
  const std::string large_value(20000, 'y');
  const auto large = engine_->Put(session_, "n", "large", Bytes(large_value), {});
  ASSERT_TRUE(small.ok() && large.ok());
  // Not pinned: another of the tenant's, and another tenant's of the same key.
  ASSERT_TRUE(engine_->Put(session_, "n", "other", Bytes(large_value), {}).ok());
  ASSERT_TRUE(engine_->Put(NewSession("bob"), "n", "small", Bytes(value_), {}).ok());
  PinRequest pin;
  pin.name = "p";
  pin.blocks = {small->id, large->id, small->id};
  auto bytes = engine_->Pin(session_, pin);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_EQ(*bytes, value_.size() + large_value.size());
  pin.blocks = {small->id, BlockId{}};
  EXPECT_TRUE(absl::IsNotFound(engine_->Pin(session_, pin).status()));
}

TEST_F(EngineStoreTest, PinsAreCountedByNameAndTheirLimitIsConfigured) {
  EngineOptions options = SmallOptions();
  options.max_pins_per_tenant = 2;
  Start(options);
  const auto put = engine_->Put(session_, "n", "k", Bytes(value_), {});
  ASSERT_TRUE(put.ok()) << put.status();
  PinRequest pin;
  pin.blocks = {put->id};
  const auto set = [&](SessionId session, const char* name) {
    pin.name = name;
    return engine_->Pin(session, pin).status();
  };
  EXPECT_OK(set(session_, "a"));
  EXPECT_OK(set(session_, "b"));
  const absl::Status third = set(session_, "c");
  EXPECT_TRUE(absl::IsResourceExhausted(third)) << third;
  EXPECT_THAT(std::string(third.message()), ::testing::HasSubstr("2 pins of 2"));
  EXPECT_OK(set(session_, "a"));  // replaced, not added
  EXPECT_OK(engine_->Unpin(session_, "b"));
  EXPECT_OK(set(session_, "c"));
}

TEST_F(EngineStoreTest, ListedBlocksAreTheTenantsOwn) {
  Cache(session_, OpenFor(SmallModel(), Tokens(600), 600), KvData(SmallShape(), 600, 1));
  ASSERT_TRUE(engine_->Put(session_, "n", "k", Bytes(value_), {}).ok());
  auto blocks = engine_->ListBlocks(session_, 100);
  ASSERT_TRUE(blocks.ok());
  EXPECT_EQ(blocks->size(), 3u);
  blocks = engine_->ListBlocks(session_, 2);
  ASSERT_TRUE(blocks.ok());
  EXPECT_EQ(blocks->size(), 2u);
}

}  // namespace
}  // namespace quarry

#include "storage/pin_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace quarry {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

BlockId IdOf(uint8_t n) {
  BlockId id;
  id.bytes[0] = n;
  return id;
}

class PinTableTest : public ::testing::Test {
 protected:
  PinTable::SizedBlock Block(uint8_t n) { return {IdOf(n), 100}; }
  PinTable::Change Set(TenantName tenant, const char* name, std::vector<uint8_t> ids,
                       absl::Time expires = absl::InfiniteFuture()) {
    std::vector<PinTable::SizedBlock> blocks;
    for (uint8_t n : ids) blocks.push_back(Block(n));
    auto change = table_.Set(tenant, name, blocks, expires);
    EXPECT_TRUE(change.ok()) << change.status();
    return change.value_or(PinTable::Change{});
  }
  TenantNames tenants_;
  TenantName alice_ = tenants_.Intern("alice"), bob_ = tenants_.Intern("bob");
  PinTable table_{{.max_bytes_per_tenant = 500, .max_pins_per_tenant = 3}};
};

TEST_F(PinTableTest, ABlockIsGainedWithItsFirstPinAndLostWithItsLast) {
  EXPECT_THAT(Set(alice_, "a", {1, 2}).gained, UnorderedElementsAre(IdOf(1), IdOf(2)));
  EXPECT_THAT(Set(alice_, "b", {2, 3}).gained, ElementsAre(IdOf(3)));
  EXPECT_THAT(table_.NamesOf(alice_, IdOf(2)), ElementsAre("a", "b"));
  EXPECT_THAT(table_.Remove(alice_, "a")->lost, ElementsAre(IdOf(1)));
  EXPECT_THAT(table_.Remove(alice_, "b")->lost, UnorderedElementsAre(IdOf(2), IdOf(3)));
  EXPECT_EQ(table_.PinnedBytes(alice_), 0u);
}

TEST_F(PinTableTest, ANameSetAgainIsReplaced) {
  Set(alice_, "a", {1, 2});
  const PinTable::Change change = Set(alice_, "a", {2, 3});
  EXPECT_THAT(change.gained, ElementsAre(IdOf(3)));
  EXPECT_THAT(change.lost, ElementsAre(IdOf(1)));
  EXPECT_EQ(table_.PinnedBytes(alice_), 200u);
}

TEST_F(PinTableTest, OnlyItsOwnerCanRemoveAPin) {
  Set(alice_, "a", {1});
  EXPECT_TRUE(absl::IsNotFound(table_.Remove(bob_, "a").status()));
  EXPECT_TRUE(absl::IsNotFound(table_.Remove(nullptr, "a").status()));
  EXPECT_THAT(table_.NamesOf(bob_, IdOf(1)), IsEmpty());
  Set(bob_, "a", {1});
  EXPECT_THAT(table_.Remove(alice_, "a")->lost, ElementsAre(IdOf(1)));
  EXPECT_THAT(table_.NamesOf(bob_, IdOf(1)), ElementsAre("a"));
}

TEST_F(PinTableTest, TheByteQuotaCountsDistinctBlocksAndRefusesWithNumbers) {
  Set(alice_, "a", {1, 2, 3, 4});
  Set(alice_, "b", {3, 4, 5});  // 500 in all
  std::vector<PinTable::SizedBlock> one_more = {Block(1), Block(6)};
  const absl::Status status = table_.Set(alice_, "c", one_more, absl::InfiniteFuture()).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("100 bytes more wanted"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("pinned 500 of 500"));
  EXPECT_THAT(table_.NamesOf(alice_, IdOf(1)), ElementsAre("a"));
  // Replacing frees what only the replaced pin held.
  EXPECT_THAT(Set(alice_, "b", {3, 6}).gained, ElementsAre(IdOf(6)));
  EXPECT_EQ(table_.PinnedBytes(alice_), 500u);
  Set(bob_, "a", {1, 2, 3, 4, 5});  // each tenant has its own
}

TEST_F(PinTableTest, TheNumberOfPinsIsBounded) {
  for (const char* name : {"a", "b", "c"}) Set(alice_, name, {1});
  std::vector<PinTable::SizedBlock> block = {Block(1)};
  EXPECT_TRUE(absl::IsResourceExhausted(
      table_.Set(alice_, "d", block, absl::InfiniteFuture()).status()));
  Set(alice_, "c", {2});
  EXPECT_TRUE(table_.Remove(alice_, "a").ok());
  Set(alice_, "d", {1});
}

TEST_F(PinTableTest, PinsEndAtTheirTime) {
  const absl::Time start = absl::UnixEpoch();
  Set(alice_, "late", {1, 2}, start + absl::Seconds(20));
  Set(alice_, "early", {1, 3}, start + absl::Seconds(10));
  Set(bob_, "never", {1});
  TenantName tenant = nullptr;
  PinTable::Change change;
  EXPECT_FALSE(table_.RemoveOneExpired(start + absl::Seconds(9), &tenant, &change));
  ASSERT_TRUE(table_.RemoveOneExpired(start + absl::Seconds(10), &tenant, &change));
  EXPECT_EQ(tenant, alice_);
  EXPECT_THAT(change.lost, ElementsAre(IdOf(3)));
  EXPECT_FALSE(table_.RemoveOneExpired(start + absl::Seconds(10), &tenant, &change));
  ASSERT_TRUE(table_.RemoveOneExpired(start + absl::Hours(1), &tenant, &change));
  EXPECT_THAT(change.lost, UnorderedElementsAre(IdOf(1), IdOf(2)));
  EXPECT_FALSE(table_.RemoveOneExpired(start + absl::Hours(1), &tenant, &change));
  // Setting again moves the end.
  Set(alice_, "a", {1}, start);
  Set(alice_, "a", {1}, start + absl::Hours(9));
  EXPECT_FALSE(table_.RemoveOneExpired(start + absl::Hours(1), &tenant, &change));
}

TEST_F(PinTableTest, AForgottenBlockLeavesAllPins) {
  Set(alice_, "a", {1, 2});
  Set(alice_, "b", {1});
  table_.Forget(alice_, IdOf(1));
  EXPECT_EQ(table_.PinnedBytes(alice_), 100u);
  EXPECT_THAT(table_.NamesOf(alice_, IdOf(1)), IsEmpty());
  EXPECT_THAT(table_.Remove(alice_, "b")->lost, IsEmpty());
  EXPECT_THAT(table_.Remove(alice_, "a")->lost, ElementsAre(IdOf(2)));
}

}  // namespace
}  // namespace quarry

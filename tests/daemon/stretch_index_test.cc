#include "daemon/stretch_index.h"

#include <gtest/gtest.h>

#include <memory>

namespace quarry {
namespace {

StretchId Content(uint32_t i) {
  StretchId id;
  id.bytes[0] = static_cast<uint8_t>(i);
  id.bytes[1] = static_cast<uint8_t>(i >> 8);
  return id;
}

BlockId Block(uint32_t i) {
  BlockId id;
  id.bytes[0] = static_cast<uint8_t>(i);
  id.bytes[1] = static_cast<uint8_t>(i >> 8);
  id.bytes[31] = 1;
  return id;
}

class StretchIndexTest : public ::testing::Test {
 protected:
  StretchIndexTest() {
    BlockStoreOptions options;
    options.arena.capacity_bytes = 4 << 20;
    options.arena.extent_bytes = 1 << 20;
    options.arena.huge_pages = ArenaOptions::HugePages::kNever;
    options.arena.prefault = false;
    store_ = *BlockStore::Create(options);
    index_ = std::make_unique<StretchIndex>(*store_);
  }
  void Publish(std::string_view tenant, const BlockId& id) {
    ASSERT_TRUE(store_->Reserve(tenant, 4096, 1).ok());
    const auto view = store_->Begin(tenant, 4096);
    ASSERT_TRUE(view.ok());
    bool existed = false;
    ASSERT_TRUE(store_->Publish(view->handle, {id, {}, {}, "key"}, std::nullopt, &existed).ok());
    store_->Release(view->handle);
  }
  std::unique_ptr<BlockStore> store_;
  std::unique_ptr<StretchIndex> index_;
};

TEST_F(StretchIndexTest, TheLatestPlacesComeFirst) {
  for (uint32_t i = 0; i < 6; ++i) index_->Add("t", Content(1), {Block(i), {}, i});
  index_->Add("t", Content(1), {Block(3), {}, 3});  // seen again
  std::vector<uint32_t> numbers;
  for (const StretchPlace& place : index_->Find("t", Content(1))) numbers.push_back(place.number);
  EXPECT_EQ(numbers, (std::vector<uint32_t>{3, 5, 4, 2}));
  EXPECT_TRUE(index_->Find("t", Content(2)).empty());
}

TEST_F(StretchIndexTest, TenantsSeeTheirOwn) {
  index_->Add("t", Content(1), {Block(1), {}, 0});
  EXPECT_TRUE(index_->Find("u", Content(1)).empty());
}

TEST_F(StretchIndexTest, BlocksThatAreGoneAreForgotten) {
  Publish("t", Block(1));
  index_->Add("t", Content(1), {Block(1), {}, 0});
  index_->Add("t", Content(1), {Block(2), {}, 5});
  index_->Add("u", Content(1), {Block(1), {}, 0});  // of a tenant who has no such block
  index_->Sweep();
  ASSERT_EQ(index_->Find("t", Content(1)).size(), 1u);
  EXPECT_EQ(index_->Find("t", Content(1))[0].block, Block(1));
  EXPECT_TRUE(index_->Find("u", Content(1)).empty());
}

TEST_F(StretchIndexTest, ItDoesNotGrowWithWhatIsGone) {
  Publish("t", Block(0));
  for (uint32_t i = 0; i < 5000; ++i) index_->Add("t", Content(i), {Block(i), {}, i});
  uint32_t known = 0;
  for (uint32_t i = 0; i < 5000; ++i) known += index_->Find("t", Content(i)).empty() ? 0 : 1;
  EXPECT_LT(known, 1100u);
  EXPECT_EQ(index_->Find("t", Content(0)).size(), 1u);
}

}  // namespace
}  // namespace quarry

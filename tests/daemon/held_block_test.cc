#include "daemon/held_block.h"

#include <cstring>

#include "daemon/prefix_index.h"
#include "tests/daemon/engine_fixture.h"

namespace quarry {
namespace {

class HeldBlockTest : public ::testing::Test {
 protected:
  void SetUp() override {
    BlockStoreOptions options;
    options.arena.capacity_bytes = 1 << 20;
    options.arena.extent_bytes = 1 << 18;
    options.arena.huge_pages = ArenaOptions::HugePages::kNever;
    store_ = *BlockStore::Create(options);
  }
  std::shared_ptr<HeldBlock> Begin(char fill) {
    EXPECT_OK(store_->Reserve("t", kBytes, 1));
    auto block = std::make_shared<HeldBlock>(*store_, *store_->Begin("t", kBytes), BlockOrigin{});
    std::memset(block->writable(), fill, kBytes);
    return block;
  }
  static BlockKey Key(uint8_t which) {
    BlockKey key;
    key.id.bytes[0] = which;
    key.full_key = std::string(1, static_cast<char>(which));
    return key;
  }
  static constexpr uint64_t kBytes = 4096;
  std::unique_ptr<BlockStore> store_;
};

TEST_F(HeldBlockTest, PublishingTwiceHasTheFirstOutcome) {
  const auto block = Begin('a');
  EXPECT_FALSE(block->published());
  auto first = block->Publish(Key(1));
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(*first, nullptr);
  EXPECT_TRUE(block->published());
  auto second = block->Publish(Key(1));
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(*second, nullptr);
  EXPECT_TRUE(absl::IsFailedPrecondition(block->Publish(Key(2)).status()));
}

TEST_F(HeldBlockTest, TheLoserNamesTheWinnerAndStaysReadable) {
  const auto winner = Begin('a');
  ASSERT_TRUE(winner->Publish(Key(1)).ok());
  const auto loser = Begin('b');
  for (int i = 0; i < 2; ++i) {
    auto outcome = loser->Publish(Key(1));
    ASSERT_TRUE(outcome.ok());
    ASSERT_NE(*outcome, nullptr);
    EXPECT_EQ((*outcome)->data(), winner->data());
  }
  EXPECT_FALSE(loser->published());
  EXPECT_EQ(static_cast<char>(loser->data()[100]), 'b');
}

TEST_F(HeldBlockTest, AReusedBlockThatChangedFailsItsFirstCheckAndIsRetired) {
  {
    const auto block = Begin('a');
    ASSERT_TRUE(block->Publish(Key(1)).ok());
    block->writable()[77] ^= std::byte{1};  // as memory errors do
    EXPECT_OK(block->Verify());             // its own writer does not check again
  }
  auto view = store_->Acquire("t", Key(1));
  ASSERT_TRUE(view.ok());
  HeldBlock reused(*store_, *view, BlockOrigin{});
  EXPECT_TRUE(absl::IsDataLoss(reused.Verify()));
  EXPECT_FALSE(store_->Contains("t", Key(1)));
}

TEST_F(HeldBlockTest, AGoodReusedBlockIsCheckedOnce) {
  ASSERT_TRUE(Begin('a')->Publish(Key(1)).ok());
  auto view = store_->Acquire("t", Key(1));
  ASSERT_TRUE(view.ok());
  HeldBlock reused(*store_, *view, BlockOrigin{});
  EXPECT_OK(reused.Verify());
  reused.writable()[0] ^= std::byte{1};
  EXPECT_OK(reused.Verify());
}

}  // namespace
}  // namespace quarry

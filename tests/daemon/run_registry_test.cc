// Which contexts share a run's indexes, when blocks are broken or purged, evicted or computed
// again.
#include "daemon/run_registry.h"

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "tests/daemon/engine_fixture.h"

namespace quarry {
namespace {

constexpr KvShape kShape = {
    .layers = 1, .heads = 1, .kv_heads = 1, .head_dim = 16, .dtype = DType::kFp32};
using Blocks = std::vector<std::shared_ptr<HeldBlock>>;

class NoIndex : public KeyIndex {
 public:
  std::string_view kind() const override { return "none"; }
};

class RunRegistryTest : public ::testing::Test {
 protected:
  RunRegistryTest() {
    BlockStoreOptions options;
    options.arena.capacity_bytes = 1 << 20;
    options.arena.extent_bytes = 1 << 18;
    options.arena.huge_pages = ArenaOptions::HugePages::kNever;
    store_ = *BlockStore::Create(options);
  }
  // Run 0's, as one writer computes them, with ids from `id`.
  Blocks Write(uint8_t id = 1) {
    Blocks blocks;
    for (uint8_t b = 0; b < kBlocks; ++b) {
      EXPECT_OK(store_->Reserve("t", kBytes, 1));
      blocks.push_back(
          std::make_shared<HeldBlock>(*store_, *store_->Begin("t", kBytes), BlockOrigin{}));
      std::memset(blocks.back()->writable(), b, kBytes);
      BlockKey key;
      key.id.bytes[0] = id + b;
      key.full_key = std::string(1, static_cast<char>(id + b));
      const auto winner = blocks.back()->Publish(key);
      EXPECT_OK(winner.status());
      if (winner.ok() && *winner != nullptr) blocks.back() = *winner;
    }
    return blocks;
  }
  void Break(HeldBlock* block) {
    block->writable()[9] ^= std::byte{1};
    EXPECT_TRUE(absl::IsDataLoss(store_->CopyOut(block->handle(), 0, {})));
  }
  // Those of a run of these blocks that nobody uses any more.
  std::shared_ptr<RunIndexes> IdleIndexes(const Blocks& blocks, uint64_t bytes = 0) {
    const auto run = Get(blocks);
    run->indexes()->Set(0, 0, std::make_shared<NoIndex>(), bytes);
    return run->indexes();
  }
  std::shared_ptr<const quarry::Run> Get(const Blocks& blocks) {
    return registry_.GetOrMake("t", 0, kShape, blocks);
  }

  static constexpr uint64_t kBytes = 4096;
  static constexpr uint8_t kBlocks = 3;
  std::unique_ptr<BlockStore> store_;
  RunRegistry registry_{{.first_run_token = 0, .run_tokens = kBlocks * kBlockTokens}};
};

TEST_F(RunRegistryTest, ABrokenBlocksRunIsForgottenAndNotThatOfWhoComputedItAgain) {
  const Blocks first = Write();
  const auto broken = Get(first);
  EXPECT_EQ(Get(Write()), broken);  // of the same blocks
  Break(first[1].get());
  registry_.Forget(first[1]->handle());
  EXPECT_EQ(registry_.live(), 0u);
  const Blocks again = Write();
  EXPECT_EQ(again[0]->handle(), first[0]->handle());
  EXPECT_NE(again[1]->handle(), first[1]->handle());
  const auto good = Get(again);
  EXPECT_NE(good, broken);
  // Whoever reads the broken one later has nothing more to say.
  registry_.Forget(first[1]->handle());
  EXPECT_EQ(Get(again), good);
}

TEST_F(RunRegistryTest, WhoStillHasABrokenBlockKeepsItsRunForItself) {
  const Blocks first = Write();
  Break(first[1].get());
  const Blocks again = Write();  // before the first one's run is attached
  const auto own = Get(first);
  EXPECT_TRUE(std::ranges::equal(own->blocks(), first));
  const auto good = Get(again);
  EXPECT_TRUE(std::ranges::equal(good->blocks(), again));
  EXPECT_NE(good->indexes(), own->indexes());
  EXPECT_EQ(Get(again), good);
}

TEST_F(RunRegistryTest, ARunWhoseBlocksAreGoneGivesWayToTheCallers) {
  const Blocks first = Write();
  const auto broken = Get(first);
  Break(first[1].get());  // and nobody has told the registry
  const Blocks again = Write();
  const auto good = Get(again);
  EXPECT_TRUE(std::ranges::equal(good->blocks(), again));
  EXPECT_NE(good->indexes(), broken->indexes());
  EXPECT_EQ(Get(again), good);
}

TEST_F(RunRegistryTest, IndexesOfABlockThatBreaksGoWithItThoughTheirRunIsMadeAnew) {
  const Blocks first = Write();
  const auto indexes = IdleIndexes(first);
  Break(first[1].get());
  const Blocks again = Write();  // before the registry has been told
  EXPECT_EQ(Get(again)->indexes(), indexes);
  registry_.Forget(first[1]->handle());
  EXPECT_NE(Get(again)->indexes(), indexes);
}

TEST_F(RunRegistryTest, IndexesThatQueuedWorkHoldsAreNotDroppedForRoom) {
  auto held = IdleIndexes(Write(), 10);
  EXPECT_EQ(registry_.idle_bytes(), 0u);
  EXPECT_FALSE(registry_.DropIdle(1));
  held.reset();
  EXPECT_EQ(registry_.idle_bytes(), 10u);
  EXPECT_TRUE(registry_.DropIdle(1));
  EXPECT_EQ(registry_.idle_bytes(), 0u);
}

TEST_F(RunRegistryTest, NoIndexesAreDroppedForMoreThanAllOfThem) {
  const Blocks one = Write(), other = Write(100);
  IdleIndexes(one, 10);
  IdleIndexes(other, 20);
  EXPECT_FALSE(registry_.DropIdle(31));
  EXPECT_EQ(registry_.idle_bytes(), 30u);
  EXPECT_TRUE(registry_.DropIdle(30));
  EXPECT_EQ(registry_.idle_bytes(), 20u);  // the older ones are gone
  Get(other)->indexes()->Set(0, 0, std::make_shared<NoIndex>(), 5);
  EXPECT_EQ(registry_.idle_bytes(), 5u);
}

TEST_F(RunRegistryTest, IndexesOutliveTheirBlocksAndEndWithThoseThatTookTheirPlaces) {
  auto blocks = std::make_unique<Blocks>(Write());
  const auto indexes = IdleIndexes(*blocks);
  blocks.reset();
  ASSERT_OK(store_->Reserve("t", kBytes, (1 << 20) / kBytes));  // evicts them
  store_->Unreserve("t", kBytes, (1 << 20) / kBytes);
  const Blocks again = Write();
  EXPECT_EQ(store_->Stats().evictions, kBlocks);
  auto run = Get(again);
  EXPECT_EQ(run->indexes(), indexes);
  EXPECT_EQ(registry_.FindIndexed(0, kShape, again), run);
  Break(again[2].get());
  EXPECT_EQ(registry_.FindIndexed(0, kShape, again), nullptr);
  run = Get(again);
  registry_.Forget(again[2]->handle());
  EXPECT_NE(Get(Write())->indexes(), indexes);
}

}  // namespace
}  // namespace quarry

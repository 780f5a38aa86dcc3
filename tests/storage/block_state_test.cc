// The life table, move by move.
#include "storage/block_state.h"

#include <set>
#include <utility>

#include <gtest/gtest.h>

#include "storage/block_records.h"

namespace quarry {
namespace {

using enum BlockState;

const std::set<std::pair<BlockState, BlockState>>& LegalMoves() {
  static const auto* moves = new std::set<std::pair<BlockState, BlockState>>{
      {kEmpty, kWriting},     {kEmpty, kFree},        {kWriting, kSealed}, {kWriting, kRetiring},
      {kSealed, kPublished},  {kSealed, kRetiring},   {kPublished, kRetiring},
      {kRetiring, kFree},     {kFree, kEmpty},
  };
  return *moves;
}

// A block brought into `state` by legal moves only.
uint32_t BlockIn(BlockRecords* records, BlockState state) {
  const uint32_t block = records->New();
  if (state == kFree) {
    records->Move(block, kFree);
    return block;
  }
  for (const BlockState next : {kWriting, kSealed, kPublished, kRetiring}) {
    if (records->at(block).state == state) return block;
    records->Move(block, next);
  }
  return block;
}

TEST(BlockStateTest, TheTableAllowsExactlyTheLegalMoves) {
  for (int from = 0; from < kBlockStates; ++from) {
    for (int to = 0; to < kBlockStates; ++to) {
      const std::pair move(static_cast<BlockState>(from), static_cast<BlockState>(to));
      EXPECT_EQ(MayMove(move.first, move.second), LegalMoves().contains(move))
          << BlockStateName(move.first) << " -> " << BlockStateName(move.second);
    }
  }
}

TEST(BlockStateTest, LegalMovesAreMadeAndIllegalOnesEndTheProcess) {
  testing::GTEST_FLAG(death_test_style) = "fast";
  for (int from = 0; from < kBlockStates; ++from) {
    for (int to = 0; to < kBlockStates; ++to) {
      const auto target = static_cast<BlockState>(to);
      BlockRecords records;
      const uint32_t block = BlockIn(&records, static_cast<BlockState>(from));
      ASSERT_EQ(records.at(block).state, static_cast<BlockState>(from));
      if (LegalMoves().contains({static_cast<BlockState>(from), target})) {
        records.Move(block, target);
        EXPECT_EQ(records.at(block).state, target);
      } else {
        EXPECT_DEATH(records.Move(block, target), "QUARRY_CHECK failed: MayMove");
      }
    }
  }
}

TEST(BlockStateTest, ReuseBumpsTheGenerationAndForgetsTheOldBlock) {
  BlockRecords records;
  const uint32_t block = BlockIn(&records, kRetiring);
  const BlockHandle old = records.HandleOf(block);
  records.at(block).key.full_key = "secret";
  EXPECT_TRUE(records.IsCurrent(old));
  records.Free(block);
  EXPECT_FALSE(records.IsCurrent(old));
  ASSERT_EQ(records.New(), block);
  EXPECT_FALSE(records.IsCurrent(old));
  EXPECT_EQ(records.at(block).generation, old.generation + 1);
  EXPECT_EQ(records.at(block).key.full_key, "");
  EXPECT_EQ(records.at(block).state, kEmpty);
  EXPECT_FALSE(records.IsCurrent({block + 1, 1}));
}

}  // namespace
}  // namespace quarry

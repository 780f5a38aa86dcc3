#include "gpu/cuda/attention_plan.h"

#include <gtest/gtest.h>

#include <vector>

namespace quarry::cuda {
namespace {

DeviceAttention Attention(uint32_t heads, uint32_t kv_heads, uint32_t first, uint32_t rows,
                          std::span<const DeviceKv> parts, uint32_t window = 0) {
  DeviceAttention a;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.head_dim = 128;
  a.first_token = first;
  a.rows = rows;
  a.window = window;
  a.parts = parts;
  return a;
}

AttentionPlan PlanOf(const DeviceAttention& attention, uint32_t multiprocessors) {
  return PlanAttention({&attention, 1}, multiprocessors);
}

TEST(AttentionPlanTest, ADecodeStepKeepsAllMultiprocessorsBusy) {
  const std::vector<DeviceKv> parts = {{nullptr, nullptr, 0, {0, 32768}}};
  const AttentionPlan plan = PlanOf(Attention(32, 8, 32767, 1, parts), 132);
  EXPECT_EQ(plan.row_tiles, 1u);
  EXPECT_EQ(plan.query_tiles, 1u);
  EXPECT_EQ(plan.splits, 33u);  // 8 * 33 blocks, two for each multiprocessor
}

TEST(AttentionPlanTest, APrefillIsNotSplit) {
  const std::vector<DeviceKv> parts = {{nullptr, nullptr, 0, {0, 8192}}};
  const AttentionPlan plan = PlanOf(Attention(32, 8, 0, 8192, parts), 132);
  EXPECT_EQ(plan.row_tiles, 2u);
  EXPECT_EQ(plan.query_tiles, 8192u * 4 / 128);
  EXPECT_EQ(plan.splits, 1u);
}

TEST(AttentionPlanTest, FewKeysAreNotSplit) {
  for (const uint32_t tokens : {0u, 1u, 64u, 511u - 64u}) {
    const std::vector<DeviceKv> parts = {{nullptr, nullptr, 0, {0, tokens}}};
    EXPECT_EQ(PlanOf(Attention(8, 8, 5000, 1, parts), 132).splits, 1u) << tokens;
  }
  const std::vector<DeviceKv> parts = {{nullptr, nullptr, 0, {0, 512}}};
  EXPECT_EQ(PlanOf(Attention(8, 8, 5000, 1, parts), 132).splits, 2u);
  EXPECT_EQ(PlanOf(Attention(8, 8, 5000, 1, {}), 132).splits, 1u);
}

TEST(AttentionPlanTest, OnlyVisibleTokensCount) {
  // Of 4096 tokens a window of 256 shows four tiles; a token at 600 sees the first 601.
  const std::vector<DeviceKv> parts = {{nullptr, nullptr, 0, {0, 128}},
                                       {nullptr, nullptr, 0, {200, 4096}}};
  EXPECT_EQ(PlanOf(Attention(8, 8, 4095, 1, parts, 256), 132).splits, 1u);
  EXPECT_EQ(PlanOf(Attention(8, 8, 600, 1, parts), 132).splits, (2u + 7u) / 4u);
}

TEST(AttentionPlanTest, SeveralShareTheMultiprocessorsByTheirKeys) {
  const std::vector<DeviceKv> wide = {{nullptr, nullptr, 0, {0, 131072}}};
  const std::vector<DeviceKv> narrow = {{nullptr, nullptr, 0, {0, 2048}}};
  const DeviceAttention long_one = Attention(32, 8, 131071, 1, wide);
  const DeviceAttention short_one = Attention(32, 8, 2047, 1, narrow);
  const std::vector<DeviceAttention> alike(8, long_one);
  EXPECT_EQ(PlanAttention(alike, 132).splits, 4u);  // 8 * 8 * 4 blocks
  // Seven short ones leave nearly all of it to the long one.
  std::vector<DeviceAttention> unlike(8, short_one);
  unlike[5] = long_one;
  EXPECT_GE(PlanAttention(unlike, 132).splits, 28u);
  EXPECT_LE(PlanAttention(unlike, 132).splits, 33u);
  const std::vector<DeviceAttention> few(8, Attention(32, 8, 100, 1, {}));
  EXPECT_EQ(PlanAttention(few, 132).splits, 1u);
}

}  // namespace
}  // namespace quarry::cuda

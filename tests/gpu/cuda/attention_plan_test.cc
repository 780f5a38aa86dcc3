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

TEST(AttentionPlanTest, ADecodeStepKeepsAllMultiprocessorsBusy) {
  const std::vector<DeviceKv> parts = {{nullptr, nullptr, 0, {0, 32768}}};
  const AttentionPlan plan = PlanAttention(Attention(32, 8, 32767, 1, parts), 132);
  EXPECT_EQ(plan.row_tiles, 1u);
  EXPECT_EQ(plan.query_tiles, 1u);
  EXPECT_EQ(plan.splits, 33u);  // 8 * 33 blocks, two for each multiprocessor
}

TEST(AttentionPlanTest, APrefillIsNotSplit) {
  const std::vector<DeviceKv> parts = {{nullptr, nullptr, 0, {0, 8192}}};
  const AttentionPlan plan = PlanAttention(Attention(32, 8, 0, 8192, parts), 132);
  EXPECT_EQ(plan.row_tiles, 2u);
  EXPECT_EQ(plan.query_tiles, 8192u * 4 / 128);
  EXPECT_EQ(plan.splits, 1u);
}

TEST(AttentionPlanTest, FewKeysAreNotSplit) {
  for (const uint32_t tokens : {0u, 1u, 64u, 511u - 64u}) {
    const std::vector<DeviceKv> parts = {{nullptr, nullptr, 0, {0, tokens}}};
    EXPECT_EQ(PlanAttention(Attention(8, 8, 5000, 1, parts), 132).splits, 1u) << tokens;
  }
  const std::vector<DeviceKv> parts = {{nullptr, nullptr, 0, {0, 512}}};
  EXPECT_EQ(PlanAttention(Attention(8, 8, 5000, 1, parts), 132).splits, 2u);
  EXPECT_EQ(PlanAttention(Attention(8, 8, 5000, 1, {}), 132).splits, 1u);
}

TEST(AttentionPlanTest, OnlyVisibleTokensCount) {
  // Of 4096 tokens a window of 256 shows four tiles; a token at 600 sees the first 601.
  const std::vector<DeviceKv> parts = {{nullptr, nullptr, 0, {0, 128}},
                                       {nullptr, nullptr, 0, {200, 4096}}};
  EXPECT_EQ(PlanAttention(Attention(8, 8, 4095, 1, parts, 256), 132).splits, 1u);
  EXPECT_EQ(PlanAttention(Attention(8, 8, 600, 1, parts), 132).splits, (2u + 7u) / 4u);
}

}  // namespace
}  // namespace quarry::cuda

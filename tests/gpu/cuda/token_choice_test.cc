// The choice of tokens by a card's kernel, its own source on an imitation of a card: greedy ones
// are the host's, drawn ones could be those of exact arithmetic.
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <vector>

#include "tests/gpu/cuda/imitated_warp.h"
// What the card's sources know of CUDA.
#include "gpu/device.h"
#include "gpu/sampler.h"
// After the operations that it uses.
#include "gpu/cuda/token_choice.cuh"
#include "tests/gpu/token_choices.h"
#include "tests/support/seed.h"

namespace quarry::cuda {
namespace {

class TokenChoiceTest : public ::testing::Test {
 protected:
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }

  ChosenToken Choose(const RowOfLogits& row, const TokenDraw& draw) {
    const uint32_t threads = 32 * (1 + Below(4));
    const auto shared = std::make_unique<TokenChoiceShared>();
    std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(*shared));
    ChosenToken out{12345678, 12345678};
    ImitatedBlock(static_cast<int>(threads), random_()).Run([&] {
      ChooseTokenOfRow(row, draw, threads, shared.get(), &out);
    });
    return out;
  }

  std::mt19937_64 random_{Seed()};
};

TEST_F(TokenChoiceTest, ChoicesAreThoseOfExactArithmetic) {
  for (int round = 0; round < 150; ++round) {
    const uint32_t vocab = round % 10 == 0 ? 1 + Below(3) : 1 + Below(3000);
    const uint32_t rows = 1 + Below(3), tile = round % 3 == 0 ? vocab : 1 + Below(vocab);
    std::vector<std::vector<float>> logits;
    for (uint32_t r = 0; r < rows; ++r) logits.push_back(testing::MadeLogits(random_, vocab));
    const std::vector<float> tiles = testing::InTiles(logits, tile);
    for (uint32_t r = 0; r < rows; ++r) {
      const TokenDraw draw = testing::MadeDraw(random_);
      const ChosenToken chosen = Choose({tiles.data(), r, rows, vocab, tile}, draw);
      ASSERT_EQ(chosen.unfit, kEveryToken);
      ASSERT_EQ(testing::WrongChoice(logits[r], draw, chosen.id, 1e-5), "")
          << "temperature " << draw.temperature << ", top_p " << draw.top_p << ", at " << draw.at
          << ", " << vocab << " ids in tiles of " << tile;
    }
  }
}

TEST_F(TokenChoiceTest, TiesAreTakenInTheOrderOfTheirIds) {
  const std::vector<float> logits = {-0.0f, 2, 0.0f, 2, 2, -5, 2, 0.0f};
  const auto choose = [&](const TokenDraw& draw) {
    return Choose({logits.data(), 0, 1, 8, 8}, draw).id;
  };
  EXPECT_EQ(choose({0, 1, 0}), 1u);
  // At a small temperature nothing else weighs anything.
  const uint32_t want[] = {1, 3, 4, 6};
  for (uint32_t i = 0; i < 4; ++i) EXPECT_EQ(choose({1e-3, 1, (i + 0.5) / 4}), want[i]);
  EXPECT_EQ(choose({1e-3, 0.5, 0.99}), 3u);  // two of them reach a half
  EXPECT_EQ(choose({1e-3, 0.51, 0.99}), 4u);
  EXPECT_EQ(choose({1e-3, 1e-9, 0.99}), 1u);
}

TEST_F(TokenChoiceTest, WhatIsNoFiniteNumberIsNamed) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (const double temperature : {0.0, 1.0}) {
      std::vector<float> logits = testing::MadeLogits(random_, 500);
      const uint32_t first = Below(250);
      logits[first] = logits[499] = bad;
      EXPECT_EQ(Choose({logits.data(), 0, 1, 500, 77}, {temperature, 0.9, 0.5}).unfit, first);
    }
  }
}

// Sums of whole numbers do not depend on who adds first.
TEST_F(TokenChoiceTest, TheSameDrawChoosesTheSameToken) {
  const std::vector<float> logits = testing::MadeLogits(random_, 2000);
  for (int round = 0; round < 5; ++round) {
    const TokenDraw draw = testing::MadeDraw(random_);
    const uint32_t first = Choose({logits.data(), 0, 1, 2000, 2000}, draw).id;
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(Choose({logits.data(), 0, 1, 2000, 2000}, draw).id, first);
    }
  }
}

}  // namespace
}  // namespace quarry::cuda

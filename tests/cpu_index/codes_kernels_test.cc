// The kernels over coded keys and values: every instruction set gives what the layouts say.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu_index/kernels.h"
#include "cpu_index/simd.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using kernels::kCodeBlockKeys;
using kernels::kCodeCoordinates;

constexpr uint32_t kStored = 90, kQueries = 5;

class CodesKernelsTest : public ::testing::Test {
 protected:
  CodesKernelsTest() {
    codes_.resize(kStored * kernels::kCentroidBlockBytes);
    for (uint8_t& c : codes_) c = static_cast<uint8_t>(random_());
    weights_.resize(kQueries * kCodeCoordinates);
    for (int8_t& w : weights_) w = static_cast<int8_t>(random_());
    for (uint32_t b = 0; b < 37; ++b) which_.push_back(random_() % kStored);
  }

  std::mt19937 random_{Seed()};
  std::vector<uint8_t> codes_;
  std::vector<int8_t> weights_;
  std::vector<uint32_t> which_;
};

// A coded key's coordinate, from the layout's description.
int KeyCode(const uint8_t* block, uint32_t key, uint32_t c) {
  const uint8_t* const lane = block + 4 * key;
  if (c < 16) return lane[64 * (c / 8) + c % 4] >> (c % 8 / 4 * 4) & 15;
  const uint32_t e = c - 16;
  return lane[128 + 64 * (e / 16) + e % 4] >> (2 * (e % 16 / 4)) & 3;
}

TEST_F(CodesKernelsTest, SumsOfCodedKeysFollowTheLayout) {
  const auto n = static_cast<uint32_t>(which_.size() * kCodeBlockKeys);
  for (const bool chosen : {false, true}) {
    std::vector<int32_t> wanted;
    for (uint32_t i = 0; i < kQueries; ++i) {
      for (uint32_t t = 0; t < n; ++t) {
        const uint32_t b = t / kCodeBlockKeys;
        int32_t sum = 0;
        for (uint32_t c = 0; c < kCodeCoordinates; ++c) {
          sum += weights_[i * kCodeCoordinates + c] *
                 KeyCode(codes_.data() + (chosen ? which_[b] : b) * 256, t % kCodeBlockKeys, c);
        }
        wanted.push_back(sum);
      }
    }
    for (const SimdLevel level : SupportedSimdLevels()) {
      std::vector<int32_t> out(kQueries * n, -1);
      kernels::CodeTile tile{};
      tile.codes = codes_.data();
      tile.which = chosen ? which_.data() : nullptr;
      tile.blocks = static_cast<uint32_t>(which_.size());
      tile.weights = weights_.data();
      tile.queries = kQueries;
      tile.out = out.data();
      tile.ld_out = n;
      KernelsOf(level).sum_codes(tile);
      EXPECT_EQ(out, wanted) << SimdLevelName(level);
    }
  }
}

TEST_F(CodesKernelsTest, BlocksWithALargeSumAreFound) {
  constexpr uint32_t kBlocks = 64;
  std::vector<int32_t> sums(kQueries * kBlocks * kCodeBlockKeys);
  kernels::CodeTile tile{};
  tile.codes = codes_.data();
  tile.blocks = kBlocks;
  tile.weights = weights_.data();
  tile.queries = kQueries;
  tile.out = sums.data();
  tile.ld_out = kBlocks * kCodeBlockKeys;
  KernelsOf(SimdLevel::kScalar).sum_codes(tile);
  // Just at, or just above, the largest sum of a block, for one query.
  std::vector<int32_t> least(kQueries * kBlocks, std::numeric_limits<int32_t>::max());
  uint64_t wanted = 0;
  for (uint32_t b = 0; b < kBlocks; ++b) {
    const uint32_t i = random_() % kQueries;
    const auto first = sums.begin() + i * kBlocks * kCodeBlockKeys + b * kCodeBlockKeys;
    const bool hit = random_() % 2 == 0;
    least[i * kBlocks + b] = *std::max_element(first, first + kCodeBlockKeys) + (hit ? 0 : 1);
    wanted |= uint64_t{hit} << b;
  }
  tile.ld_out = kBlocks;
  for (const SimdLevel level : SupportedSimdLevels()) {
    EXPECT_EQ(KernelsOf(level).find_codes(tile, least.data()), wanted) << SimdLevelName(level);
  }
}

TEST_F(CodesKernelsTest, SumsOfCentroidsFollowTheLayout) {
  const auto n = static_cast<uint32_t>(which_.size() * kCodeBlockKeys);
  for (const bool chosen : {false, true}) {
    std::vector<int32_t> wanted;
    for (uint32_t i = 0; i < kQueries; ++i) {
      for (uint32_t t = 0; t < n; ++t) {
        const uint32_t b = t / kCodeBlockKeys, at = chosen ? which_[b] : b;
        const uint8_t* const block = codes_.data() + at * kernels::kCentroidBlockBytes;
        int32_t sum = 0;
        for (uint32_t c = 0; c < kCodeCoordinates; ++c) {
          sum += weights_[i * kCodeCoordinates + c] *
                 block[c / 4 * 64 + t % kCodeBlockKeys * 4 + c % 4];
        }
        wanted.push_back(sum);
      }
    }
    for (const SimdLevel level : SupportedSimdLevels()) {
      std::vector<int32_t> out(kQueries * n, -1);
      kernels::CentroidTile tile{};
      tile.centroids = codes_.data();
      tile.which = chosen ? which_.data() : nullptr;
      tile.blocks = static_cast<uint32_t>(which_.size());
      tile.weights = weights_.data();
      tile.queries = kQueries;
      tile.out = out.data();
      tile.ld_out = n;
      KernelsOf(level).sum_centroids(tile);
      EXPECT_EQ(out, wanted) << SimdLevelName(level);
    }
  }
}

}  // namespace
}  // namespace quarry

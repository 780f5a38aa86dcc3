// The kernels over coded keys and values: every instruction set gives what the layouts say.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
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

// Which part of a tile says where its stored blocks begin.
const uint8_t*& StoredOf(kernels::CodeTile& tile) { return tile.codes; }
const uint8_t*& StoredOf(kernels::CentroidTile& tile) { return tile.centroids; }

class CodesKernelsTest : public ::testing::Test {
 protected:
  CodesKernelsTest() {
    codes_.resize(kStored * kernels::kCentroidBlockBytes);
    for (uint8_t& c : codes_) c = static_cast<uint8_t>(random_());
    weights_.resize(kQueries * kCodeCoordinates);
    for (int8_t& w : weights_) w = static_cast<int8_t>(random_());
    for (uint32_t b = 0; b < 37; ++b) which_.push_back(random_() % kStored);
  }

  // All queries with `blocks` blocks: those of `which`, or the first ones if it is null.
  template <typename Tile>
  Tile MakeTile(const uint32_t* which, uint32_t blocks, std::vector<int32_t>* out) {
    out->assign(size_t{kQueries} * blocks * kCodeBlockKeys, -1);
    Tile tile{};
    StoredOf(tile) = codes_.data();
    tile.which = which;
    tile.blocks = blocks;
    tile.weights = weights_.data();
    tile.queries = kQueries;
    tile.out = out->data();
    tile.ld_out = size_t{blocks} * kCodeBlockKeys;
    return tile;
  }

  // [queries][keys] from the layout: code(block, key, c) in stored blocks of `block_bytes`.
  template <typename Code>
  std::vector<int32_t> SumsOf(const std::vector<uint32_t>& blocks, size_t block_bytes, Code code) {
    std::vector<int32_t> sums;
    for (uint32_t i = 0; i < kQueries; ++i) {
      for (const uint32_t b : blocks) {
        for (uint32_t key = 0; key < kCodeBlockKeys; ++key) {
          int32_t sum = 0;
          for (uint32_t c = 0; c < kCodeCoordinates; ++c) {
            sum +=
                weights_[i * kCodeCoordinates + c] * code(codes_.data() + b * block_bytes, key, c);
          }
          sums.push_back(sum);
        }
      }
    }
    return sums;
  }

  // Of the first blocks and of chosen ones, at every level.
  template <typename Tile, typename Code>
  void ExpectSums(void (*kernels::Table::*kernel)(const Tile&), size_t block_bytes, Code code) {
    const auto blocks = static_cast<uint32_t>(which_.size());
    std::vector<uint32_t> first(blocks);
    std::iota(first.begin(), first.end(), 0);
    for (const bool chosen : {false, true}) {
      const std::vector<int32_t> wanted = SumsOf(chosen ? which_ : first, block_bytes, code);
      for (const SimdLevel level : SupportedSimdLevels()) {
        std::vector<int32_t> out;
        (KernelsOf(level).*kernel)(MakeTile<Tile>(chosen ? which_.data() : nullptr, blocks, &out));
        EXPECT_EQ(out, wanted) << SimdLevelName(level) << (chosen ? ", chosen" : ", the first");
      }
    }
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

// A centroid's, likewise.
int CentroidByte(const uint8_t* block, uint32_t key, uint32_t c) {
  return block[c / 4 * 64 + key * 4 + c % 4];
}

TEST_F(CodesKernelsTest, SumsOfCodedKeysFollowTheLayout) {
  ExpectSums(&kernels::Table::sum_codes, 256, KeyCode);
}

TEST_F(CodesKernelsTest, SumsOfCentroidsFollowTheLayout) {
  ExpectSums(&kernels::Table::sum_centroids, kernels::kCentroidBlockBytes, CentroidByte);
}

TEST_F(CodesKernelsTest, BlocksWithALargeSumAreFound) {
  constexpr uint32_t kBlocks = 64;
  std::vector<int32_t> sums;
  auto tile = MakeTile<kernels::CodeTile>(nullptr, kBlocks, &sums);
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

}  // namespace
}  // namespace quarry

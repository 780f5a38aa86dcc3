// The arena's map against an oracle that knows the owner of every unit.
#include "gpu/cuda/arena_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tests/support/seed.h"

namespace quarry::cuda {
namespace {

constexpr uint64_t kUnit = ArenaMap::kAlignment;

TEST(ArenaMapTest, RefusalsNameWhatWasAskedForAndTheBudget) {
  ArenaMap map(10 * kUnit, 0);
  ASSERT_EQ(*map.Allocate(6 * kUnit, "first"), 0u);
  const absl::Status refused = map.Allocate(5 * kUnit, "gate and up").status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.message(),
            "device memory: 2560 bytes for gate and up, 3072 in use of a budget of 5120");
  EXPECT_EQ(map.Allocate(~uint64_t{0}, "all").status().message(),
            "device memory: 18446744073709551615 bytes for all, 3072 in use of a budget of 5120");
  EXPECT_EQ(map.used(), 6 * kUnit);  // refusals change nothing
  EXPECT_TRUE(map.Allocate(4 * kUnit, "rest").ok());
}

TEST(ArenaMapTest, RefusalForFragmentsNamesTheLargestPiece) {
  ArenaMap map(6 * kUnit, 0);
  std::vector<uint64_t> units;
  for (int i = 0; i < 6; ++i) units.push_back(*map.Allocate(kUnit, "unit"));
  map.Release(units[1], kUnit);
  map.Release(units[3], kUnit);
  EXPECT_EQ(map.Allocate(2 * kUnit, "two").status().message(),
            "device memory: 1024 bytes for two, 2048 in use of a budget of 3072, the largest free "
            "piece has 512");
}

TEST(ArenaMapTest, OverheadIsPartOfTheBudget) {
  ArenaMap map(10 * kUnit, 3 * kUnit + 1);
  EXPECT_EQ(map.limit(), 6 * kUnit);
  EXPECT_EQ(map.Allocate(7 * kUnit, "x").status().message(),
            "device memory: 3584 bytes for x, 1537 in use (1537 by CUDA itself) of a budget of "
            "5120");
  ASSERT_EQ(*map.Allocate(6 * kUnit, "x"), 0u);
  // More overhead than room: what is handed out stays, nothing more is.
  map.SetOverhead(8 * kUnit);
  EXPECT_FALSE(map.Allocate(1, "y").ok());
  map.Release(0, 6 * kUnit);
  EXPECT_EQ(map.largest_free(), 2 * kUnit);
  EXPECT_FALSE(map.Allocate(3 * kUnit, "y").ok());
  EXPECT_EQ(*map.Allocate(2 * kUnit, "y"), 0u);
  map.SetOverhead(100 * kUnit);
  EXPECT_EQ(map.limit(), 0u);
  EXPECT_FALSE(map.Allocate(0, "nothing").ok());
}

TEST(ArenaMapTest, NeighboursJoinWhateverTheOrderOfTheirRelease) {
  std::vector<int> order = {0, 1, 2, 3};
  do {
    ArenaMap map(4 * kUnit, 0);
    for (uint64_t i = 0; i < 4; ++i) ASSERT_EQ(*map.Allocate(kUnit - 7, "unit"), i * kUnit);
    for (const int i : order) map.Release(static_cast<uint64_t>(i) * kUnit, kUnit - 7);
    EXPECT_EQ(map.used(), 0u);
    EXPECT_EQ(map.peak(), 4 * kUnit);
    EXPECT_EQ(*map.Allocate(4 * kUnit, "all"), 0u);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(ArenaMapTest, TheSmallestPieceThatFitsIsTaken) {
  ArenaMap map(20 * kUnit, 0);
  const uint64_t wide = *map.Allocate(5 * kUnit, "wide");
  ASSERT_TRUE(map.Allocate(kUnit, "wall").ok());
  const uint64_t narrow = *map.Allocate(2 * kUnit, "narrow");
  ASSERT_TRUE(map.Allocate(kUnit, "wall").ok());
  map.Release(wide, 5 * kUnit);
  map.Release(narrow, 2 * kUnit);
  EXPECT_EQ(*map.Allocate(2 * kUnit, "x"), narrow);
  EXPECT_EQ(*map.Allocate(3 * kUnit, "y"), wide);
  EXPECT_EQ(map.high_water(), 9 * kUnit);
}

TEST(ArenaMapTest, SparePiecesLieAtTheFarEndAndOthersBeforeThem) {
  ArenaMap map(20 * kUnit, 2 * kUnit);  // a limit of 18
  ASSERT_EQ(*map.Allocate(3 * kUnit, "low"), 0u);
  EXPECT_EQ(*map.AllocateSpare(4 * kUnit, 2 * kUnit), 12 * kUnit);
  EXPECT_EQ(*map.AllocateSpare(4 * kUnit, 2 * kUnit), 8 * kUnit);
  EXPECT_EQ(map.AllocateSpare(6 * kUnit, 2 * kUnit).status().code(),
            absl::StatusCode::kResourceExhausted);
  // The piece of two units behind them is the smallest, but not before them.
  EXPECT_EQ(*map.Allocate(2 * kUnit, "x"), 3 * kUnit);
  EXPECT_EQ(*map.Allocate(3 * kUnit, "y"), 5 * kUnit);
  EXPECT_FALSE(map.Allocate(kUnit, "not at the end", 2 * kUnit).ok());
  EXPECT_EQ(*map.Allocate(kUnit, "behind, for there is no other room", kUnit), 16 * kUnit);
  EXPECT_EQ(map.AllocateSpare(1, 2 * kUnit).status().code(), absl::StatusCode::kResourceExhausted);
  map.Release(8 * kUnit, 4 * kUnit);
  EXPECT_EQ(map.largest_free(), 4 * kUnit);
  EXPECT_EQ(*map.Allocate(4 * kUnit, "where it was"), 8 * kUnit);
  map.Release(12 * kUnit, 4 * kUnit);
  EXPECT_EQ(*map.Allocate(1, "z"), 17 * kUnit);  // none is spare any more: the smallest piece
  EXPECT_EQ(map.AllocateSpare(~uint64_t{0}, 0).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(map.AllocateSpare(1, ~uint64_t{0}).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(ArenaMapTest, RandomUseAgreesWithTheOracle) {
  std::mt19937_64 random(Seed());
  constexpr uint64_t kUnits = 300;
  ArenaMap map(kUnits * kUnit + 100, 100);
  struct Piece {
    uint64_t offset, bytes;
  };
  std::vector<Piece> pieces;
  std::vector<bool> taken(kUnits, false);
  uint64_t used = 0, peak = 0, high_water = 0, spare_bytes = 0;
  std::set<uint64_t> spares;  // their offsets
  int refused = 0;
  for (int step = 0; step < 40000; ++step) {
    if (!pieces.empty() && random() % 100 < 45) {
      std::swap(pieces[random() % pieces.size()], pieces.back());
      const Piece p = pieces.back();
      pieces.pop_back();
      map.Release(p.offset, p.bytes);
      const uint64_t units = std::max<uint64_t>(1, (p.bytes + kUnit - 1) / kUnit);
      for (uint64_t i = 0; i < units; ++i) taken[p.offset / kUnit + i] = false;
      used -= units * kUnit;
      if (spares.erase(p.offset) > 0) spare_bytes -= units * kUnit;
    } else {
      const uint64_t most = random() % 10 == 0 ? 80 : 12;
      const uint64_t bytes = random() % (most * kUnit);
      const uint64_t units = std::max<uint64_t>(1, (bytes + kUnit - 1) / kUnit);
      uint64_t run = 0, longest = 0;
      for (const bool t : taken) {
        run = t ? 0 : run + 1;
        longest = std::max(longest, run);
      }
      ASSERT_EQ(map.largest_free(), longest * kUnit);
      const bool spare = random() % 4 == 0;
      const uint64_t leave_free = random() % 60 * kUnit;
      const auto got = spare ? map.AllocateSpare(bytes, leave_free) : map.Allocate(bytes, "piece");
      if (spare) {  // free units that end early enough, and enough others
        const uint64_t top = kUnits - std::min(kUnits, leave_free / kUnit);
        uint64_t free_run = 0, most = 0;
        for (uint64_t i = 0; i < top; ++i) {
          free_run = taken[i] ? 0 : free_run + 1;
          most = std::max(most, free_run);
        }
        ASSERT_EQ(got.ok(), units <= most && used / kUnit + units <= top) << got.status();
      } else {
        ASSERT_EQ(got.ok(), units <= longest) << got.status();
      }
      if (!got.ok()) {
        ++refused;
        continue;
      }
      if (spare) {
        ASSERT_LE(used + units * kUnit + leave_free, kUnits * kUnit);
        ASSERT_LE(*got + units * kUnit + leave_free, kUnits * kUnit);
        spares.insert(*got);
        spare_bytes += units * kUnit;
      } else if (!spares.empty() && *got > *spares.begin()) {
        // There was no room before them.
        uint64_t free_run = 0;
        for (uint64_t i = 0; i < *spares.begin() / kUnit; ++i) {
          free_run = taken[i] ? 0 : free_run + 1;
          ASSERT_LT(free_run, units);
        }
      }
      ASSERT_EQ(*got % kUnit, 0u);
      ASSERT_LE(*got / kUnit + units, kUnits);
      for (uint64_t i = 0; i < units; ++i) {
        ASSERT_FALSE(taken[*got / kUnit + i]) << "handed out twice";
        taken[*got / kUnit + i] = true;
      }
      pieces.push_back({*got, bytes});
      used += units * kUnit;
      peak = std::max(peak, used);
      high_water = std::max(high_water, *got + units * kUnit);
    }
    ASSERT_EQ(map.used(), used);
    ASSERT_EQ(map.spare(), spare_bytes);
    ASSERT_EQ(map.peak(), peak);
    ASSERT_EQ(map.high_water(), high_water);
  }
  EXPECT_GT(refused, 10);
}

}  // namespace
}  // namespace quarry::cuda

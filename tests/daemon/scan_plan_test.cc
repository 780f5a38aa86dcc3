// Every token of every row is planned exactly once, in memory that holds that token.
#include "daemon/scan_plan.h"

#include <algorithm>
#include <map>
#include <vector>

#include "daemon/run_registry.h"
#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kBlocks = 40;
constexpr uint32_t kTaskTokens = 1024;
constexpr RunGridOptions kGrid{.first_run_token = 128, .run_tokens = 1024};

// Tables as contexts make them: prefixes shared up to a fork, runs attached up to anywhere, the
// run that a fork cuts searched under a bound.
class TableMaker {
 public:
  explicit TableMaker(uint64_t seed) : random_(seed) {
    BlockStoreOptions options;
    options.arena.capacity_bytes = 64 << 20;
    options.arena.extent_bytes = 1 << 20;
    options.arena.huge_pages = ArenaOptions::HugePages::kNever;
    options.arena.prefault = false;
    store_ = *BlockStore::Create(options);
    root_.blocks = NewBlocks(kBlocks);
    AttachRuns(&root_, 0);
  }

  uint32_t Random(uint32_t below) { return static_cast<uint32_t>(random_() % below); }

  BlockTable Fork(const BlockTable& parent) {
    return ForkAt(parent, Random(kBlocks * kBlockTokens));
  }
  BlockTable ForkAt(const BlockTable& parent, uint32_t at) {
    const uint32_t shared = at / kBlockTokens;
    BlockTable fork;
    fork.blocks.assign(parent.blocks.begin(), parent.blocks.begin() + shared);
    for (auto& block : NewBlocks(kBlocks - shared)) fork.blocks.push_back(std::move(block));
    for (const RunUse& use : parent.runs) {
      const TokenRange below = Intersect(use.tokens, {0, at});
      if (!below.empty()) fork.runs.push_back({use.run, below});
    }
    if (Random(2) == 0) AttachRuns(&fork, static_cast<uint32_t>(fork.runs.size()));
    return fork;
  }
  const BlockTable& root() const { return root_; }
  // The same blocks without runs of their own, some of them placed from elsewhere, where they may
  // be in a run.
  BlockTable WithPlaced(BlockTable table) {
    table.runs.clear();
    RopeSpec rope;
    rope.inv_freq = {1.0f};
    rope.rotary_dim = 2;
    for (uint32_t block = Random(8); block < kBlocks;) {
      const uint32_t end = std::min(kBlocks, block + 1 + Random(8));
      const int32_t distance = kBlockTokens * (static_cast<int32_t>(Random(3)) - 1);
      const auto turn = std::make_shared<const Rotation>(rope, distance);
      table.placed.push_back({{block * kBlockTokens, end * kBlockTokens}, turn});
      const uint32_t lo = block * kBlockTokens + kGrid.first_run_token;
      const TokenRange here{lo, lo + kGrid.run_tokens};
      if (distance <= static_cast<int32_t>(lo) && here.hi <= end * kBlockTokens && Random(2) == 0) {
        table.runs.push_back({RunOf(table, here, distance), here, distance == 0 ? nullptr : turn});
      }
      block = end + Random(4);
    }
    return table;
  }

 private:
  std::vector<std::shared_ptr<HeldBlock>> NewBlocks(uint32_t count) {
    std::vector<std::shared_ptr<HeldBlock>> blocks;
    EXPECT_OK(store_->Reserve("t", kBlockBytes, count));
    for (uint32_t i = 0; i < count; ++i) {
      blocks.push_back(
          std::make_shared<HeldBlock>(*store_, *store_->Begin("t", kBlockBytes), BlockOrigin{}));
    }
    return blocks;
  }
  // Own runs for the grid's places from `first` on, up to a random one.
  void AttachRuns(BlockTable* table, uint32_t first) {
    const uint32_t places = (kBlocks * kBlockTokens - kGrid.first_run_token) / kGrid.run_tokens;
    for (uint32_t i = first; i < places && Random(8) != 0; ++i) {
      const TokenRange tokens = kGrid.RunTokens(i);
      table->runs.push_back({RunOf(*table, tokens, 0), tokens});
    }
  }
  // Of the table's blocks of these tokens, which come from `distance` before.
  static std::shared_ptr<const Run> RunOf(const BlockTable& table, TokenRange here,
                                          int32_t distance) {
    const auto begin = table.blocks.begin() + here.lo / kBlockTokens;
    const auto end = table.blocks.begin() + (here.hi - 1) / kBlockTokens + 1;
    return Run::Make(TokenRange{here.lo - distance, here.hi - distance},
                     std::vector<std::shared_ptr<HeldBlock>>(begin, end),
                     std::make_shared<RunIndexes>(KvShape{}));
  }

  static constexpr uint64_t kBlockBytes = 4096;
  std::mt19937_64 random_;
  std::unique_ptr<BlockStore> store_;
  BlockTable root_;
};

void ExpectEachTokenOnce(std::span<const ScanMember> members, std::span<const ScanUnit> units) {
  std::vector<std::vector<TokenRange>> seen(members.size());
  for (const ScanUnit& unit : units) {
    ASSERT_EQ(unit.members.size(), unit.ranges.size());
    ASSERT_FALSE(unit.members.empty());
    ASSERT_TRUE(std::is_sorted(unit.members.begin(), unit.members.end()));
    if (unit.run == nullptr) {
      EXPECT_LE(unit.tokens.size(), kTaskTokens);
    }
    for (size_t i = 0; i < unit.members.size(); ++i) {
      const ScanMember& member = members[unit.members[i]];
      const TokenRange range = unit.ranges[i];
      ASSERT_FALSE(range.empty());
      ASSERT_EQ(Intersect(range, unit.tokens), range);
      seen[unit.members[i]].push_back(range);
      for (uint32_t b = range.lo / kBlockTokens; b <= (range.hi - 1) / kBlockTokens; ++b) {
        const auto& scanned = unit.blocks[b - unit.first_block];
        if (unit.run == nullptr) {
          ASSERT_EQ(scanned, member.table->blocks[b]) << "block " << b;
          ASSERT_EQ(DistanceOf(unit.turn),
                    DistanceOf(member.table->TurnAt(std::max(range.lo, b * kBlockTokens))));
        } else {
          // A run's own block: the member's, or, where a fork cut it, the one it was copied from.
          const bool used = std::any_of(
              member.table->runs.begin(), member.table->runs.end(), [&](const RunUse& use) {
                return use.run.get() == unit.run && Intersect(use.tokens, range) == range &&
                       use.turn.get() == unit.turn;
              });
          ASSERT_TRUE(used);
          ASSERT_EQ(Intersect(unit.run_tokens, range), range);
          ASSERT_EQ(unit.run_tokens.lo - unit.run->tokens().lo,
                    static_cast<uint32_t>(DistanceOf(unit.turn)));
          ASSERT_EQ(scanned, unit.run->blocks()[b - unit.run_tokens.lo / kBlockTokens]);
        }
      }
    }
  }
  for (size_t m = 0; m < members.size(); ++m) {
    std::sort(seen[m].begin(), seen[m].end(),
              [](TokenRange a, TokenRange b) { return a.lo < b.lo; });
    uint32_t next = members[m].range.lo;
    for (const TokenRange range : seen[m]) {
      ASSERT_EQ(range.lo, next) << "member " << m;
      next = range.hi;
    }
    ASSERT_EQ(next, std::max(members[m].range.lo, members[m].range.hi)) << "member " << m;
  }
}

TEST(ScanPlanTest, EveryTokenIsPlannedExactlyOnceAcrossRunsTailsAndForks) {
  for (uint64_t round = 0; round < 200; ++round) {
    SCOPED_TRACE(round);
    TableMaker maker(Seed() + round);
    std::vector<BlockTable> tables = {maker.root()};
    while (tables.size() < 6) tables.push_back(maker.Fork(tables[maker.Random(tables.size())]));
    for (uint32_t i = 0; i < 4 * (round % 2); ++i) {
      tables.push_back(maker.WithPlaced(tables[maker.Random(6)]));
    }
    std::vector<ScanMember> members;
    for (uint32_t i = 0; i < 12; ++i) {
      const uint32_t a = maker.Random(kBlocks * kBlockTokens + 1);
      const uint32_t b = maker.Random(kBlocks * kBlockTokens + 1);
      members.push_back({&tables[maker.Random(tables.size())], {std::min(a, b), std::max(a, b)}});
    }
    for (const ScanKind kind : {ScanKind::kExact, ScanKind::kIndexed}) {
      ExpectEachTokenOnce(members, PlanScan(members, kind, kTaskTokens));
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(ScanPlanTest, RowsThatShareBlocksAreScannedInOnePass) {
  TableMaker maker(Seed());
  constexpr uint32_t kShared = 10;
  const BlockTable fork = maker.ForkAt(maker.root(), kShared * kBlockTokens);
  const TokenRange all{0, kBlocks * kBlockTokens};
  const std::vector<ScanMember> members = {{&maker.root(), all}, {&fork, all}};
  uint64_t scanned = 0;
  for (const ScanUnit& unit : PlanScan(members, ScanKind::kExact, kTaskTokens)) {
    scanned += unit.tokens.size();
    EXPECT_EQ(unit.members.size(), unit.tokens.lo < kShared * kBlockTokens ? 2u : 1u);
  }
  EXPECT_EQ(scanned, (kShared + 2 * (kBlocks - kShared)) * kBlockTokens);
}

TEST(ScanPlanTest, AShortRangeIsCutForSeveralThreads) {
  TableMaker maker(Seed());
  const auto units = [&](uint32_t lo, uint32_t hi, uint32_t task_tokens) {
    const std::vector<ScanMember> members = {{&maker.root(), {lo, hi}}};
    return PlanScan(members, ScanKind::kExact, task_tokens).size();
  };
  EXPECT_EQ(units(0, kBlockTokens, 4096), 1u);
  EXPECT_EQ(units(100, kBlockTokens, 4096), 1u);
  EXPECT_EQ(units(0, 3 * kBlockTokens, 4096), 3u);
  EXPECT_EQ(units(100, 1408, 4096), 6u);
  EXPECT_EQ(units(0, 9 * kBlockTokens, 4096), 5u);
  EXPECT_EQ(units(0, 16 * kBlockTokens, 4096), 8u);
  EXPECT_EQ(units(0, 16 * kBlockTokens, 256), 16u);
  EXPECT_EQ(UnitTokens(131072, 4096), 4096u);
  EXPECT_EQ(UnitTokens(~0u, 4096), 4096u);
}

TEST(ScanPlanTest, AnEmptyRangePlansNothing) {
  TableMaker maker(Seed());
  const std::vector<ScanMember> members = {{&maker.root(), {7, 7}}};
  EXPECT_TRUE(PlanScan(members, ScanKind::kExact, kTaskTokens).empty());
  EXPECT_TRUE(PlanScan(members, ScanKind::kIndexed, kTaskTokens).empty());
}

TEST(RestBesideTest, IsReadIfItIsAtMostAnEighthOfTheRange) {
  const std::array<TokenRange, 2> rest = RestBeside({100, 900}, 900);
  EXPECT_EQ(rest[0], (TokenRange{0, 100}));
  EXPECT_TRUE(rest[1].empty());
  EXPECT_EQ(RestBeside({40, 840}, 900)[1], (TokenRange{840, 900}));
  EXPECT_TRUE(RestBeside({41, 840}, 900)[0].empty());
  EXPECT_TRUE(RestBeside({41, 840}, 900)[1].empty());
  EXPECT_TRUE(RestBeside({100, 900}, 0)[1].empty());
}

}  // namespace
}  // namespace quarry

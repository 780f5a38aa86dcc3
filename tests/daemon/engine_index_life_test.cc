// What becomes of indexes when blocks break, memory is full, and contexts close while they are
// made.
#include <sys/stat.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr KvShape kShape = {
    .layers = 3, .heads = 4, .kv_heads = 2, .head_dim = 64, .dtype = DType::kBf16};
constexpr uint32_t kRunTokens = 2048, kFirst = 128, kRuns = 2;
constexpr uint32_t kTokens = kFirst + kRuns * kRunTokens + 600;  // the last run is published
constexpr uint64_t kHeads = uint64_t{kRuns} * kShape.layers * kShape.kv_heads;
constexpr Budget kWithinError = {.kind = Budget::Kind::kError, .error = 0.05f};

class EngineIndexLifeTest : public EngineTest {
 protected:
  ContextId Open(uint32_t first_id, uint32_t more_tokens = 200) {
    const auto opened = engine_->Open(
        session_, OpenFor(SmallModel(kShape), Tokens(kTokens, first_id), kTokens + more_tokens));
    EXPECT_OK(opened.status());
    if (!opened.ok()) return {};
    EXPECT_OK(
        AppendAll(*engine_, session_, opened->context, data_, {opened->reused_tokens, kTokens}));
    return opened->context;
  }
  // Starts with memory for the indexes of one context and a third of another's; the first has them.
  ContextId StartWithRoomForOne() {
    EngineOptions options = ClusterOptions(kRunTokens, kFirst);
    Start(options);
    Open(1000);
    WaitForBuilt(kHeads);
    options.index.max_bytes = max_bytes_ = engine_->Stats().index.bytes * 4 / 3;
    Start(options);
    const ContextId first = Open(1000);
    WaitForBuilt(kHeads);
    return first;
  }
  std::unique_ptr<OwnedRow> Ask(ContextId context, const Budget& budget) {
    auto row = AttendOne(*engine_, session_, kShape, context, 0, {kFirst, kFirst + kRunTokens},
                         SteadySeed() + 9, budget);
    EXPECT_OK(row->answer.status);
    return row;
  }
  // The memory of a leased block, mapped writable as the engine has it.
  std::byte* MemoryOf(const BlockLease& lease) {
    const auto extent = engine_->Extent(session_, lease.extent);
    EXPECT_OK(extent.status());
    struct stat file {};
    fstat(extent->fd, &file);
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      unsigned long lo, hi, offset, inode;
      char access[8];
      if (std::sscanf(line.c_str(), "%lx-%lx %7s %lx %*s %lu", &lo, &hi, access, &offset, &inode) !=
          5)
        continue;
      if (inode == file.st_ino && access[1] == 'w') {
        return reinterpret_cast<std::byte*>(lo - offset + lease.offset);
      }
    }
    return nullptr;
  }

  const KvData data_{kShape, kTokens, SteadySeed()};
  uint64_t max_bytes_ = 0;  // of indexes
};

TEST_F(EngineIndexLifeTest, ABrokenBlocksIndexesAreNotThoseOfWhoComputesItAgain) {
  constexpr uint32_t kBroken = 3;  // block
  Start(ClusterOptions(kRunTokens, kFirst));
  const ContextId first = Open(1000);
  WaitForBuilt(kHeads);
  const ContextId second = Open(1000);
  const auto lease = engine_->LeaseContextBlock(session_, first, kBroken);
  ASSERT_OK(lease.status());
  std::byte* const memory = MemoryOf(*lease);
  ASSERT_NE(memory, nullptr);
  for (uint32_t h = 0; h < kShape.kv_heads; ++h) {
    std::byte* const v = memory + kShape.strip_offset(0, KvPart::kValue, h);
    for (uint32_t i = 0; i < kBlockTokens * kShape.head_dim; ++i) {
      StoreFromFloat(v, i, kShape.dtype, 100.0f);
    }
  }
  ASSERT_OK(engine_->ReleaseLease(session_, lease->lease));
  std::vector<std::byte> k(kBlockTokens * kShape.kv_heads * kShape.vector_bytes()), v(k.size());
  EXPECT_TRUE(absl::IsDataLoss(engine_->Read(
      session_, second, 0, {kBroken * kBlockTokens, (kBroken + 1) * kBlockTokens}, k, v)));
  EXPECT_OK(engine_->Close(session_, second));
  // The first one goes on with what it has, this one finds nothing of it.
  const ContextId again = Open(1000);
  WaitFor([](const EngineStats& s) { return s.runs_live == kRuns && s.index.queued_runs == 0; });
  EXPECT_LT(OutputError(data_, *Ask(again, {}), 10), 0.01);
  EXPECT_LT(OutputError(data_, *Ask(again, kWithinError), 10), 0.5);
  EXPECT_LT(OutputError(data_, *Ask(again, {Budget::Kind::kFixedK, kRunTokens / 2}), 10), 0.9);
}

TEST_F(EngineIndexLifeTest, RoomOfAClosedContextThatIsBeingIndexedIsWaitedFor) {
  EngineOptions options = ClusterOptions(kRunTokens, kFirst);
  constexpr uint64_t kBlocks = (kTokens + kBlockTokens - 1) / kBlockTokens;
  options.arena.extent_bytes = 1 << 20;
  options.arena.capacity_bytes = kBlocks * 3 / 2 * kShape.block_bytes();
  Start(options);
  for (uint32_t i = 1; i <= 4; ++i) {
    const uint64_t built = engine_->Stats().index.built;
    const ContextId context = Open(1000000 * i, 0);
    ASSERT_OK(engine_->Seal(session_, context).status());
    WaitFor([&](const EngineStats& s) { return s.index.built > built; });
    EXPECT_OK(engine_->Close(session_, context));
    const auto next = engine_->Open(
        session_, OpenFor(SmallModel(kShape), Tokens(kTokens, 1000000 * i + 500000), kTokens));
    ASSERT_OK(next.status());
    EXPECT_OK(engine_->Close(session_, next->context));
  }
}

TEST_F(EngineIndexLifeTest, WhereThereWasNoRoomForIndexesTheyAreMadeWhenThereIs) {
  const ContextId first = StartWithRoomForOne();
  const ContextId second = Open(1000000, 1024);
  WaitFor([](const EngineStats& s) { return s.index.failed > 0 && s.index.queued_runs == 0; });
  const EngineStats full = engine_->Stats();
  EXPECT_EQ(full.index.indexed_runs, kRuns);  // the first one's
  EXPECT_LT(full.index.built, 2 * kHeads);
  EXPECT_LE(full.index.bytes, max_bytes_);
  // Nothing is built in vain while it is full.
  const KvData more(kShape, kTokens + 1024, SteadySeed() + 5);
  ASSERT_OK(engine_->DeclareTokens(session_, second, Tokens(1024, 2000000)));
  ASSERT_OK(AppendAll(*engine_, session_, second, more, {kTokens, kTokens + 512}));
  const ContextId third = Open(1000);
  ASSERT_OK(engine_->Seal(session_, third).status());  // and the background has come by
  EXPECT_EQ(engine_->Stats().index.failed, full.index.failed);
  // Its indexes are dropped for what is in use.
  EXPECT_OK(engine_->Close(session_, first));
  EXPECT_OK(engine_->Close(session_, third));
  WaitFor([](const EngineStats& s) { return s.runs_live == kRuns; });
  ASSERT_OK(AppendAll(*engine_, session_, second, more, {kTokens + 512, kTokens + 1024}));
  WaitFor([](const EngineStats& s) {
    return s.index.indexed_runs == kRuns && s.index.queued_runs == 0;
  });
  EXPECT_EQ(engine_->Stats().index.built, 2 * kHeads);
}

TEST_F(EngineIndexLifeTest, ASealedContextIsIndexedWhenThereIsRoom) {
  const ContextId first = StartWithRoomForOne();
  for (const uint32_t first_id : {1000000, 2000000}) {
    const ContextId sealed = Open(first_id);
    ASSERT_OK(engine_->Seal(session_, sealed).status());
    if (first_id == 2000000) EXPECT_OK(engine_->Close(session_, sealed));  // wants none any more
  }
  WaitFor([](const EngineStats& s) { return s.index.failed > 0 && s.index.queued_runs == 0; });
  EXPECT_OK(engine_->Close(session_, first));
  WaitFor([](const EngineStats& s) {
    return s.runs_live == kRuns && s.index.indexed_runs == kRuns && s.index.queued_runs == 0;
  });
}

TEST_F(EngineIndexLifeTest, WhatIsOpenedAgainWhileItsIndexingIsQueuedIsIndexed) {
  Start(ClusterOptions(kRunTokens, kFirst));
  Open(5000000);  // is indexed first
  const ContextId context = Open(1000);
  WaitForRuns(2 * kRuns);
  EXPECT_OK(engine_->Close(session_, context));
  Open(1000);
  WaitForBuilt(2 * kHeads);
}

}  // namespace
}  // namespace quarry

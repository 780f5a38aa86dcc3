// Contexts that are larger than RAM: their blocks are used on the disk, by the pages that attention
// reads.
#include <stdlib.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include "tests/daemon/disk_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kRunTokens = 2048, kFirst = 128, kTokens = kFirst + 5 * kRunTokens + 600;
constexpr TokenRange kRange = {100, kTokens - 300};
constexpr Budget kWithinError = {.kind = Budget::Kind::kError, .error = 0.05f};

KvShape PagedShape() { return {.layers = 2, .heads = 4, .kv_heads = 2, .head_dim = 64}; }
constexpr uint64_t kTokenBytes = 2 * 2 * 2 * 64 * 2;  // 256 KiB a block
constexpr uint64_t kArenaBytes = 4ull << 20, kPagesBytes = 1ull << 20;
static_assert(kTokens * kTokenBytes > 2 * (kArenaBytes + kPagesBytes));

class EnginePagedTest : public EngineDiskTest {
 protected:
  EngineOptions Options() const {
    EngineOptions options = DiskOptions(kRunTokens, kFirst);
    options.disk.log.key.environment = key_;
    return options;
  }
  // Ends the engine before.
  void StartLarge() {
    engine_ = nullptr;
    Start(Options());
  }
  void StartSmall(const std::function<void(EngineOptions&)>& change = {}) {
    engine_ = nullptr;
    EngineOptions options = Options();
    options.arena.capacity_bytes = kArenaBytes;
    options.disk.page_bytes = kPagesBytes;
    if (change) change(options);
    Start(options);
  }
  // A log with all of the context, and its indexes.
  void Fill() {
    StartLarge();
    const ContextId context = OpenAndFill(session_, Request(), data_).context;
    const uint32_t runs = (kTokens / kBlockTokens * kBlockTokens - kFirst) / kRunTokens;
    WaitFor([&](const EngineStats& s) { return s.index.saved_layers == 2 * runs; });
    for (Budget budget : {Budget{}, kWithinError}) {
      for (uint32_t l = 0; l < 2; ++l) in_ram_.push_back(Ask(context, l, kRange, budget)->o);
    }
    Flush();
  }
  void Flush() {
    const bool durable = testing::Eventually([&] {
      const auto flushed = engine_->Flush(session_, {.whole_tenant = true});
      return flushed.ok() && flushed->pending_blocks == 0 && flushed->refused_blocks == 0;
    });
    ASSERT_TRUE(durable);
  }
  OpenRequest Request(uint32_t tokens = kTokens) const {
    return OpenFor(SmallModel(PagedShape()), Tokens(tokens), tokens + 256);
  }
  std::unique_ptr<OwnedRow> Ask(ContextId context, uint32_t layer, TokenRange range = kRange,
                                Budget budget = {}) {
    return AttendOne(*engine_, session_, PagedShape(), context, layer, range, SteadySeed(), budget);
  }
  ContextId OpenPaged() {
    const OpenResult opened = OpenAndFill(session_, Request(), data_);
    EXPECT_EQ(opened.reused_tokens, (kTokens - 1) / kBlockTokens * kBlockTokens);
    return opened.context;
  }
  // A bit of the token's key in the disk's file, of layer 0 and KV head 0; wherever its copies are.
  void FlipKey(uint32_t token) {
    std::ifstream in(disk(), std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), {});
    const std::string key(data_.k(0, token), PagedShape().vector_bytes());
    std::fstream out(disk(), std::ios::binary | std::ios::in | std::ios::out);
    int flipped = 0;
    for (size_t at = bytes.find(key); at != std::string::npos; at = bytes.find(key, at + 1)) {
      out.seekp(static_cast<std::streamoff>(at + 5));
      out.put(static_cast<char>(bytes[at + 5] ^ 0x10));
      ++flipped;
    }
    ASSERT_GT(flipped, 0);
  }
  PageCacheStats Pages() const { return engine_->Stats().store.disk->pages; }

  const KvData data_{PagedShape(), kTokens, SteadySeed()};
  std::vector<std::vector<float>> in_ram_;  // answers: exact of both layers, within an error
  std::string key_;  // of an encrypted disk
};

TEST_F(EnginePagedTest, AnswersAreThoseOfOneInRam) {
  Fill();
  StartSmall();
  const ContextId context = OpenPaged();
  EXPECT_EQ(Pages().reads + Pages().once, 0u) << "opening reads nothing of runs";
  WaitFor([](const EngineStats& s) { return s.index.loaded_layers == 2 * 5; });
  EXPECT_EQ(engine_->Stats().index.built, 0u);
  for (uint32_t l = 0; l < 2; ++l) {
    const auto row = Ask(context, l, kRange, kWithinError);
    ASSERT_OK(row->answer.status);
    EXPECT_GT(row->answer.error_estimate, 0);
    EXPECT_EQ(row->o, in_ram_[2 + l]) << l;
  }
  EXPECT_GT(Pages().reads, 0u);
  EXPECT_EQ(Pages().once, 0u);
  for (uint32_t l = 0; l < 2; ++l) {
    const auto row = Ask(context, l);
    ASSERT_OK(row->answer.status);
    EXPECT_EQ(row->o, in_ram_[l]) << l;
  }
  EXPECT_GE(Pages().once * kPageBytes, (5 * kRunTokens - kBlockTokens) * kTokenBytes)
      << "an exact answer reads everything";
  EXPECT_LE(Pages().bytes, kPagesBytes);
  EXPECT_EQ(Pages().failures, 0u);
}

// Each sector is a message of its own there, whose tag is checked.
TEST_F(EnginePagedTest, AnEncryptedDiskIsReadInPiecesToo) {
  setenv("QUARRY_TEST_DISK_KEY", std::string(64, '7').c_str(), 1);
  key_ = "QUARRY_TEST_DISK_KEY";
  Fill();
  StartSmall();
  const ContextId context = OpenPaged();
  WaitFor([](const EngineStats& s) { return s.index.loaded_layers == 2 * 5; });
  for (uint32_t l = 0; l < 2; ++l) {
    EXPECT_EQ(Ask(context, l, kRange, kWithinError)->o, in_ram_[2 + l]) << l;
    EXPECT_EQ(Ask(context, l)->o, in_ram_[l]) << l;
  }
  EXPECT_GT(Pages().reads, 0u);
  EXPECT_GT(Pages().once, 0u);
}

TEST_F(EnginePagedTest, WhatIsAskedAgainIsInRam) {
  Fill();
  StartSmall();
  const ContextId context = OpenPaged();
  WaitFor([](const EngineStats& s) { return s.index.loaded_layers == 2 * 5; });
  // A small part of the context, as attention that returns to it.
  const TokenRange part = {512, 1024};
  ASSERT_OK(Ask(context, 0, part, kWithinError)->answer.status);
  const PageCacheStats first = Pages();
  EXPECT_GT(first.reads, 0u);
  EXPECT_LE(first.reads * kPageBytes, part.size() * kTokenBytes / 2);
  ASSERT_OK(Ask(context, 0, part, kWithinError)->answer.status);
  EXPECT_EQ(Pages().reads, first.reads);
  EXPECT_EQ(Pages().hits, first.hits + first.reads);
}

// As a conversation does: each turn finds what the last ones left on the disk, and needs RAM for
// its own tokens only.
TEST_F(EnginePagedTest, AContextGrowsBeyondRamTurnByTurn) {
  StartSmall([](EngineOptions& o) { o.index.choice.kind = IndexKind::kExact; });
  constexpr uint32_t kTurn = 1500;
  for (uint32_t tokens = kTurn; tokens < kTokens; tokens += kTurn) {
    const OpenResult opened = OpenAndFill(session_, Request(tokens), data_);
    ASSERT_GE(opened.reused_tokens + kTurn + kBlockTokens, tokens);
    const TokenRange all{0, tokens};
    const auto row = Ask(opened.context, 1, all);
    ASSERT_OK(row->answer.status);
    EXPECT_LT(WorstError(data_, *row), 5e-3) << tokens;
    ASSERT_OK(engine_->Seal(session_, opened.context).status());
    ASSERT_OK(engine_->Close(session_, opened.context));
    Flush();
  }
  EXPECT_GT(Pages().once, 0u);
}

// Whoever waits for the disk is not the one who serves contexts in RAM.
TEST_F(EnginePagedTest, NeitherTheCallerNorWhoHelpsReadsTheDisk) {
  Fill();
  StartSmall();
  const ContextId paged = OpenPaged();
  WaitFor([](const EngineStats& s) { return s.index.loaded_layers == 2 * 5; });
  const auto in_ram = engine_->Open(session_, OpenFor(SmallModel(PagedShape()), {}, 256));
  ASSERT_OK(in_ram.status());
  ASSERT_OK(AppendAll(*engine_, session_, in_ram->context, data_, {0, 256}));
  const auto fork = engine_->Fork(session_, {paged, 1000, 1300, {}});
  ASSERT_OK(fork.status());
  const auto answered_by = [&](ContextId context, TokenRange range) {
    OwnedRow row(PagedShape(), context, 0, range, SteadySeed());
    std::atomic<bool> done{false};
    std::thread::id thread;
    engine_->Attend(session_, {&row.row, 1}, {&row.answer, 1}, [&] {
      thread = std::this_thread::get_id();
      done = true;
    });
    while (!done) engine_->Work();
    EXPECT_OK(row.answer.status);
    return thread;
  };
  EXPECT_EQ(answered_by(in_ram->context, {0, 10}), std::this_thread::get_id());
  for (int i = 0; i < 20; ++i) {
    EXPECT_NE(answered_by(paged, {600, 610}), std::this_thread::get_id());
    EXPECT_NE(answered_by(paged, kRange), std::this_thread::get_id());
    EXPECT_NE(answered_by(*fork, {600, 610}), std::this_thread::get_id());
  }
}

TEST_F(EnginePagedTest, ReadsForksAndTopKSeeTheSameTokens) {
  Fill();
  StartSmall();
  const ContextId context = OpenPaged();
  const TokenRange range = {200, 900};
  std::vector<std::byte> k(range.size() * data_.token_bytes()), v(k.size());
  ASSERT_OK(engine_->Read(session_, context, 1, range, k, v));
  EXPECT_EQ(std::memcmp(k.data(), data_.k(1, range.lo), k.size()), 0);
  EXPECT_EQ(std::memcmp(v.data(), data_.v(1, range.lo), v.size()), 0);

  const auto fork = engine_->Fork(session_, {context, 1000, 1300, {}});
  ASSERT_OK(fork.status());
  ASSERT_OK(engine_->Read(session_, *fork, 1, range, k, v));
  EXPECT_EQ(std::memcmp(k.data(), data_.k(1, range.lo), k.size()), 0);
  const auto row = Ask(*fork, 0, {0, 1000});
  ASSERT_OK(row->answer.status);
  EXPECT_LT(WorstError(data_, *row), 5e-3);

  OwnedRow asked(PagedShape(), context, 0, kRange, SteadySeed());
  const TopKAnswer top = engine_->TopK(session_, asked.row, 8, true);
  ASSERT_OK(top.status);
  for (uint32_t h = 0; h < 4; ++h) {
    ASSERT_EQ(top.heads[h].size(), 8u);
    for (size_t i = 0; i < 8; ++i) {
      const size_t bytes = PagedShape().vector_bytes();
      EXPECT_EQ(std::memcmp(top.k[h].data() + i * bytes,
                            data_.k(0, top.heads[h][i].token) + h / 2 * bytes, bytes),
                0);
    }
  }
  EXPECT_TRUE(
      absl::IsFailedPrecondition(engine_->LeaseContextBlock(session_, context, 3).status()));
}

TEST_F(EnginePagedTest, RunsWithoutIndexesOnTheDiskAreIndexed) {
  Fill();
  StartSmall([](EngineOptions& o) { o.index.choice.kind = IndexKind::kGraph; });
  const ContextId context = OpenPaged();
  WaitFor([](const EngineStats& s) { return s.index.built == 2 * 2 * 5; });
  const auto row = Ask(context, 0, kRange, kWithinError);
  ASSERT_OK(row->answer.status);
  EXPECT_LT(OutputError(data_, *row, 0.1), 0.1);
}

TEST_F(EnginePagedTest, OnlyWhatDoesNotFitIsLeftOnTheDisk) {
  Fill();
  StartSmall();
  const auto small = engine_->Open(session_, Request(2000));
  ASSERT_OK(small.status());
  EXPECT_EQ(small->reused_tokens, 7 * kBlockTokens);
  ASSERT_OK(Ask(small->context, 0, {0, 7 * kBlockTokens})->answer.status);
  EXPECT_EQ(Pages().reads, 0u);
  EXPECT_EQ(engine_->Stats().store.disk->promoted, 7u);
  // RAM has 16 blocks, of which these and their room for more are leased.
  const auto beside =
      engine_->Open(session_, OpenFor(SmallModel(PagedShape()), Tokens(3000), 3100));
  ASSERT_OK(beside.status());
  EXPECT_EQ(beside->reused_tokens, 11 * kBlockTokens);
  const auto row = Ask(beside->context, 0, {0, 11 * kBlockTokens});
  ASSERT_OK(row->answer.status);
  EXPECT_LT(WorstError(data_, *row), 5e-3);
}

TEST_F(EnginePagedTest, WithoutRoomForPagesAContextHasToFit) {
  Fill();
  StartSmall([](EngineOptions& o) { o.disk.page_bytes = 0; });
  EXPECT_TRUE(absl::IsResourceExhausted(engine_->Open(session_, Request()).status()));
}

// A page that is not what was written gives no answer, and what is computed anew does.
TEST_F(EnginePagedTest, ABrokenPageIsNoAnswerAndItsBlockIsComputedAgain) {
  Fill();
  StartSmall();
  const ContextId context = OpenPaged();
  constexpr uint32_t kBroken = 5000;
  FlipKey(kBroken);
  ASSERT_OK(Ask(context, 1)->answer.status);  // another layer's pages
  const auto row = Ask(context, 0);
  EXPECT_TRUE(absl::IsDataLoss(row->answer.status)) << row->answer.status;
  ASSERT_OK(Ask(context, 0, {0, kBroken / kBlockTokens * kBlockTokens})->answer.status);
  const EngineStats stats = engine_->Stats();
  EXPECT_EQ(stats.attend_failures, 1u);
  EXPECT_EQ(stats.store.disk->log.broken_blocks, 1u);
  EXPECT_GE(stats.store.disk->pages.failures, 1u);  // other threads find the block gone
  ASSERT_OK(engine_->Close(session_, context));
  // Up to there it is reused; the rest is computed again, as far as it fits into RAM.
  const uint32_t again = kBroken / kBlockTokens * kBlockTokens;
  const OpenResult opened = OpenAndFill(session_, Request(again + 1000), data_);
  EXPECT_EQ(opened.reused_tokens, again);
  const auto mended = Ask(opened.context, 0, {0, again + 1000});
  ASSERT_OK(mended->answer.status);
  EXPECT_LT(WorstError(data_, *mended), 5e-3);
}

TEST_F(EnginePagedTest, APurgeEndsAnswers) {
  Fill();
  StartSmall();
  const ContextId context = OpenPaged();
  ASSERT_OK(Ask(context, 0)->answer.status);
  ASSERT_OK(engine_->Purge(session_, {.whole_tenant = true}).status());
  const auto row = Ask(context, 1);
  EXPECT_TRUE(absl::IsNotFound(row->answer.status)) << row->answer.status;
  EXPECT_EQ(Reused(session_, Request(1000)), 0u);
}

}  // namespace
}  // namespace quarry

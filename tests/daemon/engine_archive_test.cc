// Indexes of runs outlive the daemon where there is a disk.
#include <filesystem>
#include <fstream>
#include <functional>

#include "proto/identity.h"
#include "tests/daemon/disk_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kRunTokens = 1024, kRuns = 2, kFirst = 128, kLayers = 2;
constexpr uint32_t kTokens = kFirst + kRuns * kRunTokens + 600;  // the last run is published
constexpr TokenRange kRange = {kFirst, kTokens - 512};
constexpr Budget kWithinError = {.kind = Budget::Kind::kError, .error = 0.05f};
constexpr uint64_t kIndexes = uint64_t{kLayers} * 2 * kRuns;  // of a layer and KV head each

KvShape ArchivedShape() { return {.layers = kLayers, .heads = 4, .kv_heads = 2, .head_dim = 64}; }

class EngineArchiveTest : public EngineDiskTest {
 protected:
  // Ends the engine before; there is one with its disk then.
  void Restart(const std::function<void(EngineOptions&)>& change = {}) {
    engine_ = nullptr;
    EngineOptions options = DiskOptions(kRunTokens, kFirst);
    if (change) change(options);
    Start(options);
  }
  OpenRequest Request() const {
    return OpenFor(SmallModel(ArchivedShape()), Tokens(kTokens), kTokens + 1024);
  }
  ContextId OpenFilled() { return OpenAndFill(session_, Request(), data_).context; }
  IndexStats Index() const { return engine_->Stats().index; }
  std::unique_ptr<OwnedRow> Ask(ContextId context, uint32_t layer) {
    auto row = AttendOne(*engine_, session_, ArchivedShape(), context, layer, kRange, SteadySeed(),
                         kWithinError);
    EXPECT_OK(row->answer.status);
    return row;
  }
  static bool Indexed(const OwnedRow& row) { return row.answer.error_estimate > 0; }

  const KvData data_{ArchivedShape(), kTokens, SteadySeed()};
};

TEST_F(EngineArchiveTest, ARestartFindsTheIndexesAndAnswersAsBefore) {
  Restart();
  const ContextId context = OpenFilled();
  WaitForBuilt(kIndexes);
  std::vector<std::vector<float>> before;
  for (uint32_t l = 0; l < kLayers; ++l) before.push_back(Ask(context, l)->o);
  const uint64_t bytes = Index().bytes;
  Restart();
  const ContextId again = OpenFilled();
  WaitFor([](const EngineStats& s) { return s.index.loaded_layers == kLayers * kRuns; });
  WaitForRuns(kRuns);
  EXPECT_EQ(Index().bytes, bytes) << "models are shared as before";
  for (uint32_t l = 0; l < kLayers; ++l) {
    const auto row = Ask(again, l);
    EXPECT_TRUE(Indexed(*row));
    EXPECT_EQ(row->o, before[l]) << l;
  }
  EXPECT_EQ(Index().built, 0u);
  Restart();
  EXPECT_EQ(Index().saved_layers, 0u) << "what came from the disk is written again";
}

// Without an end at which everything is written.
TEST_F(EngineArchiveTest, WhatHasSettledIsWrittenWhileTheDaemonRuns) {
  Restart();
  OpenFilled();
  WaitFor([](const EngineStats& s) { return s.index.saved_layers == kLayers * kRuns; });
  std::filesystem::copy(disk(), directory_ / "copy");
  engine_ = nullptr;
  std::filesystem::rename(directory_ / "copy", disk());
  Restart();
  OpenFilled();
  WaitFor([](const EngineStats& s) { return s.index.loaded_layers == kLayers * kRuns; });
}

TEST_F(EngineArchiveTest, WhatIsLearnedAgainIsWrittenAgain) {
  Restart();
  const ContextId context = OpenFilled();
  WaitFor([](const EngineStats& s) { return s.index.saved_layers == kLayers * kRuns; });
  const auto ask_until_learned = [&](uint32_t layer) {
    for (uint32_t i = 0; i < 16 * 32; ++i) Ask(context, layer);
  };
  ask_until_learned(0);
  WaitFor([](const EngineStats& s) {
    return s.index.relearned == kRuns && s.index.saved_layers == kLayers * kRuns + kRuns;
  });
  const std::vector<float> learned = Ask(context, 0)->o;
  Restart();
  const ContextId again = OpenFilled();
  WaitFor([](const EngineStats& s) { return s.index.loaded_layers == kLayers * kRuns; });
  EXPECT_EQ(Ask(again, 0)->o, learned);
}

TEST_F(EngineArchiveTest, WhatIsPurgedDoesNotComeBack) {
  using Purge = std::function<PurgeRequest(const LongestPrefix&, const BlockInfo&)>;
  const std::pair<const char*, Purge> kinds[] = {
      {"tenant", [](const auto&, const auto&) { return PurgeRequest{.whole_tenant = true}; }},
      {"namespace",
       [](const auto&, const BlockInfo& info) {
         return PurgeRequest{.name_space = info.name_space};
       }},
      {"blocks", [](const LongestPrefix& prefix, const auto&) {
         return PurgeRequest{.blocks = {prefix.blocks[2]}};
       }}};
  for (const auto& [name, purge] : kinds) {
    SCOPED_TRACE(name);
    std::filesystem::remove(disk());
    Restart();
    const ContextId context = OpenFilled();
    WaitFor([](const EngineStats& s) { return s.index.saved_layers == kLayers * kRuns; });
    const auto prefix = engine_->FindLongestPrefix(session_, Request());
    ASSERT_OK(prefix.status());
    const auto blocks = engine_->ListBlocks(session_, 1);
    ASSERT_OK(blocks.status());
    ASSERT_OK(engine_->Purge(session_, purge(*prefix, blocks->front())).status());
    EXPECT_OK(engine_->Close(session_, context));
    Restart();
    OpenFilled();
    WaitForBuilt(kIndexes);
    EXPECT_EQ(Index().loaded_layers, 0u);
    EXPECT_EQ(Index().failed_loads, 0u);
  }
}

TEST_F(EngineArchiveTest, APurgeTakesIndexesAlongThatADaemonWithoutAnyDoesNotUse) {
  Restart();
  OpenFilled();
  WaitForBuilt(kIndexes);
  Restart([](EngineOptions& o) { o.index.choice.kind = IndexKind::kExact; });
  const auto blocks = engine_->ListBlocks(session_, 1000);
  ASSERT_OK(blocks.status());
  const auto of_context = std::ranges::find_if(
      *blocks, [](const BlockInfo& info) { return !IsIndexNamespace(info.name_space); });
  ASSERT_NE(of_context, blocks->end());
  ASSERT_OK(engine_->Purge(session_, {.blocks = {of_context->id}}).status());
  Restart();
  OpenFilled();
  WaitForBuilt(kIndexes);
  EXPECT_EQ(Index().loaded_layers, 0u);
}

TEST_F(EngineArchiveTest, IndexesOfAnotherKindAreNotTakenForTheseAndNoOneElsesAre) {
  Restart();
  OpenFilled();
  WaitForBuilt(kIndexes);
  Restart([](EngineOptions& o) { o.index.choice.kind = IndexKind::kCodes; });
  OpenFilled();
  WaitForBuilt(kIndexes);
  EXPECT_EQ(Index().loaded_layers, 0u);
  Restart();
  session_ = NewSession("bob");
  OpenFilled();
  WaitForBuilt(kIndexes);
  EXPECT_EQ(Index().loaded_layers, 0u);
}

TEST_F(EngineArchiveTest, BrokenIndexesAreBuiltAnew) {
  Restart();
  OpenFilled();
  WaitForBuilt(kIndexes);
  engine_ = nullptr;
  {
    std::fstream file(disk(), std::ios::in | std::ios::out | std::ios::binary);
    std::string bytes(128 << 20, '\0');
    file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    uint64_t spoilt = 0;
    const std::string form = "QRYINDEXrun-layer";
    for (size_t at = bytes.find(form); at != std::string::npos; at = bytes.find(form, at + 1)) {
      file.seekp(static_cast<std::streamoff>(at + 100));
      file.write("spoilt", 6);
      ++spoilt;
    }
    ASSERT_EQ(spoilt, kLayers * kRuns);
  }
  Restart();
  const ContextId context = OpenFilled();
  WaitForBuilt(kIndexes);
  EXPECT_EQ(Index().loaded_layers, 0u);
  EXPECT_EQ(Index().failed_loads, kLayers * kRuns);
  EXPECT_TRUE(Indexed(*Ask(context, 0)));
}

TEST_F(EngineArchiveTest, IndexesThatThereIsNoRoomForWaitAsThoseThatAreBuiltDo) {
  Restart();
  OpenFilled();
  WaitForBuilt(kIndexes);
  const uint64_t bytes = Index().bytes;
  Restart([&](EngineOptions& o) { o.index.max_bytes = bytes / 2; });
  const ContextId context = OpenFilled();
  WaitFor(
      [](const EngineStats& s) { return s.index.waiting_layers > 0 && s.index.queued_runs == 0; });
  EXPECT_LE(Index().bytes, bytes / 2);
  EXPECT_GT(Index().loaded_layers, 0u);
  Ask(context, 0);  // is answered
}

}  // namespace
}  // namespace quarry

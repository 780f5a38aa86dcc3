// A daemon with a disk: what it had before it ended is there when it has started again.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "tests/support/daemon_process.h"
#include "tests/support/eventually.h"
#include "tests/support/kv_client.h"

namespace quarry {
namespace {

using testing::DaemonProcess;
using testing::KvData;

constexpr uint32_t kTokens = 4 * kBlockTokens + 40;

class DiskTierTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ =
        std::filesystem::temp_directory_path() / ("quarry-disk-tier-" + std::to_string(getpid()));
    std::filesystem::create_directories(directory_);
    Start();
  }
  void TearDown() override {
    client_ = nullptr;
    daemon_ = nullptr;
    std::filesystem::remove_all(directory_);
  }

  std::string disk() const { return directory_ / "kv.quarry"; }
  void Start() {
    client_ = nullptr;
    daemon_ = nullptr;
    testing::DaemonOptions options;
    options.config =
        "[disk]\npath = \"" + disk() + "\"\nbytes = \"256MiB\"\nsegment_bytes = \"4MiB\"\n";
    options.arguments = {"--arena-bytes", "64MiB"};
    auto daemon = DaemonProcess::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    auto client = testing::ConnectTo(daemon_->socket_path());
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
  }

  void Restart() {
    EXPECT_EQ(daemon_->Stop(), 0);
    Start();
  }

  // Computes the context, or what of it is not cached; says how many tokens were.
  uint32_t Compute(const KvData& data) {
    auto open = client_->Open(testing::OpenFor(spec_, data, kTokens));
    EXPECT_TRUE(open.ok()) << open.status();
    if (!open.ok()) return 0;
    EXPECT_TRUE(
        testing::AppendTokens(client_.get(), open->context, data, open->reused_tokens, kTokens)
            .ok());
    EXPECT_TRUE(client_->Seal(open->context).ok());
    for (uint32_t layer = 0; layer < spec_.shape.layers; ++layer) {
      std::vector<char> k(data.k[layer].size()), v(data.v[layer].size());
      const absl::Status read =
          client_->Read(open->context, layer, {0, kTokens}, std::as_writable_bytes(std::span(k)),
                        std::as_writable_bytes(std::span(v)));
      EXPECT_TRUE(read.ok()) << read;
      EXPECT_EQ(k, data.k[layer]) << "layer " << layer;
      EXPECT_EQ(v, data.v[layer]) << "layer " << layer;
    }
    EXPECT_TRUE(client_->Close(open->context).ok());
    return open->reused_tokens;
  }

  const ModelSpec spec_ = testing::SmallSpec();
  std::filesystem::path directory_;
  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<Client> client_;
};

TEST_F(DiskTierTest, ARestartIsWarm) {
  const KvData data(spec_.shape, kTokens, 1);
  EXPECT_EQ(Compute(data), 0u);
  const std::string value(100000, 'v');
  const absl::Status put = client_->Put("engine", "key", std::as_bytes(std::span(value)));
  ASSERT_TRUE(put.ok()) << put;
  Restart();
  EXPECT_EQ(Compute(data), 4 * kBlockTokens);
  const auto got = client_->Get("engine", "key");
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(*got, value);
}

// Other blocks, more than the arena has room for, push the context out of it, but not off the disk.
TEST_F(DiskTierTest, WhatTheArenaEvictsIsReadFromTheDisk) {
  const KvData data(spec_.shape, kTokens, 3);
  EXPECT_EQ(Compute(data), 0u);
  const std::string large(7 << 20, 'x');
  for (int i = 0; i < 12; ++i) {
    const absl::Status put =
        client_->Put("engine", std::to_string(i), std::as_bytes(std::span(large)));
    ASSERT_TRUE(put.ok()) << put;
    EXPECT_EQ(Compute(data), 4 * kBlockTokens) << i;  // so it stays the most used
  }
  const auto statistics = client_->Statistics();
  ASSERT_TRUE(statistics.ok()) << statistics.status();
  EXPECT_GT(statistics->at("quarry_store_evictions_total"), 0);
  for (int i = 0; i < 12; ++i) {
    const auto got = client_->Get("engine", std::to_string(i));
    ASSERT_TRUE(got.ok()) << i << ": " << got.status();
    EXPECT_EQ(*got, large);
  }
  EXPECT_GT(client_->Statistics()->at("quarry_disk_promoted_total"), 0);
}

TEST_F(DiskTierTest, WhatLoadingTakesIsKnownBeforeAndMayBeLimited) {
  const KvData data(spec_.shape, kTokens, 5);
  Compute(data);
  Restart();
  OpenRequest request = testing::OpenFor(spec_, data, kTokens);
  const auto before = client_->LongestPrefix(request);
  ASSERT_TRUE(before.ok()) << before.status();
  EXPECT_EQ(before->tokens, 4 * kBlockTokens);
  EXPECT_EQ(before->ram_tokens, 0u) << "nothing is loaded by asking";
  EXPECT_EQ(before->load_bytes, 4 * spec_.shape.block_bytes());
  EXPECT_GT(before->expected_load_ms, 0);
  EXPECT_EQ(client_->Statistics()->at("quarry_disk_promoted_total"), 0);

  request.max_load_ms = 0;
  auto open = client_->Open(request);
  ASSERT_TRUE(open.ok()) << open.status();
  EXPECT_EQ(open->reused_tokens, 0u);
  EXPECT_EQ(open->unloaded_tokens, 4 * kBlockTokens);
  EXPECT_GT(open->expected_load_ms, 0);
  ASSERT_TRUE(client_->Close(open->context).ok());

  // As much as is worth it: two blocks, with some to spare.
  request.max_load_ms = before->expected_load_ms * 0.6;
  open = client_->Open(request);
  ASSERT_TRUE(open.ok()) << open.status();
  EXPECT_EQ(open->reused_tokens, 2 * kBlockTokens);
  EXPECT_EQ(open->unloaded_tokens, 2 * kBlockTokens);
  ASSERT_TRUE(client_->Close(open->context).ok());

  // What is in RAM by now costs nothing.
  request.max_load_ms = 0;
  open = client_->Open(request);
  ASSERT_TRUE(open.ok()) << open.status();
  EXPECT_EQ(open->reused_tokens, 2 * kBlockTokens);
  ASSERT_TRUE(client_->Close(open->context).ok());
}

TEST_F(DiskTierTest, WhatIsPrefetchedIsInRamWhenItIsOpened) {
  const KvData data(spec_.shape, kTokens, 6);
  Compute(data);
  Restart();
  OpenRequest request = testing::OpenFor(spec_, data, kTokens);
  const auto asked = client_->Prefetch(request);
  ASSERT_TRUE(asked.ok()) << asked.status();
  EXPECT_EQ(*asked, 4u);
  ASSERT_TRUE(testing::Eventually([&] {
    const auto prefix = client_->LongestPrefix(request);
    return prefix.ok() && prefix->ram_tokens == 4 * kBlockTokens;
  }));
  EXPECT_EQ(*client_->Prefetch(request), 0u) << "there is nothing left to load";
  request.max_load_ms = 0;
  const auto open = client_->Open(request);
  ASSERT_TRUE(open.ok()) << open.status();
  EXPECT_EQ(open->reused_tokens, 4 * kBlockTokens);
}

TEST_F(DiskTierTest, APurgeOutlivesARestart) {
  const KvData data(spec_.shape, kTokens, 2);
  Compute(data);
  ASSERT_TRUE(client_->Purge({.whole_tenant = true}).ok());
  Restart();
  EXPECT_EQ(Compute(data), 0u);
}

TEST_F(DiskTierTest, WhatWasFlushedOutlivesAKill) {
  const KvData data(spec_.shape, kTokens, 4);
  auto open = client_->Open(testing::OpenFor(spec_, data, kTokens));
  ASSERT_TRUE(open.ok()) << open.status();
  ASSERT_TRUE(testing::AppendTokens(client_.get(), open->context, data, 0, kTokens).ok());
  const auto context = client_->Flush({.context = open->context}, absl::Seconds(30));
  ASSERT_TRUE(context.ok()) << context.status();
  EXPECT_EQ(context->durable_blocks, 4u);
  EXPECT_EQ(context->tokens, 4 * kBlockTokens);
  const std::string value(100000, 'v');
  ASSERT_TRUE(client_->Put("engine", "key", std::as_bytes(std::span(value))).ok());
  const auto tenant = client_->Flush({.whole_tenant = true}, absl::Seconds(30));
  ASSERT_TRUE(tenant.ok()) << tenant.status();
  EXPECT_EQ(tenant->durable_blocks, 5u);
  daemon_->Kill();
  Start();
  EXPECT_EQ(Compute(data), 4 * kBlockTokens);
  EXPECT_EQ(*client_->Get("engine", "key"), value);
}

TEST_F(DiskTierTest, AFlushNamesOneThingAndWhatIsThere) {
  EXPECT_TRUE(absl::IsInvalidArgument(client_->Flush({}, absl::Seconds(1)).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      client_->Flush({.whole_tenant = true, .blocks = {BlockId{}}}, absl::Seconds(1)).status()));
  BlockId unknown;
  unknown.bytes[0] = 1;
  EXPECT_TRUE(absl::IsNotFound(client_->Flush({.blocks = {unknown}}, absl::Seconds(1)).status()));
  EXPECT_TRUE(
      absl::IsNotFound(client_->Flush({.context = ContextId{1}}, absl::Seconds(1)).status()));
  EXPECT_EQ(client_->Flush({.whole_tenant = true}, absl::Seconds(1))->durable_blocks, 0u);
}

TEST_F(DiskTierTest, AKilledDaemonStartsAgain) {
  for (uint32_t i = 0; i < 5; ++i) {
    const KvData data(spec_.shape, kTokens, 200 + i);
    Compute(data);
    daemon_->Kill();
    Start();
    Compute(data);
  }
}

TEST_F(DiskTierTest, AnotherThingsFileIsLeftAloneAndNamed) {
  daemon_->Stop();
  const std::string text(70 << 20, 'a');
  std::ofstream(disk(), std::ios::binary) << text;
  testing::DaemonOptions options;
  options.config =
      "[disk]\npath = \"" + disk() + "\"\nbytes = \"64MiB\"\nsegment_bytes = \"4MiB\"\n";
  options.start_deadline = absl::Seconds(10);
  const auto refused = DaemonProcess::Start(options);
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(std::string(refused.status().message()), ::testing::HasSubstr("not blank"));
  std::ifstream in(disk(), std::ios::binary);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}), text);
}

}  // namespace
}  // namespace quarry

// A block store with a clock of one's own, and what its tests do again and again.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "storage/block_store.h"

namespace quarry {

constexpr uint64_t kMiB = 1 << 20;

inline BlockId IdOf(uint64_t n) {
  BlockId id;
  id.bytes[31] = 1;  // never the zero id
  std::memcpy(id.bytes.data(), &n, sizeof(n));
  return id;
}

inline BlockKey KeyOf(uint64_t n, uint64_t parent = 0, uint8_t name_space = 0) {
  BlockKey key;
  key.id = IdOf(n);
  if (parent != 0) key.parent = IdOf(parent);
  key.name_space.bytes[0] = name_space;
  key.full_key = "key " + std::to_string(n);
  return key;
}

class StoreTest : public ::testing::Test {
 protected:
  static BlockStoreOptions SmallOptions() {
    BlockStoreOptions options;
    options.arena.capacity_bytes = 8 * kMiB;
    options.arena.extent_bytes = 2 * kMiB;
    options.arena.huge_pages = ArenaOptions::HugePages::kNever;
    options.arena.prefault = false;
    options.arena.spare_bytes = 0;
    return options;
  }
  void SetUp() override { Start(SmallOptions()); }
  void Start(BlockStoreOptions options) {
    options.now = [this] { return now_; };
    auto store = BlockStore::Create(options);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }

  // A block being written, filled with `fill`.
  BlockView Begin(std::string_view tenant, uint64_t bytes, char fill = 'x') {
    EXPECT_TRUE(store_->Reserve(tenant, bytes, 1).ok());
    auto view = store_->Begin(tenant, bytes);
    EXPECT_TRUE(view.ok()) << view.status();
    if (!view.ok()) return {};
    std::memset(view->memory.data, fill, bytes);
    return *view;
  }
  BlockView Publish(BlockHandle block, const BlockKey& key) {
    bool existed = false;
    auto view = store_->Publish(block, key, std::nullopt, &existed);
    EXPECT_TRUE(view.ok()) << view.status();
    EXPECT_FALSE(existed);
    return view.value_or(BlockView{});
  }
  // A published block, leased by the caller.
  BlockView Leased(std::string_view tenant, uint64_t n, uint64_t bytes, uint64_t parent = 0) {
    return Publish(Begin(tenant, bytes, static_cast<char>(n)).handle, KeyOf(n, parent));
  }
  void Cached(std::string_view tenant, uint64_t n, uint64_t bytes, uint64_t parent = 0) {
    store_->Release(Leased(tenant, n, bytes, parent).handle);
  }
  bool Has(std::string_view tenant, uint64_t n, uint64_t parent = 0) {
    return store_->Contains(tenant, KeyOf(n, parent));
  }
  void Pin(std::string_view tenant, std::string_view name, std::vector<uint64_t> blocks,
           absl::Time expires = absl::InfiniteFuture()) {
    std::vector<BlockId> ids;
    for (uint64_t n : blocks) ids.push_back(IdOf(n));
    const absl::Status status = store_->Pin(tenant, name, ids, expires);
    EXPECT_TRUE(status.ok()) << status;
  }
  // Reserves and lets go again: what had to be evicted is evicted.
  absl::Status Press(std::string_view tenant, uint64_t bytes, uint32_t count) {
    absl::Status status = store_->Reserve(tenant, bytes, count);
    if (status.ok()) store_->Unreserve(tenant, bytes, count);
    return status;
  }

  absl::Time now_ = absl::UnixEpoch();
  std::unique_ptr<BlockStore> store_;
};

}  // namespace quarry

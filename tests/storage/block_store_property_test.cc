// Random operations against simple models of the store.
#include <algorithm>
#include <map>
#include <random>
#include <set>

#include <gtest/gtest.h>

#include "proto/byte_digest.h"
#include "tests/storage/store_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr int kSteps = 6000;

// ---- One tenant, one size: the model knows exactly what must happen.

struct ModelBlock {
  uint64_t parent = 0;
  uint64_t last_used = 0;
  int pins = 0;
  std::vector<BlockHandle> leases;
};

class ExactModel {
 public:
  explicit ExactModel(uint64_t slots) : slots_(slots) {}

  std::map<uint64_t, ModelBlock> published;
  std::vector<BlockHandle> retiring;  // one entry per lease
  std::vector<BlockHandle> writing;
  uint64_t reserved = 0;
  uint64_t used = 0;  // slots of blocks of any state
  uint64_t evictions = 0;

  void Touch(uint64_t n) { published[n].last_used = ++tick_; }

  bool Held(uint64_t n) const {
    const ModelBlock& block = published.at(n);
    if (block.pins > 0 || !block.leases.empty()) return true;
    for (const auto& [m, child] : published) {
      if (child.parent == n && Held(m)) return true;
    }
    return false;
  }
  bool IsLeaf(uint64_t n) const {
    for (const auto& [m, child] : published) {
      if (child.parent == n) return false;
    }
    return true;
  }
  // What Reserve must do; false: refuse.
  bool Reserve(uint64_t count) {
    const uint64_t free = slots_ - used - reserved;
    uint64_t evictable = 0;
    for (const auto& [n, block] : published) evictable += Held(n) ? 0 : 1;
    if (free + evictable < count) return false;
    for (uint64_t missing = count > free ? count - free : 0; missing > 0; --missing) EvictOne();
    reserved += count;
    return true;
  }

 private:
  void EvictOne() {
    uint64_t victim = 0;
    for (const auto& [n, block] : published) {
      if (Held(n) || !IsLeaf(n)) continue;
      if (victim == 0 || block.last_used < published[victim].last_used) victim = n;
    }
    ASSERT_NE(victim, 0u);
    published.erase(victim);
    --used;
    ++evictions;
  }

  const uint64_t slots_;
  uint64_t tick_ = 0;
};

class ExactPropertyTest : public StoreTest {
 protected:
  static constexpr uint64_t kBytes = 64 << 10, kSlots = 24, kIds = 40;

  void SetUp() override {
    BlockStoreOptions options = SmallOptions();
    options.arena.capacity_bytes = kSlots * kBytes;
    options.arena.extent_bytes = 4 * kBytes;
    Start(options);
  }
  // Ids form a tree: the parent of n is n / 3, and ids below 3 are roots.
  static BlockKey Key(uint64_t n) { return KeyOf(n, n / 3); }
  uint64_t Pick(uint64_t n) { return random_() % n; }

  void Reserve() {
    const auto count = static_cast<uint32_t>(1 + Pick(5));
    const bool ok = model_.Reserve(count);
    const absl::Status status = store_->Reserve("t", kBytes, count);
    ASSERT_EQ(status.ok(), ok) << status;
    ASSERT_TRUE(ok || absl::IsResourceExhausted(status));
  }
  void Unreserve() {
    if (model_.reserved == 0) return;
    const uint64_t count = 1 + Pick(model_.reserved);
    store_->Unreserve("t", kBytes, static_cast<uint32_t>(count));
    model_.reserved -= count;
  }
  void Begin() {
    auto view = store_->Begin("t", kBytes);
    ASSERT_EQ(view.ok(), model_.reserved > 0);  // what was reserved can always be had
    if (!view.ok()) return;
    --model_.reserved;
    ++model_.used;
    model_.writing.push_back(view->handle);
  }
  void Publish() {
    if (model_.writing.empty()) return;
    const BlockHandle block = model_.writing.back();
    model_.writing.pop_back();
    const uint64_t n = 1 + Pick(kIds);
    const bool wins = !model_.published.contains(n);
    bool existed = false;
    auto view = store_->Publish(block, Key(n), ByteDigest{n, n}, &existed);
    ASSERT_TRUE(view.ok()) << view.status();
    ASSERT_EQ(existed, !wins);
    if (wins) {
      model_.published[n].parent = n / 3;
      ASSERT_EQ(view->handle, block);
    } else {
      model_.retiring.push_back(block);
    }
    model_.published[n].leases.push_back(view->handle);
    model_.Touch(n);
  }
  void Acquire() {
    const uint64_t n = 1 + Pick(kIds);
    auto view = store_->Acquire("t", Key(n));
    ASSERT_EQ(view.ok(), model_.published.contains(n)) << n;
    if (!view.ok()) return;
    ASSERT_EQ(view->digest, (ByteDigest{n, n}));
    model_.published[n].leases.push_back(view->handle);
    model_.Touch(n);
  }
  void Release() {
    if (Pick(4) == 0 && !model_.writing.empty()) {  // abandoned
      store_->Release(model_.writing.back());
      model_.writing.pop_back();
      --model_.used;
    } else if (Pick(3) == 0 && !model_.retiring.empty()) {
      const BlockHandle block = model_.retiring.back();
      model_.retiring.pop_back();
      store_->Release(block);
      const auto& rest = model_.retiring;
      if (std::find(rest.begin(), rest.end(), block) == rest.end()) --model_.used;
    } else {
      std::vector<uint64_t> leased;
      for (const auto& [n, block] : model_.published) {
        if (!block.leases.empty()) leased.push_back(n);
      }
      if (leased.empty()) return;
      ModelBlock& block = model_.published[leased[Pick(leased.size())]];
      store_->Release(block.leases.back());
      block.leases.pop_back();
      if (block.leases.empty()) model_.Touch(KeyNumber(block));
    }
  }
  uint64_t KeyNumber(const ModelBlock& wanted) {
    for (const auto& [n, block] : model_.published) {
      if (&block == &wanted) return n;
    }
    return 0;
  }
  void Purge() {
    const uint64_t n = 1 + Pick(kIds);
    const std::vector<BlockId> ids = {IdOf(n)};
    const bool there = model_.published.contains(n);
    ASSERT_EQ(*store_->Purge("t", std::nullopt, ids), there ? 1u : 0u);
    if (!there) return;
    const ModelBlock& block = model_.published[n];
    if (block.leases.empty()) --model_.used;
    for (BlockHandle lease : block.leases) model_.retiring.push_back(lease);
    for (auto& [name, blocks] : pins_) blocks.erase(n);
    std::erase_if(pins_, [](const auto& pin) { return pin.second.empty(); });
    model_.published.erase(n);
  }
  // Pins are named after the block they were set for; they hold its ancestors too.
  void TogglePin() {
    const uint64_t n = 1 + Pick(kIds);
    if (pins_.contains(n)) {
      ASSERT_TRUE(store_->Unpin("t", std::to_string(n)).ok());
      for (uint64_t block : pins_[n]) --model_.published[block].pins;
      pins_.erase(n);
      return;
    }
    const std::vector<BlockId> ids = {IdOf(n)};
    const absl::Status status =
        store_->Pin("t", std::to_string(n), ids, absl::InfiniteFuture());
    ASSERT_EQ(status.ok(), model_.published.contains(n)) << status;
    if (!status.ok()) return;
    for (uint64_t b = n; model_.published.contains(b); b = model_.published[b].parent) {
      pins_[n].insert(b);
      ++model_.published[b].pins;
    }
  }
  void Check() {
    const BlockStoreStats stats = store_->Stats();
    ASSERT_EQ(stats.published, model_.published.size());
    ASSERT_EQ(stats.blocks, model_.used);
    ASSERT_EQ(stats.reserved_bytes, model_.reserved * kBytes);
    ASSERT_EQ(stats.evictions, model_.evictions);
    const auto is_pinned = [](const auto& block) { return block.second.pins > 0; };
    ASSERT_EQ(stats.pinned, static_cast<uint64_t>(std::count_if(model_.published.begin(),
                                                                model_.published.end(), is_pinned)));
    ASSERT_EQ(stats.arena.used_bytes, (model_.used + model_.reserved) * kBytes);
    ASSERT_LE(stats.arena.extent_bytes, kSlots * kBytes);
    for (uint64_t n = 1; n <= kIds; ++n) {
      ASSERT_EQ(store_->Contains("t", Key(n)), model_.published.contains(n)) << n;
    }
  }

  std::mt19937 random_{Seed()};
  ExactModel model_{kSlots};
  std::map<uint64_t, std::set<uint64_t>> pins_;  // by name
};

TEST_F(ExactPropertyTest, TheStoreDoesExactlyWhatTheModelDoes) {
  for (int step = 0; step < kSteps && !HasFatalFailure(); ++step) {
    SCOPED_TRACE(testing::Message() << "step " << step);
    switch (Pick(24)) {
      case 0: case 1: case 2: Reserve(); break;
      case 3: Unreserve(); break;
      case 4: case 5: case 6: case 7: Begin(); break;
      case 8: case 9: case 10: case 11: Publish(); break;
      case 12: case 13: Acquire(); break;
      case 14: TogglePin(); break;
      case 15: Purge(); break;
      default: Release(); break;
    }
    if (!HasFatalFailure()) Check();
  }
  EXPECT_GT(model_.evictions, 50u);  // the mix reaches evictions at all
}

// ---- Several tenants and sizes: what must hold whatever is evicted.

struct LiveBlock {
  std::string tenant;
  uint64_t n = 0;
  BlockKey key;
  BlockView view;
  uint64_t fill = 0;
  uint32_t leases = 1;
  bool published = false, purged = false;
};

class MixedPropertyTest : public StoreTest {
 protected:
  static constexpr uint64_t kIds = 120;
  static constexpr uint64_t kSizes[] = {100, 5000, 40000, 70000, 300000, 1000000};

  void SetUp() override {
    BlockStoreOptions options = SmallOptions();
    options.arena.capacity_bytes = 6 * kMiB;
    options.arena.extent_bytes = 512 << 10;
    options.arena.spare_bytes = 1 * kMiB;
    Start(options);
  }
  uint64_t Pick(uint64_t n) { return random_() % n; }
  std::string Tenant() { return Pick(3) == 0 ? "bob" : "alice"; }
  static BlockKey Key(uint64_t n) { return KeyOf(n, n / 4); }

  void Fill(LiveBlock* block) {
    block->fill = random_();
    auto* at = block->view.memory.data;
    std::memset(at, static_cast<int>(block->fill & 0xff), block->view.memory.bytes);
  }
  static bool Intact(const LiveBlock& block) {
    const auto want = static_cast<std::byte>(block.fill & 0xff);
    const ArenaSlot& memory = block.view.memory;
    return memory.data[0] == want && memory.data[memory.bytes / 2] == want &&
           memory.data[memory.bytes - 1] == want;
  }

  void ReserveAndBegin() {
    const std::string tenant = Tenant();
    const uint64_t bytes = kSizes[Pick(std::size(kSizes))];
    const auto count = static_cast<uint32_t>(1 + Pick(4));
    const auto before = Published();
    const absl::Status status = store_->Reserve(tenant, bytes, count);
    CheckEvictions(before, status.ok());
    if (!status.ok()) {
      ++refusals_;
      ASSERT_TRUE(absl::IsResourceExhausted(status)) << status;
      return;
    }
    for (uint32_t i = 0; i < count; ++i) {
      if (Pick(5) == 0) {
        store_->Unreserve(tenant, bytes, 1);
        continue;
      }
      auto view = store_->Begin(tenant, bytes);
      ASSERT_TRUE(view.ok()) << view.status();
      LiveBlock block{.tenant = tenant, .view = *view};
      Fill(&block);
      held_.push_back(block);
    }
  }
  // Everything published that the store still has.
  std::set<std::pair<std::string, uint64_t>> Published() {
    std::set<std::pair<std::string, uint64_t>> out;
    for (const std::string tenant : {"alice", "bob"}) {
      for (const BlockInfo& info : store_->List(tenant, 1000)) {
        uint64_t n = 0;
        std::memcpy(&n, info.id.bytes.data(), sizeof(n));
        out.emplace(tenant, n);
      }
    }
    return out;
  }
  void CheckEvictions(const std::set<std::pair<std::string, uint64_t>>& before, bool reserved) {
    const auto after = Published();
    for (const auto& [tenant, n] : before) {
      if (after.contains({tenant, n})) continue;
      ASSERT_TRUE(reserved) << "a refusal evicted " << n;
      ++evicted_;
      for (const LiveBlock& block : held_) {
        ASSERT_FALSE(block.published && !block.purged && block.tenant == tenant && block.n == n)
            << "leased block " << n << " was evicted";
      }
      for (uint64_t child = 4 * n; child < 4 * n + 4; ++child) {
        ASSERT_FALSE(after.contains({tenant, child})) << n << " went before " << child;
      }
    }
  }
  void Publish() {
    for (LiveBlock& block : held_) {
      if (block.published || block.purged || Pick(3) != 0) continue;
      const uint64_t n = 1 + Pick(kIds);
      const bool there = store_->Contains(block.tenant, Key(n));
      bool existed = false;
      auto view = store_->Publish(block.view.handle, Key(n), std::nullopt, &existed);
      ASSERT_TRUE(view.ok()) << view.status();
      ASSERT_EQ(existed, there);
      if (existed) {
        store_->Release(view->handle);
        block.purged = true;  // lost: never found, readable until released
      } else {
        block.published = true;
        block.n = n;
      }
      return;
    }
  }
  void Acquire() {
    const std::string tenant = Tenant();
    const uint64_t n = 1 + Pick(kIds);
    auto view = store_->Acquire(tenant, Key(n));
    ASSERT_EQ(view.ok(), Published().contains({tenant, n}));
    if (!view.ok()) return;
    std::vector<std::byte> out(view->memory.bytes);
    ASSERT_TRUE(store_->CopyOut(view->handle, 0, out).ok());
    for (std::byte b : out) ASSERT_EQ(b, out[0]);
    LiveBlock block{.tenant = tenant, .n = n, .view = *view};
    block.fill = static_cast<uint64_t>(out[0]);
    block.published = true;
    held_.push_back(block);
  }
  void Release() {
    if (held_.empty()) return;
    const size_t i = Pick(held_.size());
    ASSERT_TRUE(Intact(held_[i]));
    store_->Release(held_[i].view.handle);
    held_.erase(held_.begin() + static_cast<ptrdiff_t>(i));
  }
  void Purge() {
    const std::string tenant = Tenant();
    const uint64_t n = 1 + Pick(kIds);
    const std::vector<BlockId> ids = {IdOf(n)};
    if (Pick(20) == 0) {
      EXPECT_TRUE(store_->Purge(tenant, std::nullopt, {}).ok());
    } else {
      EXPECT_TRUE(store_->Purge(tenant, std::nullopt, ids).ok());
    }
    for (LiveBlock& block : held_) {
      if (block.published && block.tenant == tenant && !Published().contains({tenant, block.n})) {
        block.purged = true;
      }
    }
  }
  void Check() {
    const ArenaStats arena = store_->Stats().arena;
    ASSERT_LE(arena.extent_bytes, 6 * kMiB);
    ASSERT_LE(arena.used_bytes, arena.extent_bytes);
    // Leased bytes are intact, and no two tenants' or blocks' memory meets.
    std::map<const std::byte*, const LiveBlock*> memory;
    for (const LiveBlock& block : held_) {
      ASSERT_TRUE(Intact(block));
      auto [it, added] = memory.emplace(block.view.memory.data, &block);
      ASSERT_TRUE(added || it->second->view.handle == block.view.handle);
      ASSERT_TRUE(store_->arena().ExtentDescriptor(block.tenant, block.view.memory.extent).ok());
      const std::string stranger = block.tenant == "bob" ? "alice" : "bob";
      ASSERT_FALSE(store_->arena().ExtentDescriptor(stranger, block.view.memory.extent).ok());
    }
    const std::byte* end = nullptr;
    for (const auto& [data, block] : memory) {
      ASSERT_GE(data, end);
      end = data + block->view.memory.bytes;
    }
  }

  std::mt19937_64 random_{Seed()};
  std::vector<LiveBlock> held_;  // one entry per lease
  uint64_t evicted_ = 0, refusals_ = 0;
};

TEST_F(MixedPropertyTest, LeasesHoldParentsStayAndReservationsAreHonoured) {
  for (int step = 0; step < kSteps && !HasFatalFailure(); ++step) {
    SCOPED_TRACE(testing::Message() << "step " << step);
    switch (Pick(12)) {
      case 0: case 1: ReserveAndBegin(); break;
      case 2: case 3: case 4: Publish(); break;
      case 5: Acquire(); break;
      case 6: if (Pick(4) == 0) Purge(); break;
      default: Release(); break;
    }
    if (!HasFatalFailure()) Check();
  }
  EXPECT_GT(evicted_, 50u);
  // Everything goes back: the capacity is whole again.
  for (const LiveBlock& block : held_) store_->Release(block.view.handle);
  held_.clear();
  EXPECT_TRUE(store_->Purge("alice", std::nullopt, {}).ok());
  EXPECT_TRUE(store_->Purge("bob", std::nullopt, {}).ok());
  const BlockStoreStats stats = store_->Stats();
  EXPECT_EQ(stats.blocks, 0u);
  EXPECT_EQ(stats.reserved_bytes, 0u);
  EXPECT_EQ(stats.arena.used_bytes, 0u);
  EXPECT_TRUE(store_->Reserve("carol", 6 * kMiB, 1).ok());
}

}  // namespace
}  // namespace quarry

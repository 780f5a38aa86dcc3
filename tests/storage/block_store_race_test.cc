// Threads that publish, find, evict, pin and purge at once; made for ThreadSanitizer, too.
#include <atomic>
#include <random>
#include <thread>

#include <gtest/gtest.h>

#include "tests/storage/store_fixture.h"

namespace quarry {
namespace {

class BlockStoreRaceTest : public StoreTest {
 protected:
  static constexpr int kThreads = 4;
  static constexpr int kSteps = 1500;

  void SetUp() override {
    BlockStoreOptions options = SmallOptions();
    options.arena.extent_bytes = 1 * kMiB;
    options.arena.spare_bytes = 1 * kMiB;
    Start(options);
  }
  template <typename Body>
  void InThreads(Body body) {
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) threads.emplace_back([body, t] { body(t); });
    for (std::thread& thread : threads) thread.join();
  }
  void ExpectAllReturned() {
    for (const char* tenant : {"a", "b"}) EXPECT_TRUE(store_->Purge(tenant, std::nullopt, {}).ok());
    const BlockStoreStats stats = store_->Stats();
    EXPECT_EQ(stats.blocks, 0u);
    EXPECT_EQ(stats.leased, 0u);
    EXPECT_EQ(stats.pinned, 0u);
    EXPECT_EQ(stats.reserved_bytes, 0u);
    EXPECT_EQ(stats.arena.used_bytes, 0u);
    EXPECT_TRUE(Press("c", 8 * kMiB, 1).ok());
  }
};

// All bytes of a block are a function of its id, so that a reader knows what it must see.
char FillOf(uint64_t n) { return static_cast<char>(n * 37 + 11); }

TEST_F(BlockStoreRaceTest, ReadersSeeWholeBlocksWhileOthersWriteEvictAndPurge) {
  std::atomic<uint64_t> found = 0, published = 0;
  InThreads([&](int t) {
    const std::string tenant = t % 2 == 0 ? "a" : "b";
    std::mt19937 random(static_cast<uint32_t>(t));
    for (int i = 0; i < kSteps; ++i) {
      const uint64_t n = 1 + random() % 60;
      const uint64_t bytes = n % 3 == 0 ? 300000 : n % 3 == 1 ? 70000 : 4096;
      const BlockKey key = KeyOf(n, n / 3);
      const auto what = random() % 16;
      if (what < 8) {
        auto view = store_->Acquire(tenant, key);
        if (!view.ok()) continue;
        ++found;
        std::vector<std::byte> out(view->memory.bytes);
        ASSERT_TRUE(store_->CopyOut(view->handle, 0, out).ok());
        ASSERT_EQ(out.front(), static_cast<std::byte>(FillOf(n)));
        ASSERT_EQ(out.back(), static_cast<std::byte>(FillOf(n)));
        store_->Release(view->handle);
      } else if (what < 14) {
        if (!store_->Reserve(tenant, bytes, 1).ok()) continue;
        auto view = store_->Begin(tenant, bytes);
        ASSERT_TRUE(view.ok()) << view.status();
        std::memset(view->memory.data, FillOf(n), bytes);
        bool existed = false;
        auto winner = store_->Publish(view->handle, key, std::nullopt, &existed);
        ASSERT_TRUE(winner.ok()) << winner.status();
        ++published;
        if (existed) store_->Release(view->handle);
        ASSERT_EQ(winner->memory.data[winner->memory.bytes - 1], static_cast<std::byte>(FillOf(n)));
        store_->Release(winner->handle);
      } else if (what == 14) {
        const std::vector<BlockId> ids = {IdOf(n)};
        if (random() % 8 == 0) {
          EXPECT_TRUE(store_->Purge(tenant, std::nullopt, ids).ok());
        }
      } else {
        const std::vector<BlockId> ids = {IdOf(n)};
        const std::string name = std::to_string(t);
        if (store_->Pin(tenant, name, ids, absl::InfiniteFuture()).ok()) {
          (void)store_->Unpin(tenant, name);
        }
        store_->List(tenant, 5);
        ASSERT_LE(store_->Stats().arena.extent_bytes, 8 * kMiB);
      }
    }
  });
  EXPECT_GT(found.load(), 0u);
  EXPECT_GT(published.load(), 0u);
  ExpectAllReturned();
}

TEST_F(BlockStoreRaceTest, ReservationsThatFitTogetherAreNeverRefused) {
  // Each thread holds at most 2 MiB of the 8; extents come and go all the time.
  InThreads([&](int t) {
    const std::string tenant = t % 2 == 0 ? "a" : "b";
    for (int i = 0; i < kSteps; ++i) {
      const absl::Status status = store_->Reserve(tenant, 1 * kMiB, 2);
      ASSERT_TRUE(status.ok()) << status << " thread " << t << " step " << i;
      store_->Unreserve(tenant, 1 * kMiB, 2);
    }
  });
  ExpectAllReturned();
}

TEST_F(BlockStoreRaceTest, ManyWritersOfOneIdHaveOneWinner) {
  for (uint64_t n = 1; n <= 200; ++n) {
    std::atomic<int> winners = 0;
    std::atomic<uint64_t> block = ~0ull;
    InThreads([&](int) {
      ASSERT_TRUE(store_->Reserve("a", 4096, 1).ok());
      auto view = store_->Begin("a", 4096);
      ASSERT_TRUE(view.ok());
      std::memset(view->memory.data, FillOf(n), 4096);
      bool existed = false;
      auto winner = store_->Publish(view->handle, KeyOf(n), std::nullopt, &existed);
      ASSERT_TRUE(winner.ok());
      if (!existed) {
        ++winners;
        block = winner->handle.slot;
      }
      store_->Release(winner->handle);
      if (existed) store_->Release(view->handle);
    });
    ASSERT_EQ(winners.load(), 1);
    auto view = store_->Acquire("a", KeyOf(n));
    ASSERT_TRUE(view.ok());
    ASSERT_EQ(view->handle.slot, block.load());
    store_->Release(view->handle);
  }
  EXPECT_EQ(store_->Stats().duplicate_publishes, 200u * (kThreads - 1));
  ExpectAllReturned();
}

}  // namespace
}  // namespace quarry

#include "daemon/index_memory.h"

#include <memory>
#include <utility>

#include "tests/daemon/engine_fixture.h"

namespace quarry {
namespace {

// Says when it ends.
class Ending : public KeyIndex {
 public:
  explicit Ending(int* ended) : ended_(ended) {}
  ~Ending() override { ++*ended_; }
  std::string_view kind() const override { return "ending"; }

 private:
  int* const ended_;
};

class IndexMemoryTest : public ::testing::Test {
 protected:
  MadeIndex Made(uint64_t bytes, std::shared_ptr<const void> shared = nullptr,
                 uint64_t shared_bytes = 0) {
    return {std::make_unique<Ending>(&ended_), bytes, std::move(shared), shared_bytes};
  }
  std::shared_ptr<const KeyIndex> Keep(MadeIndex made) {
    auto kept = memory_->Keep(&made);
    EXPECT_OK(kept.status());
    return kept.ok() ? *std::move(kept) : nullptr;
  }

  int ended_ = 0;
  std::shared_ptr<IndexMemory> memory_ = std::make_shared<IndexMemory>(100);
};

TEST_F(IndexMemoryTest, WhatIsSharedCountsOnceUntilTheLastOfItEnds) {
  auto model = std::make_shared<const int>(1);
  auto first = Keep(Made(10, model, 5));
  auto second = Keep(Made(20, model, 5));
  auto other = Keep(Made(30));
  EXPECT_EQ(memory_->used(), 65u);
  first.reset();
  EXPECT_EQ(memory_->used(), 55u);
  EXPECT_EQ(model.use_count(), 2);
  second.reset();
  EXPECT_EQ(memory_->used(), 30u);
  EXPECT_EQ(model.use_count(), 1);
  other.reset();
  EXPECT_EQ(memory_->used(), 0u);
  EXPECT_EQ(ended_, 3);
}

TEST_F(IndexMemoryTest, ARefusedOneIsAsItWasAndNamesTheBytes) {
  const auto model = std::make_shared<const int>(1);
  auto first = Keep(Made(90));
  MadeIndex made = Made(6, model, 5);
  const auto refused = memory_->Keep(&made);
  EXPECT_TRUE(absl::IsResourceExhausted(refused.status()));
  EXPECT_THAT(
      refused.status().message(),
      ::testing::HasSubstr("indexes of 90 bytes and this one of 11 pass index.max_bytes 100"));
  EXPECT_NE(made.index, nullptr);
  EXPECT_EQ(made.shared, model);
  EXPECT_EQ(memory_->used(), 90u);
  EXPECT_EQ(ended_, 0);
  auto small = Keep(Made(10));
  EXPECT_EQ(memory_->used(), 100u);
}

TEST_F(IndexMemoryTest, TheFirstThatSharesNeedsRoomForWhatIsShared) {
  const auto model = std::make_shared<const int>(1);
  EXPECT_EQ(memory_->BytesOf(Made(10, model, 5)), 15u);
  auto first = Keep(Made(10, model, 5));
  EXPECT_EQ(memory_->free(), 85u);
  EXPECT_EQ(memory_->BytesOf(Made(10, model, 5)), 10u);
  first.reset();
  EXPECT_EQ(memory_->BytesOf(Made(10, model, 5)), 15u);
  EXPECT_EQ(memory_->free(), 100u);
}

TEST_F(IndexMemoryTest, AnIndexOutlivesWhoeverKeepsCount) {
  auto index = Keep(Made(10));
  memory_.reset();
  index.reset();
  EXPECT_EQ(ended_, 1);
}

}  // namespace
}  // namespace quarry

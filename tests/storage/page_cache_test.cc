// Pages of blocks: what is copied is right, what is wanted again stays, what is not makes room.
#include "storage/page_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "tests/support/seed.h"

namespace quarry {
namespace {

// A block whose bytes follow from their places.
struct Source {
  uint64_t bytes = 0;
  std::atomic<uint64_t> read_pages{0};
  std::atomic<int> fail_at{-1};  // which of the next reads fails; -1: none
  absl::Status failure = absl::UnavailableError("the disk");
  std::atomic<bool> ended{false};

  static uint64_t WordAt(uint64_t offset) { return offset * 0x9e3779b97f4a7c15ull + 1; }
};

class SourceReader final : public LoggedBlockReader {
 public:
  explicit SourceReader(Source* source) : source_(source) {}
  ~SourceReader() override { source_->ended = true; }
  uint64_t bytes() const override { return source_->bytes; }
  const ByteDigest& digest() const override { return digest_; }
  absl::Status Read(std::span<const PieceToRead> pieces) override {
    const bool fails = source_->fail_at >= 0 && source_->fail_at-- == 0;
    for (const PieceToRead& piece : pieces) {
      EXPECT_EQ(piece.offset % kPageBytes, 0u);
      EXPECT_EQ(piece.out.size() % kPageBytes, 0u);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(piece.out.data()) % kPageBytes, 0u);
      source_->read_pages += piece.out.size() / kPageBytes;
      for (uint64_t at = 0; at < piece.out.size(); at += 8) {
        const uint64_t word = fails ? 0xbad : Source::WordAt(piece.offset + at);
        std::memcpy(piece.out.data() + at, &word, 8);
      }
    }
    return fails ? source_->failure : absl::OkStatus();
  }

 private:
  Source* const source_;
  const ByteDigest digest_{};
};

std::unique_ptr<PageCache> MakeCache(uint64_t pages) {
  auto cache = PageCache::Create(pages * kPageBytes);
  EXPECT_TRUE(cache.ok()) << cache.status();
  return *std::move(cache);
}

std::unique_ptr<PagedBlock> Open(PageCache* cache, Source* source) {
  return std::make_unique<PagedBlock>(cache, std::make_unique<SourceReader>(source));
}

struct Range {
  uint64_t offset = 0, bytes = 0;
};
enum class Way { kCached, kOnce };

// Copies, and looks at every whole word.
absl::Status Copy(PagedBlock* block, const std::vector<Range>& ranges, Way way = Way::kCached) {
  std::vector<std::vector<std::byte>> outs;
  std::vector<WantedBytes> wanted;
  for (const Range& range : ranges) outs.emplace_back(range.bytes);
  for (size_t i = 0; i < ranges.size(); ++i) wanted.push_back({ranges[i].offset, outs[i]});
  const absl::Status copied = way == Way::kCached ? block->Copy(wanted) : block->CopyOnce(wanted);
  for (size_t i = 0; i < ranges.size() && copied.ok(); ++i) {
    const uint64_t lo = ranges[i].offset, hi = lo + ranges[i].bytes;
    for (uint64_t at = (lo + 7) / 8 * 8; at + 8 <= hi; at += 8) {
      uint64_t word;
      std::memcpy(&word, outs[i].data() + (at - lo), 8);
      EXPECT_EQ(word, Source::WordAt(at)) << at;
      if (word != Source::WordAt(at)) break;
    }
  }
  return copied;
}

TEST(PageCacheTest, ReadsThePagesOfTheRangesOnce) {
  const auto cache = MakeCache(256);
  Source source{.bytes = 100 * kPageBytes + 17};
  const auto block = Open(cache.get(), &source);
  const std::vector<Range> ranges = {
      {100, 8}, {200, 0}, {300, kPageBytes}, {50 * kPageBytes, 1}, {100 * kPageBytes + 8, 9}};
  ASSERT_TRUE(Copy(block.get(), ranges).ok());
  EXPECT_EQ(source.read_pages, 4u);
  EXPECT_EQ(cache->Stats().bytes, 4 * kPageBytes);
  ASSERT_TRUE(Copy(block.get(), ranges).ok());
  EXPECT_EQ(source.read_pages, 4u);
  EXPECT_EQ(cache->Stats().hits, 4u);
  EXPECT_EQ(cache->Stats().reads, 4u);
  // Past the cache.
  ASSERT_TRUE(Copy(block.get(), {{60 * kPageBytes + 5, 3 * kPageBytes}}, Way::kOnce).ok());
  EXPECT_EQ(source.read_pages, 8u);
  EXPECT_EQ(cache->Stats().once, 4u);
  EXPECT_EQ(cache->Stats().bytes, 4 * kPageBytes);
}

TEST(PageCacheTest, WhatIsUsedAgainAndAgainStays) {
  constexpr uint64_t kPages = 256;
  const auto cache = MakeCache(kPages);
  Source one{.bytes = 4 * kPages * kPageBytes}, other{.bytes = one.bytes};
  const auto a = Open(cache.get(), &one), b = Open(cache.get(), &other);
  const auto touch = [&](PagedBlock* block, uint64_t page) {
    ASSERT_TRUE(Copy(block, {{page * kPageBytes, 8}}).ok());
  };
  for (uint64_t p = 0; p < 4 * kPages; ++p) {
    touch(a.get(), p % 64);
    touch(b.get(), p);
    ASSERT_LE(cache->Stats().bytes, kPages * kPageBytes);
  }
  EXPECT_EQ(one.read_pages, 64u) << "pages that are used all the time made room";
  EXPECT_EQ(other.read_pages, 4 * kPages);
  EXPECT_EQ(cache->Stats().evictions,
            one.read_pages + other.read_pages - cache->Stats().bytes / kPageBytes);
}

TEST(PageCacheTest, ACallMayWantMoreThanThereIsRoomFor) {
  for (const uint64_t pages : {0, 1, 8}) {
    const auto cache = MakeCache(pages);
    Source source{.bytes = 64 * kPageBytes};
    const auto block = Open(cache.get(), &source);
    for (int i = 0; i < 2; ++i) {
      ASSERT_TRUE(Copy(block.get(), {{3, source.bytes - 3}}).ok());
      EXPECT_EQ(cache->Stats().bytes, pages * kPageBytes);
    }
    EXPECT_EQ(source.read_pages, 2 * 64 - pages);
  }
}

TEST(PageCacheTest, AFailedReadLeavesNothingBehind) {
  const auto cache = MakeCache(256);
  Source source{.bytes = 64 * kPageBytes};
  const auto block = Open(cache.get(), &source);
  ASSERT_TRUE(Copy(block.get(), {{0, 2 * kPageBytes}}).ok());
  source.fail_at = 0;
  EXPECT_TRUE(absl::IsUnavailable(Copy(block.get(), {{0, 8 * kPageBytes}})));
  EXPECT_FALSE(block->lost()) << "another try may do";
  EXPECT_EQ(cache->Stats().bytes, 2 * kPageBytes);
  EXPECT_EQ(cache->Stats().failures, 1u);
  ASSERT_TRUE(Copy(block.get(), {{0, 8 * kPageBytes}}).ok());
  source.fail_at = 0;
  source.failure = absl::DataLossError("a flipped bit");
  EXPECT_TRUE(absl::IsDataLoss(Copy(block.get(), {{20 * kPageBytes, 1}})));
  EXPECT_TRUE(block->lost());
  EXPECT_EQ(cache->Stats().bytes, 8 * kPageBytes);
}

TEST(PageCacheTest, ABlockThatEndsGivesItsPagesAndItsReaderBack) {
  const auto cache = MakeCache(256);
  Source source{.bytes = 64 * kPageBytes};
  auto block = Open(cache.get(), &source);
  ASSERT_TRUE(Copy(block.get(), {{0, source.bytes}}).ok());
  EXPECT_FALSE(source.ended);
  block = nullptr;
  EXPECT_TRUE(source.ended);
  EXPECT_EQ(cache->Stats().bytes, 0u);
}

// Readers of all kinds at once, over a cache that is far too small, with reads that fail, and
// blocks that end: whoever is told that bytes are there has the right ones.
TEST(PageCacheTest, ThreadsGetRightBytes) {
  constexpr int kThreads = 4, kBlocks = 3;
  const auto cache = MakeCache(40);
  Source sources[kBlocks];
  std::vector<std::unique_ptr<PagedBlock>> blocks;
  for (Source& source : sources) {
    source.bytes = 64 * kPageBytes;
    blocks.push_back(Open(cache.get(), &source));
  }
  const uint64_t seed = Seed();
  std::atomic<uint64_t> failures{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(seed + static_cast<uint64_t>(t));
      Source own{.bytes = 16 * kPageBytes};
      for (int i = 0; i < 3000; ++i) {
        const size_t b = random() % kBlocks;
        if (random() % 64 == 0) sources[b].fail_at = 0;
        std::vector<Range> ranges;
        for (uint64_t at = random() % 8; at < 64; at += 1 + random() % 16) {
          ranges.push_back({at * kPageBytes + random() % 500 * 8, 8 + random() % 80});
        }
        ranges.back().bytes = 8;  // so that it ends in the block
        const Way way = random() % 8 == 0 ? Way::kOnce : Way::kCached;
        failures += Copy(blocks[b].get(), ranges, way).ok() ? 0 : 1;
        if (i % 100 == 0) {
          const auto short_lived = Open(cache.get(), &own);
          EXPECT_TRUE(Copy(short_lived.get(), {{0, own.bytes}}).ok());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(failures, 0u);
  EXPECT_GT(cache->Stats().evictions, 0u);
  blocks.clear();
  EXPECT_EQ(cache->Stats().bytes, 0u);
}

}  // namespace
}  // namespace quarry

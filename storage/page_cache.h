// Pages of blocks on the disk, in RAM from when they are wanted until their room is.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/disk/disk.h"
#include "storage/disk_tier_stats.h"
#include "storage/log/block_log.h"
#include "storage/slot_size.h"

namespace quarry {

inline constexpr uint64_t kPageBytes = kSectorBytes;

// Bytes of a block from an offset on, and where they go.
struct WantedBytes {
  uint64_t offset = 0;
  std::span<std::byte> out;
};

// Whole pages.
struct PageStretch {
  uint64_t offset = 0, bytes = 0;
};
// Those that hold so many bytes.
constexpr PageStretch PagesAround(uint64_t offset, uint64_t bytes) {
  const uint64_t lo = offset / kPageBytes * kPageBytes;
  return {lo, RoundUp(offset + bytes, kPageBytes) - lo};
}

class PagedBlock;

// Frames for pages of all its blocks. Where none is free, those go that nobody reads and that were
// not used lately (a clock with one bit). Thread-safe; outlives its blocks.
class PageCache {
 public:
  // ResourceExhausted: the system has no memory.
  static absl::StatusOr<std::unique_ptr<PageCache>> Create(uint64_t capacity_bytes);
  ~PageCache();
  PageCache(const PageCache&) = delete;
  PageCache& operator=(const PageCache&) = delete;

  PageCacheStats Stats() const;

 private:
  friend class PagedBlock;
  struct Frame {
    PagedBlock* block = nullptr;  // null: it is free, or its page is being read
    uint32_t page = 0;
    std::atomic<bool> used{false};  // since the clock passed
  };
  static constexpr uint32_t kNoFrame = ~0u;

  PageCache(std::byte* memory, uint32_t frames);

  std::byte* At(uint32_t frame) const { return memory_ + frame * kPageBytes; }
  // At most `count`; fewer where the others are being read.
  std::vector<uint32_t> Take(size_t count) ABSL_LOCKS_EXCLUDED(mutex_);
  // Whose page may go, from now on.
  void Fill(PagedBlock* block, std::span<const uint32_t> pages, std::span<const uint32_t> frames)
      ABSL_LOCKS_EXCLUDED(mutex_);
  void Free(std::span<const uint32_t> frames) ABSL_LOCKS_EXCLUDED(mutex_);
  // Frames of a block that ends.
  void FreeAll(const PagedBlock& block) ABSL_LOCKS_EXCLUDED(mutex_);
  uint32_t Evict() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::byte* const memory_;
  std::vector<Frame> frames_;  // all but `used` under mutex_
  std::atomic<uint64_t> hits_{0}, reads_{0}, once_{0}, evictions_{0}, failures_{0};
  mutable absl::Mutex mutex_;  // taken before a block's; never held while the disk is waited for
  std::vector<uint32_t> free_ ABSL_GUARDED_BY(mutex_);
  uint32_t hand_ ABSL_GUARDED_BY(mutex_) = 0;
};

// A block of the disk that is read in pieces. Thread-safe.
class PagedBlock {
 public:
  PagedBlock(PageCache* cache, std::unique_ptr<LoggedBlockReader> reader);
  ~PagedBlock();  // nobody reads it
  PagedBlock(const PagedBlock&) = delete;
  PagedBlock& operator=(const PagedBlock&) = delete;

  uint64_t bytes() const { return reader_->bytes(); }
  const ByteDigest& digest() const { return reader_->digest(); }
  // The disk does not have it any more, or not as it was written.
  bool lost() const { return lost_.load(std::memory_order_acquire); }

  // Bytes at rising offsets, which may lie in one page; waits for the disk. What was read stays,
  // for it is expected to be wanted again. Errors are LoggedBlockReader::Read's; nothing in the
  // outs is to be used then.
  absl::Status Copy(std::span<const WantedBytes> wanted);
  // The same past the cache: a scan of everything is no reason to keep it.
  absl::Status CopyOnce(std::span<const WantedBytes> wanted);

 private:
  friend class PageCache;
  enum class State : uint8_t { kAbsent, kReading, kThere };
  struct Page {
    uint32_t frame = PageCache::kNoFrame;
    uint16_t readers = 0;
    State state = State::kAbsent;
  };
  // A page that one call wants: where its bytes are.
  struct Found {
    uint32_t page = 0;
    const std::byte* data = nullptr;
    bool held = false;  // of the cache
  };

  // Which are there, from now on held; which are to be read, by the caller from now on; and which
  // somebody else reads.
  void Claim(std::span<const uint32_t> pages, std::vector<Found>* found,
             std::vector<uint32_t>* to_read, std::vector<uint32_t>* others);
  // Into frames, as far as there are any, else into `spare`.
  absl::Status Read(std::span<const uint32_t> pages, std::vector<AlignedBuffer>* spare,
                    std::vector<Found>* found);
  absl::Status ReadChecked(std::span<const PieceToRead> pieces);
  void AwaitRead(uint32_t page);
  void Release(std::span<const Found> found);
  // For the cache: true if nobody reads the page, which is gone then.
  bool GiveUp(uint32_t page) ABSL_LOCKS_EXCLUDED(mutex_);

  PageCache* const cache_;
  const std::unique_ptr<LoggedBlockReader> reader_;
  std::atomic<bool> lost_{false};
  mutable absl::Mutex mutex_;  // never held while the disk is waited for
  absl::CondVar read_;         // pages are no longer being read
  std::vector<Page> pages_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry

#include "storage/page_cache.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include <errno.h>
#include <sys/mman.h>

#include "absl/strings/str_cat.h"
#include "proto/check.h"

namespace quarry {
namespace {

uint64_t PagesOf(uint64_t bytes) { return RoundUp(bytes, kPageBytes) / kPageBytes; }

// The pages of all that is wanted, rising.
std::vector<uint32_t> PagesOf(std::span<const WantedBytes> wanted, uint64_t block_bytes) {
  std::vector<uint32_t> pages;
  for (const WantedBytes& one : wanted) {
    if (one.out.empty()) continue;
    QUARRY_CHECK(one.offset + one.out.size() <= block_bytes);
    const auto last = static_cast<uint32_t>((one.offset + one.out.size() - 1) / kPageBytes);
    for (auto page = static_cast<uint32_t>(one.offset / kPageBytes); page <= last; ++page) {
      if (pages.empty() || page > pages.back()) pages.push_back(page);
    }
  }
  return pages;
}

}  // namespace

// ---- The cache.

PageCache::PageCache(std::byte* memory, uint32_t frames) : memory_(memory), frames_(frames) {
  free_.reserve(frames);
  for (uint32_t f = frames; f > 0; --f) free_.push_back(f - 1);
}

absl::StatusOr<std::unique_ptr<PageCache>> PageCache::Create(uint64_t capacity_bytes) {
  const uint64_t frames = capacity_bytes / kPageBytes;
  if (frames >= kNoFrame) {
    return absl::InvalidArgumentError(
        absl::StrCat(capacity_bytes, " bytes for pages; at most 16 TiB are allowed"));
  }
  if (frames == 0) return std::unique_ptr<PageCache>(new PageCache(nullptr, 0));
  void* const memory = mmap(nullptr, frames * kPageBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for ", capacity_bytes, " bytes of pages: ", strerror(errno)));
  }
  (void)madvise(memory, frames * kPageBytes, MADV_HUGEPAGE);
  return std::unique_ptr<PageCache>(
      new PageCache(static_cast<std::byte*>(memory), static_cast<uint32_t>(frames)));
}

PageCache::~PageCache() {
  if (memory_ != nullptr) munmap(memory_, frames_.size() * kPageBytes);
}

PageCacheStats PageCache::Stats() const {
  PageCacheStats stats;
  stats.capacity_bytes = frames_.size() * kPageBytes;
  stats.hits = hits_;
  stats.reads = reads_;
  stats.once = once_;
  stats.evictions = evictions_;
  stats.failures = failures_;
  absl::ReaderMutexLock lock(&mutex_);
  stats.bytes = (frames_.size() - free_.size()) * kPageBytes;
  return stats;
}

std::vector<uint32_t> PageCache::Take(size_t count) {
  std::vector<uint32_t> taken;
  absl::MutexLock lock(&mutex_);
  while (taken.size() < count) {
    uint32_t frame = kNoFrame;
    if (free_.empty()) {
      frame = Evict();
      if (frame == kNoFrame) break;
    } else {
      frame = free_.back();
      free_.pop_back();
    }
    frames_[frame].block = nullptr;
    taken.push_back(frame);
  }
  return taken;
}

uint32_t PageCache::Evict() {
  // Twice around: what was used lately is passed over once.
  for (size_t tries = 0; tries < 2 * frames_.size(); ++tries) {
    const uint32_t f = hand_;
    hand_ = hand_ + 1 == frames_.size() ? 0 : hand_ + 1;
    Frame& frame = frames_[f];
    if (frame.block == nullptr) continue;
    if (frame.used.exchange(false, std::memory_order_relaxed)) continue;
    if (!frame.block->GiveUp(frame.page)) continue;
    evictions_.fetch_add(1, std::memory_order_relaxed);
    return f;
  }
  return kNoFrame;
}

void PageCache::Fill(PagedBlock* block, std::span<const uint32_t> pages,
                     std::span<const uint32_t> frames) {
  absl::MutexLock lock(&mutex_);
  for (size_t i = 0; i < frames.size(); ++i) {
    frames_[frames[i]].block = block;
    frames_[frames[i]].page = pages[i];
    frames_[frames[i]].used.store(false, std::memory_order_relaxed);  // until it is wanted again
  }
}

void PageCache::Free(std::span<const uint32_t> frames) {
  absl::MutexLock lock(&mutex_);
  free_.insert(free_.end(), frames.begin(), frames.end());
}

void PageCache::FreeAll(const PagedBlock& block) {
  absl::MutexLock lock(&mutex_);
  absl::MutexLock block_lock(&block.mutex_);
  for (const PagedBlock::Page& page : block.pages_) {
    if (page.state == PagedBlock::State::kAbsent) continue;
    QUARRY_CHECK(page.state == PagedBlock::State::kThere && page.readers == 0);
    frames_[page.frame].block = nullptr;
    free_.push_back(page.frame);
  }
}

// ---- A block.

PagedBlock::PagedBlock(PageCache* cache, std::unique_ptr<LoggedBlockReader> reader)
    : cache_(cache), reader_(std::move(reader)), pages_(PagesOf(reader_->bytes())) {}

PagedBlock::~PagedBlock() { cache_->FreeAll(*this); }

void PagedBlock::Claim(std::span<const uint32_t> pages, std::vector<Found>* found,
                       std::vector<uint32_t>* to_read, std::vector<uint32_t>* others) {
  absl::MutexLock lock(&mutex_);
  for (const uint32_t p : pages) {
    Page& page = pages_[p];
    switch (page.state) {
      case State::kThere:
        ++page.readers;
        cache_->frames_[page.frame].used.store(true, std::memory_order_relaxed);
        found->push_back({p, cache_->At(page.frame), true});
        break;
      case State::kAbsent:
        page.state = State::kReading;
        to_read->push_back(p);
        break;
      case State::kReading:
        others->push_back(p);
        break;
    }
  }
}

absl::Status PagedBlock::ReadChecked(std::span<const PieceToRead> pieces) {
  absl::Status read = reader_->Read(pieces);
  if (read.ok()) return read;
  ++cache_->failures_;
  if (!absl::IsUnavailable(read)) lost_.store(true, std::memory_order_release);
  return read;
}

absl::Status PagedBlock::Read(std::span<const uint32_t> pages, std::vector<AlignedBuffer>* spare,
                              std::vector<Found>* found) {
  std::vector<uint32_t> frames = cache_->Take(pages.size());
  std::vector<PieceToRead> pieces;
  for (size_t i = 0; i < pages.size(); ++i) {
    std::byte* at = nullptr;
    if (i < frames.size()) {
      at = cache_->At(frames[i]);
    } else {
      at = spare->emplace_back(kPageBytes).bytes().data();
    }
    pieces.push_back({pages[i] * kPageBytes, {at, kPageBytes}});
  }
  absl::Status read = ReadChecked(pieces);
  if (read.ok()) {
    cache_->reads_ += pages.size();
    for (size_t i = 0; i < pages.size(); ++i) {
      found->push_back({pages[i], pieces[i].out.data(), i < frames.size()});
    }
  }
  {
    absl::MutexLock lock(&mutex_);
    for (size_t i = 0; i < pages.size(); ++i) {
      const bool stays = read.ok() && i < frames.size();
      pages_[pages[i]] =
          stays ? Page{frames[i], 1, State::kThere} : Page{PageCache::kNoFrame, 0, State::kAbsent};
    }
  }
  read_.SignalAll();
  // Held meanwhile: it cannot go before the cache knows whose it is.
  read.ok() ? cache_->Fill(this, pages, frames) : cache_->Free(frames);
  return read;
}

void PagedBlock::AwaitRead(uint32_t page) {
  absl::MutexLock lock(&mutex_);
  while (pages_[page].state == State::kReading) read_.Wait(&mutex_);
}

void PagedBlock::Release(std::span<const Found> found) {
  absl::MutexLock lock(&mutex_);
  for (const Found& one : found) {
    if (one.held) --pages_[one.page].readers;
  }
}

bool PagedBlock::GiveUp(uint32_t page) {
  absl::MutexLock lock(&mutex_);
  Page& p = pages_[page];
  if (p.state != State::kThere || p.readers > 0) return false;
  p = {};
  return true;
}

absl::Status PagedBlock::Copy(std::span<const WantedBytes> wanted) {
  std::vector<uint32_t> pages = PagesOf(wanted, bytes());
  std::vector<Found> found;
  std::vector<AlignedBuffer> spare;
  absl::Status status;
  while (!pages.empty() && status.ok()) {
    std::vector<uint32_t> to_read, others;
    const size_t before = found.size();
    Claim(pages, &found, &to_read, &others);
    cache_->hits_.fetch_add(found.size() - before, std::memory_order_relaxed);
    // What this call has promised to read comes first: others may wait for it.
    if (!to_read.empty()) status = Read(to_read, &spare, &found);
    if (status.ok() && !others.empty()) AwaitRead(others.front());
    pages = std::move(others);
  }
  if (status.ok()) {
    std::sort(found.begin(), found.end(),
              [](const Found& a, const Found& b) { return a.page < b.page; });
    auto at = found.begin();
    for (const WantedBytes& one : wanted) {
      for (uint64_t done = 0; done < one.out.size();) {
        const uint64_t offset = one.offset + done, in_page = offset % kPageBytes;
        while (at->page < offset / kPageBytes) ++at;
        const uint64_t some = std::min(kPageBytes - in_page, one.out.size() - done);
        std::memcpy(one.out.data() + done, at->data + in_page, some);
        done += some;
      }
    }
  }
  Release(found);
  return status;
}

absl::Status PagedBlock::CopyOnce(std::span<const WantedBytes> wanted) {
  std::vector<AlignedBuffer> memory;
  std::vector<PieceToRead> pieces;
  for (const WantedBytes& one : wanted) {
    QUARRY_CHECK(one.offset + one.out.size() <= bytes());
    const PageStretch pages = PagesAround(one.offset, one.out.size());
    const bool straight = one.out.size() == pages.bytes &&
                          reinterpret_cast<uintptr_t>(one.out.data()) % kPageBytes == 0;
    pieces.push_back({pages.offset, straight ? one.out : memory.emplace_back(pages.bytes).bytes()});
  }
  absl::Status read = ReadChecked(pieces);
  for (const PieceToRead& piece : pieces) {
    cache_->once_ += read.ok() ? piece.out.size() / kPageBytes : 0;
  }
  for (size_t i = 0; i < wanted.size() && read.ok(); ++i) {
    const WantedBytes& one = wanted[i];
    if (pieces[i].out.data() == one.out.data()) continue;
    std::memcpy(one.out.data(), pieces[i].out.data() + (one.offset - pieces[i].offset),
                one.out.size());
  }
  return read;
}

}  // namespace quarry

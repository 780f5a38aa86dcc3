// Blocks in RAM and on a disk: what is published goes to the log in the background, and what RAM
// lacks is read from there.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "storage/block_store.h"
#include "storage/log/block_log.h"
#include "storage/page_cache.h"
#include "storage/paged_blocks.h"

namespace quarry {

struct TieredOptions {
  // Of blocks that wait to be written, which stay in RAM as long; what comes beyond it is not
  // written, until it is used again.
  uint64_t max_queued_bytes = 1ull << 30;
  // Nothing is queued for so long after a write that failed.
  absl::Duration retry_after = absl::Seconds(10);
  // How long Reserve waits for the writer, which holds what it has not written yet.
  absl::Duration reserve_wait = absl::Seconds(10);
};

// Thread-safe. Calls are the RAM store's, but for these: Publish hands a block to the writer;
// Acquire reads what only the disk has into RAM first, and waits for that (a miss of any kind is a
// miss: no room, an error of the disk, a wrong digest); Locate asks both tiers; Purge returns when
// the disk will not bring the blocks back, or says that this is not so; what was purged is the
// larger of both tiers' counts. Its end waits for what is queued.
class TieredBlockStore final : public BlockStore {
 public:
  // pages: of blocks that are used on the disk; null: none are.
  TieredBlockStore(std::unique_ptr<BlockStore> ram, std::unique_ptr<BlockLog> log,
                   const TieredOptions& options, std::unique_ptr<PageCache> pages = nullptr);
  ~TieredBlockStore() override;

  absl::Status Reserve(std::string_view tenant, uint64_t bytes, uint32_t count) override;
  void Unreserve(std::string_view tenant, uint64_t bytes, uint32_t count) override {
    ram_->Unreserve(tenant, bytes, count);
  }
  absl::StatusOr<BlockView> Begin(std::string_view tenant, uint64_t bytes) override {
    return ram_->Begin(tenant, bytes);
  }
  absl::StatusOr<BlockView> Publish(BlockHandle block, BlockKey key,
                                    std::optional<ByteDigest> digest, bool* existed) override;
  absl::StatusOr<BlockView> Acquire(std::string_view tenant, const BlockKey& key) override;
  absl::StatusOr<KeyedBlock> AcquireInRam(std::string_view tenant, const BlockId& id) override {
    return ram_->AcquireInRam(tenant, id);
  }
  absl::StatusOr<BlockView> AcquirePaged(std::string_view tenant, const BlockKey& key) override;
  uint64_t page_bytes() const override {
    return pages_ == nullptr ? 0 : pages_->Stats().capacity_bytes;
  }
  void Retain(BlockHandle block) override {
    PagedBlocks::Has(block) ? paged_.Retain(block) : ram_->Retain(block);
  }
  void Release(BlockHandle block) override {
    PagedBlocks::Has(block) ? paged_.Release(block) : ram_->Release(block);
  }
  void NoteDiskCopy(BlockHandle block, std::optional<double> bytes_per_s) override {
    ram_->NoteDiskCopy(block, bytes_per_s);
  }
  std::optional<BlockPlace> Locate(std::string_view tenant, const BlockKey& key) const override;
  absl::Duration ExpectedLoad(uint64_t bytes) const override;
  absl::Status CopyOut(BlockHandle block, uint64_t offset, std::span<std::byte> out) override {
    return ram_->CopyOut(block, offset, out);
  }
  absl::Status Pin(std::string_view tenant, std::string_view name, std::span<const BlockId> blocks,
                   absl::Time expires) override {
    return ram_->Pin(tenant, name, blocks, expires);
  }
  absl::Status Unpin(std::string_view tenant, std::string_view name) override {
    return ram_->Unpin(tenant, name);
  }
  absl::StatusOr<uint64_t> Purge(std::string_view tenant, std::optional<NamespaceDigest> name_space,
                                 std::span<const BlockId> blocks) override;
  absl::StatusOr<FlushResult> Flush(std::string_view tenant,
                                    std::optional<std::span<const BlockId>> blocks) override;
  bool IsPublished(BlockHandle block) const override {
    return PagedBlocks::Has(block) ? paged_.Stands(block) : ram_->IsPublished(block);
  }
  uint64_t PublishedBytes(std::string_view tenant, std::span<const BlockId> blocks) const override {
    return ram_->PublishedBytes(tenant, blocks);
  }
  // Those of RAM first.
  std::vector<BlockInfo> List(std::string_view tenant, uint32_t limit) const override;
  BlockStoreStats Stats() const override;
  const Arena& arena() const override { return ram_->arena(); }

 private:
  // Of a usual NVMe disk, until one block was read.
  static constexpr double kLoadBytesPerSecond = 1e9;

  // Whether a block of RAM waits for the writer, which has a lease of it then, now or already. If
  // not: the queue has no room (ResourceExhausted), or the disk does not take it now (Unavailable)
  // or ever (InvalidArgument).
  absl::Status Enqueue(const BlockView& view, const BlockKey& key);
  void EnqueueOrCount(const BlockView& view, const BlockKey& key) {
    if (!Enqueue(view, key).ok()) ++not_admitted_;
  }
  absl::StatusOr<BlockView> Promote(std::string_view tenant, const BlockKey& key,
                                    const LoggedBlockInfo& info);
  void NoteLoad(uint64_t bytes, absl::Duration took);
  void WriteQueued();  // until the end
  // All of them, `refused`, while nothing is taken.
  std::vector<KeyedBlock> TakeQueued(bool* refused) ABSL_LOCKS_EXCLUDED(queue_mutex_);
  void Write(std::span<const KeyedBlock> batch);
  void LetGo(std::span<const KeyedBlock> batch);
  bool HasWork() const ABSL_SHARED_LOCKS_REQUIRED(queue_mutex_) {
    return ending_ || !queue_.empty();
  }

  const TieredOptions options_;
  const std::unique_ptr<BlockStore> ram_;
  const std::unique_ptr<BlockLog> log_;
  const std::unique_ptr<PageCache> pages_;
  PagedBlocks paged_;  // what it has ends before the cache and the log

  // Shared by who brings a block back to RAM, while that is decided; alone by who purges both.
  absl::Mutex promotion_mutex_;

  mutable absl::Mutex queue_mutex_;
  std::deque<KeyedBlock> queue_ ABSL_GUARDED_BY(queue_mutex_);
  absl::flat_hash_set<uint32_t> waiting_ ABSL_GUARDED_BY(queue_mutex_);  // slots; leased, so unique
  uint64_t queued_bytes_ ABSL_GUARDED_BY(queue_mutex_) = 0;  // those being written included
  absl::Time refuse_until_ ABSL_GUARDED_BY(queue_mutex_) = absl::InfinitePast();
  std::string refusal_ ABSL_GUARDED_BY(queue_mutex_);  // why, last
  bool ending_ ABSL_GUARDED_BY(queue_mutex_) = false;

  // Mean of the last blocks that were read, the latest counting most.
  std::atomic<double> load_bytes_per_second_{kLoadBytesPerSecond};
  std::atomic<uint64_t> promoted_{0}, failed_promotions_{0}, not_admitted_{0};
  std::thread writer_;  // last
};

}  // namespace quarry

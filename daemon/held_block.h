// HeldBlock: a lease on one block of KV, held for whoever reads it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "proto/check.h"
#include "proto/types.h"
#include "storage/block_store.h"
#include "storage/page_cache.h"

namespace quarry {

// What a block's tokens were computed under.
struct BlockOrigin {
  NamespaceDigest name_space;
  bool dense = true;
  // False: the tokens were computed under several recipes; the block has no identity.
  bool publishable = true;
};

// One lease of the store, ended by the destructor. Held by shared_ptr because contexts, their
// forks, runs and attends in flight read one block and none of them knows which is the last.
// Thread-safe; the bytes of an unpublished block belong to the one context that appends to it.
class HeldBlock {
 public:
  // Takes over the caller's lease on `view`. The store outlives the block.
  HeldBlock(BlockStore& store, const BlockView& view, const BlockOrigin& origin);
  ~HeldBlock();
  HeldBlock(const HeldBlock&) = delete;
  HeldBlock& operator=(const HeldBlock&) = delete;

  // Publishes the full block under `key`, once: later calls return the first one's outcome.
  // Returns this block's winner: null if this block itself is published, the earlier writer's
  // block if there was one. Cost without a digest: one pass over
  // the block.
  absl::StatusOr<std::shared_ptr<HeldBlock>> Publish(
      const BlockKey& key, std::optional<ByteDigest> digest = std::nullopt);

  // Checks the digest of a published block, once. DataLoss: the store has retired it. Of a paged
  // block every piece is checked when it is read.
  absl::Status Verify();

  // All bytes; of a block that is not paged.
  const std::byte* data() const {
    QUARRY_CHECK(paged_ == nullptr);
    return memory_.data;
  }
  // Bytes at rising offsets, from memory or from the disk: as PagedBlock's of these names.
  absl::Status Copy(std::span<const WantedBytes> wanted) const;
  absl::Status CopyOnce(std::span<const WantedBytes> wanted) const;
  // On the disk, read in pieces; null: all of it is in memory.
  PagedBlock* paged() const { return paged_; }
  // Tells blocks apart: contexts that share one share its memory, or its place on the disk.
  const void* place() const {
    return paged_ == nullptr ? static_cast<const void*>(memory_.data) : paged_;
  }
  std::byte* writable() { return memory_.data; }
  uint64_t bytes() const { return memory_.bytes; }
  const ArenaSlot& memory() const { return memory_; }
  BlockHandle handle() const { return handle_; }
  const BlockOrigin& origin() const { return origin_; }

  bool published() const { return published_.load(std::memory_order_acquire); }
  // Published, and neither purged nor found broken since.
  bool stands() const { return published() && store_.IsPublished(handle_); }
  // Of a published block.
  const BlockId& id() const { return id_; }
  const ByteDigest& digest() const { return digest_; }

 private:
  void CopyFromMemory(std::span<const WantedBytes> wanted) const;

  BlockStore& store_;
  const BlockHandle handle_;
  const ArenaSlot memory_;
  PagedBlock* const paged_;  // the store's, while it is leased
  const BlockOrigin origin_;

  absl::Mutex mutex_;  // never taken by an attend
  std::shared_ptr<HeldBlock> winner_ ABSL_GUARDED_BY(mutex_);
  // Written once under mutex_ before published_ is set.
  BlockId id_;
  ByteDigest digest_;
  std::atomic<bool> published_{false};
  std::atomic<bool> verified_{false};
};

}  // namespace quarry

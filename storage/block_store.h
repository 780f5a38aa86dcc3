// The RAM tier: blocks by their life-cycle table, found by id, kept by leases and pins, evicted
// leaf first.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/kv_types.h"
#include "proto/types.h"
#include "storage/arena.h"
#include "storage/block_key.h"
#include "storage/block_state.h"
#include "storage/disk_tier_stats.h"
#include "storage/eviction_options.h"

namespace quarry {

class PagedBlock;

// A block's slot in the table and the generation it was handed out at: stale handles are refused.
struct BlockHandle {
  uint32_t slot = 0;
  uint32_t generation = 0;
  friend bool operator==(const BlockHandle&, const BlockHandle&) = default;
};

struct BlockPlace {
  uint64_t bytes = 0;
  bool in_ram = false;  // else on the disk
};

struct BlockView {
  BlockHandle handle;
  BlockId id;
  std::string_view tenant;  // lives as long as the store
  ArenaSlot memory;         // of a paged block: none
  ByteDigest digest;              // of a SEALED or PUBLISHED block
  BlockState state = BlockState::kEmpty;
  // What is read from the disk in pieces; null: all of it is in memory.
  PagedBlock* paged = nullptr;
};

// A block and the whole of its key.
struct KeyedBlock {
  BlockView view;
  BlockKey key;
};

struct BlockStoreStats {
  uint64_t blocks = 0, published = 0, leased = 0, pinned = 0;
  uint64_t bytes = 0, reserved_bytes = 0;
  uint64_t hits = 0, misses = 0, evictions = 0, ghost_hits = 0, refused = 0;
  uint64_t digest_failures = 0, duplicate_publishes = 0;
  ArenaStats arena;
  std::optional<DiskTierStats> disk;
};

struct BlockInfo {
  BlockId id, parent;
  std::string tenant;
  NamespaceDigest name_space;
  uint64_t bytes = 0;
  BlockState state = BlockState::kEmpty;
  uint32_t leases = 0;
  std::vector<std::string> pins;
  uint32_t children = 0;
  bool in_ram = false, on_disk = false;
};

struct BlockStoreOptions {
  ArenaOptions arena;
  EvictionOptions eviction;
  uint64_t max_pinned_bytes_per_tenant = 1ull << 30;
  uint32_t max_pins_per_tenant = 4096;
  std::function<absl::Time()> now = absl::Now;  // ends pins; tests inject a clock
};

// Thread-safe. A lease guards memory and counts references; the store does not know sessions. Calls
// with a handle need a lease of the caller's; a stale handle is FailedPrecondition where there is a
// status, else a bug of ours. No call holds a lock while bytes are copied, digested or mapped.
class BlockStore {
 public:
  // InvalidArgument names the option and its value.
  static absl::StatusOr<std::unique_ptr<BlockStore>> Create(const BlockStoreOptions& options);
  virtual ~BlockStore() = default;

  // Sets aside memory for `count` blocks of `bytes` each, evicting unleased, unpinned blocks leaf
  // first, in the order of BlockStoreOptions::eviction: blocks of the tenant's own in slots of this
  // size, or whole extents of others that have not been used for longer. What it sets aside is
  // memory, so Begin cannot fail. ResourceExhausted (with wanted, capacity, leased and pinned
  // counts) where no eviction could make enough room: nothing is set aside then and nothing
  // evicted. Unused reservations go back with Unreserve. Cost: O(log blocks) per block evicted; new
  // extents are pre-faulted here (up to seconds per GiB).
  virtual absl::Status Reserve(std::string_view tenant, uint64_t bytes, uint32_t count) = 0;
  virtual void Unreserve(std::string_view tenant, uint64_t bytes, uint32_t count) = 0;

  // EMPTY -> WRITING, from a reservation; one lease is the caller's. Memory is not zeroed: it may
  // hold older bytes of the same tenant, never another's.
  virtual absl::StatusOr<BlockView> Begin(std::string_view tenant, uint64_t bytes) = 0;
  // WRITING -> SEALED (digest: given, or computed over the bytes) -> PUBLISHED under key. If the
  // id is published already, the earlier block wins: its view is returned with a lease for the
  // caller, the given block is RETIRING until the caller releases it too, and `existed` is set.
  // AlreadyExists: the id is published under another full_key, parent or namespace; the given
  // block is RETIRING too.
  virtual absl::StatusOr<BlockView> Publish(BlockHandle block, BlockKey key,
                                            std::optional<ByteDigest> digest, bool* existed) = 0;

  // PUBLISHED blocks only; the lease is the caller's. NotFound = miss (also when full_key, parent,
  // namespace or tenant differ).
  virtual absl::StatusOr<BlockView> Acquire(std::string_view tenant, const BlockKey& key) = 0;
  // The same by the id alone, for one that is in RAM. Not a use, for the order of eviction, but by
  // the end of its lease.
  virtual absl::StatusOr<KeyedBlock> AcquireInRam(std::string_view tenant, const BlockId& id) = 0;
  // A block that the disk has, without bringing it into RAM: view.paged has its pages. The lease
  // keeps it on the disk. NotFound = miss; FailedPrecondition: there are no pages of the disk.
  virtual absl::StatusOr<BlockView> AcquirePaged(std::string_view tenant, const BlockKey& key) = 0;
  // Room for pages of such blocks; 0: there are none.
  virtual uint64_t page_bytes() const = 0;
  // The disk has a copy of the block, read at about this rate; none: it has not. For who weighs
  // what a miss costs, from the end of the caller's lease on.
  virtual void NoteDiskCopy(BlockHandle block, std::optional<double> bytes_per_s) = 0;
  // One more lease of a block that the caller has a lease of.
  virtual void Retain(BlockHandle block) = 0;
  // The last lease of a block that is not PUBLISHED frees it.
  virtual void Release(BlockHandle block) = 0;
  // Where the block is that Acquire would find; reads nothing, so what is on the disk is known by
  // its id alone.
  virtual std::optional<BlockPlace> Locate(std::string_view tenant, const BlockKey& key) const = 0;
  bool Contains(std::string_view tenant, const BlockKey& key) const {
    return Locate(tenant, key).has_value();
  }
  // How long it is expected to take until so many bytes on the disk are in RAM, by what it took
  // before.
  virtual absl::Duration ExpectedLoad(uint64_t bytes) const = 0;

  // Copies bytes [offset, offset + out.size()) and checks the digest of the whole block in the same
  // pass. DataLoss: the block is retired, counted and logged (id, place, both digests); the caller
  // treats it as a miss and does not use `out`. Not of paged blocks: their views have what reads
  // them.
  virtual absl::Status CopyOut(BlockHandle block, uint64_t offset, std::span<std::byte> out) = 0;

  // A pin is retention: named, owned by a tenant, of published blocks of that tenant, until
  // `expires`. A name set again replaces its earlier pin. Blocks count once per tenant against
  // max_pinned_bytes_per_tenant; ResourceExhausted, and NotFound for a block that is not there,
  // change nothing.
  virtual absl::Status Pin(std::string_view tenant, std::string_view name,
                           std::span<const BlockId> blocks, absl::Time expires) = 0;
  virtual absl::Status Unpin(std::string_view tenant, std::string_view name) = 0;
  // Retires matching published blocks, pinned or not; leased ones vanish from lookup at once and
  // free with their last lease. No blocks named: all of the tenant, or of its namespace. Returns
  // the number retired; blocks published meanwhile may stay. An error: nobody finds them now, but
  // the disk may bring them back after a restart.
  virtual absl::StatusOr<uint64_t> Purge(std::string_view tenant,
                                         std::optional<NamespaceDigest> name_space,
                                         std::span<const BlockId> blocks) = 0;

  // Hands what is in RAM alone to the disk and says how far that is, without waiting: ask again
  // until nothing is pending. nullopt: all of the tenant that are in RAM. FailedPrecondition:
  // there is no disk.
  virtual absl::StatusOr<FlushResult> Flush(std::string_view tenant,
                                            std::optional<std::span<const BlockId>> blocks) = 0;

  // Whether it can be found; false once it is retired, and of a stale handle. Needs no lease.
  virtual bool IsPublished(BlockHandle block) const = 0;
  // Bytes of those of the distinct `blocks` that are published.
  virtual uint64_t PublishedBytes(std::string_view tenant,
                                  std::span<const BlockId> blocks) const = 0;
  // Published blocks of all tiers, at most `limit`; not one moment's when others publish meanwhile.
  virtual std::vector<BlockInfo> List(std::string_view tenant, uint32_t limit) const = 0;
  virtual BlockStoreStats Stats() const = 0;
  virtual const Arena& arena() const = 0;
};

}  // namespace quarry

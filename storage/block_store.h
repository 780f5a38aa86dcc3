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
#include "proto/types.h"
#include "storage/arena.h"
#include "storage/block_state.h"

namespace quarry {

// A block's slot in the table and the generation it was handed out at: stale handles are refused.
struct BlockHandle {
  uint32_t slot = 0;
  uint32_t generation = 0;
  friend bool operator==(const BlockHandle&, const BlockHandle&) = default;
};

struct BlockKey {
  BlockId id;
  BlockId parent;                 // all zero: a root, or an engine's block
  NamespaceDigest name_space;
  std::string full_key;           // what was hashed, compared on every find: collisions are misses
};

struct BlockView {
  BlockHandle handle;
  BlockId id;
  ArenaSlot memory;
  ByteDigest digest;              // of a SEALED or PUBLISHED block
  BlockState state = BlockState::kEmpty;
};

struct BlockStoreStats {
  uint64_t blocks = 0, published = 0, leased = 0, pinned = 0;
  uint64_t bytes = 0, reserved_bytes = 0;
  uint64_t hits = 0, misses = 0, evictions = 0, refused = 0;
  uint64_t digest_failures = 0, duplicate_publishes = 0;
  ArenaStats arena;
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
};

struct BlockStoreOptions {
  ArenaOptions arena;
  uint64_t max_pinned_bytes_per_tenant = 1ull << 30;
  std::function<absl::Time()> now = absl::Now;  // ends pins; tests inject a clock
};

// Thread-safe. A lease guards memory and counts references; the store does not know sessions.
class BlockStore {
 public:
  static absl::StatusOr<std::unique_ptr<BlockStore>> Create(const BlockStoreOptions& options);
  virtual ~BlockStore() = default;

  // Sets aside memory for `count` blocks of `bytes` each, evicting unleased, unpinned blocks leaf
  // first. ResourceExhausted (with wanted, capacity, leased and pinned counts) sets nothing aside;
  // nothing is evicted either where no eviction could have made enough room.
  // Unused reservations go back with Unreserve.
  virtual absl::Status Reserve(std::string_view tenant, uint64_t bytes, uint32_t count) = 0;
  virtual void Unreserve(std::string_view tenant, uint64_t bytes, uint32_t count) = 0;

  // EMPTY -> WRITING, from a reservation; one lease is the caller's. Memory is not zeroed.
  virtual absl::StatusOr<BlockView> Begin(std::string_view tenant, uint64_t bytes) = 0;
  // WRITING -> SEALED (digest: given, or computed over the bytes) -> PUBLISHED under key. If the
  // id is published already, the earlier block wins: its view is returned with a lease for the
  // caller, the given block is RETIRING until the caller releases it too, and `existed` is set.
  virtual absl::StatusOr<BlockView> Publish(BlockHandle block, BlockKey key,
                                            std::optional<ByteDigest> digest, bool* existed) = 0;

  // PUBLISHED blocks only; the lease is the caller's. NotFound = miss (also when full_key or
  // tenant differ).
  virtual absl::StatusOr<BlockView> Acquire(std::string_view tenant, const BlockKey& key) = 0;
  virtual void AddLease(BlockHandle block) = 0;
  // The last lease of a WRITING block frees it.
  virtual void Release(BlockHandle block) = 0;
  virtual bool Contains(std::string_view tenant, const BlockKey& key) const = 0;

  // Copies out and checks the digest in the same pass. DataLoss: the block is retired, counted
  // and logged (id, offset, both digests); the caller treats it as a miss.
  virtual absl::Status CopyOut(BlockHandle block, uint64_t offset, std::span<std::byte> out) = 0;

  // A pin is retention: named, owned by a tenant, counted against max_pinned_bytes.
  virtual absl::Status Pin(std::string_view tenant, std::string_view name,
                           std::span<const BlockId> blocks, absl::Time expires) = 0;
  virtual absl::Status Unpin(std::string_view tenant, std::string_view name) = 0;
  // Retires matching published blocks, pinned or not; leased ones vanish from lookup at once and
  // free with their last lease. Returns the number retired.
  virtual uint64_t Purge(std::string_view tenant, std::optional<NamespaceDigest> name_space,
                         std::span<const BlockId> blocks) = 0;

  virtual std::vector<BlockInfo> List(std::string_view tenant, uint32_t limit) const = 0;
  virtual BlockStoreStats Stats() const = 0;
  virtual const Arena& arena() const = 0;
};

}  // namespace quarry

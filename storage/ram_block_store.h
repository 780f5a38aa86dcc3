// The block store over one arena: what block_store.h promises, under one lock.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "storage/arena.h"
#include "storage/block_records.h"
#include "storage/block_store.h"
#include "storage/eviction_order.h"
#include "storage/extent_return.h"
#include "storage/pin_table.h"

namespace quarry {

class RamBlockStore final : public BlockStore {
 public:
  RamBlockStore(const BlockStoreOptions& options, std::unique_ptr<Arena> arena);

  absl::Status Reserve(std::string_view tenant, uint64_t bytes, uint32_t count) override;
  void Unreserve(std::string_view tenant, uint64_t bytes, uint32_t count) override;
  absl::StatusOr<BlockView> Begin(std::string_view tenant, uint64_t bytes) override;
  absl::StatusOr<BlockView> Publish(BlockHandle block, BlockKey key,
                                    std::optional<ByteDigest> digest, bool* existed) override;
  absl::StatusOr<BlockView> Acquire(std::string_view tenant, const BlockKey& key) override;
  absl::StatusOr<KeyedBlock> AcquireInRam(std::string_view tenant, const BlockId& id) override;
  absl::StatusOr<BlockView> AcquirePaged(std::string_view, const BlockKey&) override {
    return absl::FailedPreconditionError("there is no disk");
  }
  uint64_t page_bytes() const override { return 0; }
  void NoteDiskCopy(BlockHandle block, std::optional<double> bytes_per_s) override;
  void Retain(BlockHandle block) override;
  void Release(BlockHandle block) override;
  std::optional<BlockPlace> Locate(std::string_view tenant, const BlockKey& key) const override;
  absl::Duration ExpectedLoad(uint64_t) const override { return absl::ZeroDuration(); }
  absl::Status CopyOut(BlockHandle block, uint64_t offset, std::span<std::byte> out) override;
  absl::Status Pin(std::string_view tenant, std::string_view name, std::span<const BlockId> blocks,
                   absl::Time expires) override;
  absl::Status Unpin(std::string_view tenant, std::string_view name) override;
  absl::StatusOr<uint64_t> Purge(std::string_view tenant, std::optional<NamespaceDigest> name_space,
                                 std::span<const BlockId> blocks) override;
  absl::StatusOr<FlushResult> Flush(std::string_view tenant,
                                    std::optional<std::span<const BlockId>> blocks) override;
  bool IsPublished(BlockHandle block) const override;
  uint64_t PublishedBytes(std::string_view tenant, std::span<const BlockId> blocks) const override;
  std::vector<BlockInfo> List(std::string_view tenant, uint32_t limit) const override;
  BlockStoreStats Stats() const override;
  const Arena& arena() const override { return *arena_; }

 private:
  using Pool = std::pair<TenantName, uint64_t>;  // reserved slots by tenant and bytes asked

  struct FreedSlot {
    TenantName tenant = nullptr;
    ArenaSlot memory;
  };
  // A reservation on its way: slots it has, extents that others gave up for it, and the room it
  // claimed for new ones.
  struct Reservation {
    TenantName tenant = nullptr;
    uint64_t bytes = 0;
    uint32_t count = 0;
    SlotClass slot_class;
    std::vector<ArenaSlot> slots;
    EmptyExtents emptied;
    std::optional<ArenaClaim> claim;
  };

  // reservations.cc
  absl::Status TakeRoom(Reservation* wanted) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool CouldMake(uint64_t slots, const ArenaSupply& supply, const SlotClass& slot_class) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void MakeRoom(Reservation* wanted) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void TakeSlot(Reservation* wanted, ArenaSlot slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status BuildClaim(Reservation* wanted) ABSL_LOCKS_EXCLUDED(mutex_);
  void EvictColdest(const SlotClass& slot_class, bool extents_help, std::vector<FreedSlot>* freed)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EvictFamily(uint32_t block, std::vector<FreedSlot>* freed)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Waits until another call has mapped or unmapped memory.
  void AwaitMemory() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Refuse(uint64_t bytes, uint32_t count) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FreeSlots(std::span<const FreedSlot> freed, EmptyExtents* emptied)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Extents that became empty go back to the system, on the returning thread.
  void GiveBack(EmptyExtents emptied);

  // block_store.cc
  absl::StatusOr<BlockView> PublishDigested(BlockHandle block, BlockKey key,
                                            const ByteDigest& digest, bool* existed);
  absl::Status RetireBroken(BlockHandle block, const ByteDigest& actual);
  absl::Status CheckHandle(BlockHandle block) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  uint32_t Find(std::string_view tenant, const BlockKey& key) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  BlockView ViewOf(uint32_t block) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  BlockInfo InfoOf(uint32_t block) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Lease(uint32_t block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // PUBLISHED -> RETIRING: gone from look-up at once, freed now or with the last lease.
  void Retire(uint32_t block, std::vector<FreedSlot>* freed) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FreeRetired(uint32_t block, std::vector<FreedSlot>* freed)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CountPins(TenantName tenant, const PinTable::Change& change)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ExpirePins() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const BlockStoreOptions options_;
  const std::unique_ptr<Arena> arena_;

  // Never held while bytes are copied or digested, nor while memory is mapped or unmapped.
  mutable absl::Mutex mutex_;
  TenantNames tenants_ ABSL_GUARDED_BY(mutex_);
  BlockRecords records_ ABSL_GUARDED_BY(mutex_);
  EvictionOrder order_ ABSL_GUARDED_BY(mutex_);
  PinTable pins_ ABSL_GUARDED_BY(mutex_);
  std::map<Pool, std::vector<ArenaSlot>> reserved_ ABSL_GUARDED_BY(mutex_);
  std::set<SlotClass> growing_ ABSL_GUARDED_BY(mutex_);  // new extents are on their way
  uint64_t memory_changes_ ABSL_GUARDED_BY(mutex_) = 0;  // extents made or unmapped

  uint64_t live_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t live_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t reserved_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t leased_ ABSL_GUARDED_BY(mutex_) = 0;  // published and leased
  uint64_t pinned_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t hits_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t misses_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t evictions_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t refused_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t digest_failures_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t duplicate_publishes_ ABSL_GUARDED_BY(mutex_) = 0;

  ExtentReturn extent_return_;  // last: its thread uses the arena and the lock
};

}  // namespace quarry

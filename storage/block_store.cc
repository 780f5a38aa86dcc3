#include "storage/block_store.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include <spdlog/spdlog.h>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "proto/byte_digest.h"
#include "proto/check.h"
#include "proto/status_macros.h"
#include "storage/pin_table.h"

namespace quarry {
namespace {

constexpr uint32_t kNoSlot = ~0u;

struct Block {
  BlockState state = BlockState::kEmpty;
  uint32_t generation = 1;
  std::string tenant;
  ArenaSlot memory;
  BlockKey key;
  ByteDigest digest;
  uint32_t leases = 0;
  uint32_t pins = 0;
  uint32_t children = 0;            // published blocks that name this one as their parent
  uint32_t parent_slot = kNoSlot;   // of a published parent; its children count holds it here
  uint64_t last_used = 0;           // tick; its place in the eviction order while evictable
};

class RamBlockStore final : public BlockStore {
 public:
  RamBlockStore(const BlockStoreOptions& options, std::unique_ptr<Arena> arena)
      : options_(options), arena_(std::move(arena)), pins_(options.max_pinned_bytes_per_tenant) {}

  absl::Status Reserve(std::string_view tenant, uint64_t bytes, uint32_t count) override {
    std::vector<ArenaSlot> taken;
    bool worth_evicting = false;
    while (taken.size() < count) {
      absl::StatusOr<ArenaSlot> slot = arena_->Allocate(tenant, bytes);
      if (slot.ok()) {
        taken.push_back(*slot);
        continue;
      }
      if (absl::IsResourceExhausted(slot.status())) {
        worth_evicting = worth_evicting || EvictionCouldFree(bytes * (count - taken.size()));
        if (worth_evicting && EvictOne()) continue;
      }
      for (const ArenaSlot& s : taken) arena_->Free(s);
      absl::MutexLock lock(&mutex_);
      ++refused_;
      return Refusal(slot.status(), bytes, count);
    }
    absl::MutexLock lock(&mutex_);
    std::vector<ArenaSlot>& pool = reserved_[{std::string(tenant), bytes}];
    pool.insert(pool.end(), taken.begin(), taken.end());
    reserved_bytes_ += bytes * count;
    return absl::OkStatus();
  }

  void Unreserve(std::string_view tenant, uint64_t bytes, uint32_t count) override {
    std::vector<ArenaSlot> returned;
    {
      absl::MutexLock lock(&mutex_);
      auto it = reserved_.find({std::string(tenant), bytes});
      QUARRY_CHECK(count == 0 || (it != reserved_.end() && it->second.size() >= count));
      for (uint32_t i = 0; i < count; ++i) {
        returned.push_back(it->second.back());
        it->second.pop_back();
      }
      if (it != reserved_.end() && it->second.empty()) reserved_.erase(it);
      reserved_bytes_ -= bytes * count;
    }
    for (const ArenaSlot& slot : returned) arena_->Free(slot);
  }

  absl::StatusOr<BlockView> Begin(std::string_view tenant, uint64_t bytes) override {
    absl::MutexLock lock(&mutex_);
    auto it = reserved_.find({std::string(tenant), bytes});
    if (it == reserved_.end()) {
      return absl::FailedPreconditionError(
          absl::StrCat("no block of ", bytes, " bytes is reserved for tenant ", std::string(tenant)));
    }
    uint32_t slot = NewSlot();
    Block& b = blocks_[slot];
    b.memory = it->second.back();
    it->second.pop_back();
    if (it->second.empty()) reserved_.erase(it);
    reserved_bytes_ -= bytes;
    b.tenant = std::string(tenant);
    b.leases = 1;
    Move(&b, BlockState::kWriting);
    ++live_;
    live_bytes_ += bytes;
    return View(slot);
  }

  absl::StatusOr<BlockView> Publish(BlockHandle handle, BlockKey key,
                                    std::optional<ByteDigest> digest, bool* existed) override {
    *existed = false;
    ArenaSlot memory;
    {
      absl::MutexLock lock(&mutex_);
      Block& b = Checked(handle);
      if (b.state != BlockState::kWriting) {
        return absl::FailedPreconditionError(absl::StrCat("block ", key.id.Hex(), " is ",
                                                          Name(b.state), ", not WRITING"));
      }
      memory = b.memory;
    }
    // The caller's lease holds the bytes; nobody else can find them yet.
    if (!digest) digest = DigestOf({memory.data, memory.bytes});
    return PublishLocked(handle, std::move(key), *digest, existed);
  }

  absl::StatusOr<BlockView> Acquire(std::string_view tenant, const BlockKey& key) override {
    absl::MutexLock lock(&mutex_);
    uint32_t slot = Find(tenant, key);
    if (slot == kNoSlot) {
      ++misses_;
      return absl::NotFoundError(absl::StrCat("block ", key.id.Hex(), " is not cached"));
    }
    ++hits_;
    Lease(slot);
    return View(slot);
  }

  void AddLease(BlockHandle block) override {
    absl::MutexLock lock(&mutex_);
    QUARRY_CHECK(Checked(block).leases > 0);
    Lease(block.slot);
  }

  void Release(BlockHandle block) override {
    std::vector<ArenaSlot> freed;
    {
      absl::MutexLock lock(&mutex_);
      ReleaseLocked(block.slot, &Checked(block), &freed);
    }
    for (const ArenaSlot& slot : freed) arena_->Free(slot);
  }

  bool Contains(std::string_view tenant, const BlockKey& key) const override {
    absl::MutexLock lock(&mutex_);
    return Find(tenant, key) != kNoSlot;
  }

  absl::Status CopyOut(BlockHandle handle, uint64_t offset, std::span<std::byte> out) override {
    ArenaSlot memory;
    ByteDigest expected;
    {
      absl::MutexLock lock(&mutex_);
      const Block& b = Checked(handle);
      QUARRY_CHECK(b.leases > 0);
      if (b.digest == ByteDigest{} && b.state == BlockState::kWriting) {
        return absl::FailedPreconditionError("a block being written has no digest to check");
      }
      memory = b.memory;
      expected = b.digest;
    }
    if (offset > memory.bytes || out.size() > memory.bytes - offset) {
      return absl::InvalidArgumentError(absl::StrCat("bytes [", offset, ", ", offset + out.size(),
                                                     ") of a block of ", memory.bytes));
    }
    // The digest is of the whole block: what lies around the copied part is digested in place.
    StreamingDigest digest;
    digest.Update({memory.data, offset});
    digest.CopyAndUpdate(out.data(), memory.data + offset, out.size());
    digest.Update({memory.data + offset + out.size(), memory.bytes - offset - out.size()});
    ByteDigest actual = digest.Finish();
    if (actual == expected) return absl::OkStatus();
    return DigestFailed(handle, expected, actual);
  }

  absl::Status Pin(std::string_view tenant, std::string_view name, std::span<const BlockId> blocks,
                   absl::Time expires) override {
    if (name.empty()) return absl::InvalidArgumentError("a pin needs a name");
    absl::MutexLock lock(&mutex_);
    ExpirePins();
    std::vector<std::pair<BlockId, uint64_t>> wanted;
    const std::set<BlockId> distinct(blocks.begin(), blocks.end());
    for (const BlockId& id : distinct) {
      auto it = by_id_.find(id);
      if (it == by_id_.end() || blocks_[it->second].tenant != tenant) {
        return absl::NotFoundError(absl::StrCat("pin ", std::string(name), ": block ", id.Hex(),
                                                " is not cached"));
      }
      wanted.emplace_back(id, blocks_[it->second].memory.bytes);
    }
    QUARRY_ASSIGN_OR_RETURN(std::vector<BlockId> dropped,
                            pins_.Set(tenant, name, wanted, expires));
    for (const BlockId& id : distinct) CountPin(id, +1);
    for (const BlockId& id : dropped) CountPin(id, -1);
    return absl::OkStatus();
  }

  absl::Status Unpin(std::string_view tenant, std::string_view name) override {
    absl::MutexLock lock(&mutex_);
    ExpirePins();
    QUARRY_ASSIGN_OR_RETURN(std::vector<BlockId> dropped, pins_.Remove(tenant, name));
    for (const BlockId& id : dropped) CountPin(id, -1);
    return absl::OkStatus();
  }

  uint64_t Purge(std::string_view tenant, std::optional<NamespaceDigest> name_space,
                 std::span<const BlockId> ids) override {
    std::vector<ArenaSlot> freed;
    uint64_t retired = 0;
    {
      absl::MutexLock lock(&mutex_);
      std::set<BlockId> wanted(ids.begin(), ids.end());
      for (uint32_t slot = 0; slot < blocks_.size(); ++slot) {
        Block& b = blocks_[slot];
        if (b.state != BlockState::kPublished || b.tenant != tenant) continue;
        if (name_space && b.key.name_space != *name_space) continue;
        if (!ids.empty() && !wanted.contains(b.key.id)) continue;
        Retire(slot, &freed);
        ++retired;
      }
    }
    for (const ArenaSlot& slot : freed) arena_->Free(slot);
    return retired;
  }

  std::vector<BlockInfo> List(std::string_view tenant, uint32_t limit) const override {
    absl::MutexLock lock(&mutex_);
    std::vector<BlockInfo> out;
    for (const Block& b : blocks_) {
      if (out.size() == limit) break;
      if (b.state != BlockState::kPublished || b.tenant != tenant) continue;
      out.push_back({b.key.id, b.key.parent, b.tenant, b.key.name_space, b.memory.bytes, b.state,
                     b.leases, pins_.NamesOf(b.key.id), b.children});
    }
    return out;
  }

  BlockStoreStats Stats() const override {
    absl::MutexLock lock(&mutex_);
    BlockStoreStats s;
    s.blocks = live_;
    s.published = by_id_.size();
    s.bytes = live_bytes_;
    s.reserved_bytes = reserved_bytes_;
    s.hits = hits_;
    s.misses = misses_;
    s.evictions = evictions_;
    s.refused = refused_;
    s.digest_failures = digest_failures_;
    s.duplicate_publishes = duplicate_publishes_;
    s.leased = leased_blocks_;
    s.pinned = pinned_blocks_;
    s.arena = arena_->Stats();
    return s;
  }

  const Arena& arena() const override { return *arena_; }

 private:
  static std::string Name(BlockState s) { return std::string(BlockStateName(s)); }

  static void Move(Block* b, BlockState to) {
    QUARRY_CHECK(MayMove(b->state, to));
    b->state = to;
  }

  Block& Checked(BlockHandle handle) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    QUARRY_CHECK(handle.slot < blocks_.size() &&
                 blocks_[handle.slot].generation == handle.generation);
    return blocks_[handle.slot];
  }

  BlockView View(uint32_t slot) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const Block& b = blocks_[slot];
    return {{slot, b.generation}, b.key.id, b.memory, b.digest, b.state};
  }

  uint32_t NewSlot() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (free_slots_.empty()) {
      blocks_.emplace_back();
      return static_cast<uint32_t>(blocks_.size() - 1);
    }
    uint32_t slot = free_slots_.back();
    free_slots_.pop_back();
    uint32_t generation = blocks_[slot].generation + 1;
    Move(&blocks_[slot], BlockState::kEmpty);
    blocks_[slot] = Block{};
    blocks_[slot].generation = generation;
    return slot;
  }

  uint32_t Find(std::string_view tenant, const BlockKey& key) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    auto it = by_id_.find(key.id);
    if (it == by_id_.end()) return kNoSlot;
    const Block& b = blocks_[it->second];
    bool same = b.tenant == tenant && b.key.full_key == key.full_key && b.key.parent == key.parent &&
                b.key.name_space == key.name_space;
    return same ? it->second : kNoSlot;
  }

  // ---- Eviction order: published blocks that nothing holds, by last use.
  bool Evictable(const Block& b) const {
    return b.state == BlockState::kPublished && b.leases == 0 && b.pins == 0 && b.children == 0;
  }
  void LeaveOrder(uint32_t slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    order_.erase({blocks_[slot].last_used, slot});
  }
  void JoinOrderIfEvictable(uint32_t slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (Evictable(blocks_[slot])) order_.insert({blocks_[slot].last_used, slot});
  }

  void Lease(uint32_t slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    LeaveOrder(slot);
    if (blocks_[slot].leases++ == 0) ++leased_blocks_;
    blocks_[slot].last_used = ++tick_;
  }

  void ReleaseLocked(uint32_t slot, Block* b, std::vector<ArenaSlot>* freed)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    QUARRY_CHECK(b->leases > 0);
    if (--b->leases > 0) return;
    if (b->state == BlockState::kPublished) --leased_blocks_;
    b->last_used = ++tick_;
    if (b->state == BlockState::kWriting || b->state == BlockState::kSealed) {
      Move(b, BlockState::kRetiring);  // abandoned: nothing could have found it
    }
    if (b->state == BlockState::kRetiring) {
      FreeBlock(slot, freed);
    } else {
      JoinOrderIfEvictable(slot);
    }
  }

  void FreeBlock(uint32_t slot, std::vector<ArenaSlot>* freed)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    Block& b = blocks_[slot];
    Move(&b, BlockState::kFree);
    freed->push_back(b.memory);
    --live_;
    live_bytes_ -= b.memory.bytes;
    free_slots_.push_back(slot);
  }

  // PUBLISHED -> RETIRING: gone from look-up at once, freed with the last lease.
  void Retire(uint32_t slot, std::vector<ArenaSlot>* freed) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    Block& b = blocks_[slot];
    LeaveOrder(slot);
    by_id_.erase(b.key.id);
    if (b.parent_slot != kNoSlot) {
      uint32_t parent = std::exchange(b.parent_slot, kNoSlot);
      --blocks_[parent].children;
      JoinOrderIfEvictable(parent);
    }
    // Children that stay (a purge of single blocks) have no parent to hold any more.
    if (b.children > 0) {
      for (Block& child : blocks_) {
        if (child.state == BlockState::kPublished && child.parent_slot == slot) {
          child.parent_slot = kNoSlot;
        }
      }
      b.children = 0;
    }
    if (b.pins > 0) {
      pins_.Forget(b.key.id);
      b.pins = 0;
      --pinned_blocks_;
    }
    Move(&b, BlockState::kRetiring);
    if (b.leases > 0) {
      --leased_blocks_;
      return;
    }
    FreeBlock(slot, freed);
  }

  // Whether all blocks that nothing holds make up for `bytes`, free memory included.
  bool EvictionCouldFree(uint64_t bytes) {
    ArenaStats arena = arena_->Stats();
    absl::MutexLock lock(&mutex_);
    uint64_t room = arena.capacity_bytes - arena.used_bytes;
    for (const Block& b : blocks_) {
      if (b.state == BlockState::kPublished && b.leases == 0 && b.pins == 0) room += b.memory.bytes;
    }
    return room >= bytes;
  }

  bool EvictOne() {
    std::vector<ArenaSlot> freed;
    {
      absl::MutexLock lock(&mutex_);
      ExpirePins();
      if (order_.empty()) return false;
      Retire(order_.begin()->second, &freed);
      ++evictions_;
    }
    for (const ArenaSlot& slot : freed) arena_->Free(slot);
    return true;
  }

  absl::StatusOr<BlockView> PublishLocked(BlockHandle handle, BlockKey key, const ByteDigest& digest,
                                          bool* existed) {
    absl::MutexLock lock(&mutex_);
    Block& b = Checked(handle);
    if (b.state != BlockState::kWriting) {
      return absl::FailedPreconditionError(
          absl::StrCat("block ", key.id.Hex(), " is ", Name(b.state), ", not WRITING"));
    }
    b.digest = digest;
    Move(&b, BlockState::kSealed);
    auto earlier = by_id_.find(key.id);
    if (earlier != by_id_.end()) {
      uint32_t winner = Find(b.tenant, key);
      if (winner == kNoSlot) {
        // Two keys with one id: the bytes stay private and are never found.
        return absl::DataLossError(absl::StrCat("block id ", key.id.Hex(), " names another key"));
      }
      *existed = true;
      ++duplicate_publishes_;
      Lease(winner);
      Move(&b, BlockState::kRetiring);
      return View(winner);
    }
    Move(&b, BlockState::kPublished);
    b.key = std::move(key);
    b.last_used = ++tick_;
    by_id_.emplace(b.key.id, handle.slot);
    ++leased_blocks_;  // the caller's lease
    auto parent = b.key.parent.IsZero() ? by_id_.end() : by_id_.find(b.key.parent);
    if (parent != by_id_.end() && blocks_[parent->second].tenant == b.tenant) {
      LeaveOrder(parent->second);
      b.parent_slot = parent->second;
      ++blocks_[parent->second].children;
    }
    return View(handle.slot);
  }

  absl::Status DigestFailed(BlockHandle handle, const ByteDigest& expected,
                            const ByteDigest& actual) {
    std::vector<ArenaSlot> freed;
    std::string id;
    {
      absl::MutexLock lock(&mutex_);
      Block& b = Checked(handle);
      ++digest_failures_;
      id = b.key.id.Hex();
      spdlog::error("digest mismatch block={} extent={} offset={} bytes={} "
                    "expected={:016x}{:016x} actual={:016x}{:016x}",
                    id, b.memory.extent, b.memory.offset, b.memory.bytes, expected.high,
                    expected.low, actual.high, actual.low);
      if (b.state == BlockState::kPublished) Retire(handle.slot, &freed);
    }
    for (const ArenaSlot& slot : freed) arena_->Free(slot);
    return absl::DataLossError(absl::StrCat("block ", id, " does not have its digest"));
  }

  void CountPin(const BlockId& id, int change) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    auto it = by_id_.find(id);
    if (it == by_id_.end()) return;
    Block& b = blocks_[it->second];
    LeaveOrder(it->second);
    if (change > 0 && b.pins++ == 0) ++pinned_blocks_;
    if (change < 0 && --b.pins == 0) --pinned_blocks_;
    JoinOrderIfEvictable(it->second);
  }

  void ExpirePins() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const BlockId& id : pins_.Expire(options_.now())) CountPin(id, -1);
  }

  absl::Status Refusal(const absl::Status& cause, uint64_t bytes, uint32_t count)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!absl::IsResourceExhausted(cause)) return cause;
    ArenaStats arena = arena_->Stats();
    return absl::ResourceExhaustedError(absl::StrCat(
        "the RAM tier is full: ", bytes * count, " bytes wanted (", count, " blocks of ", bytes,
        "), capacity ", arena.capacity_bytes, ", in use ", arena.used_bytes, " (", leased_blocks_,
        " leased and ", pinned_blocks_, " pinned blocks, ", reserved_bytes_, " bytes reserved)"));
  }

  const BlockStoreOptions options_;
  const std::unique_ptr<Arena> arena_;

  mutable absl::Mutex mutex_;  // never held while bytes are copied, digested or faulted in
  std::vector<Block> blocks_ ABSL_GUARDED_BY(mutex_);
  std::vector<uint32_t> free_slots_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<BlockId, uint32_t> by_id_ ABSL_GUARDED_BY(mutex_);  // published
  std::set<std::pair<uint64_t, uint32_t>> order_ ABSL_GUARDED_BY(mutex_);
  std::map<std::pair<std::string, uint64_t>, std::vector<ArenaSlot>> reserved_
      ABSL_GUARDED_BY(mutex_);
  PinTable pins_ ABSL_GUARDED_BY(mutex_);
  uint64_t tick_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t live_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t live_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t reserved_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t leased_blocks_ ABSL_GUARDED_BY(mutex_) = 0;  // published and leased
  uint64_t pinned_blocks_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t hits_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t misses_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t evictions_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t refused_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t digest_failures_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t duplicate_publishes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<BlockStore>> BlockStore::Create(const BlockStoreOptions& options) {
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Arena> arena, Arena::Create(options.arena));
  return std::make_unique<RamBlockStore>(options, std::move(arena));
}

}  // namespace quarry

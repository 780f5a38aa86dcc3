#include "storage/block_store.h"

#include <algorithm>

#include <spdlog/spdlog.h>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "proto/byte_digest.h"
#include "proto/check.h"
#include "proto/status_macros.h"
#include "storage/ram_block_store.h"

namespace quarry {
namespace {

// Blocks that one hold of the lock looks at when all are asked for.
constexpr uint32_t kScanBlocks = 4096;
constexpr size_t kMaxPinNameBytes = 256;
// They are looked up, with their ancestors, under the lock.
constexpr size_t kMaxPinnedIds = 1 << 16;

}  // namespace

RamBlockStore::RamBlockStore(const BlockStoreOptions& options, std::unique_ptr<Arena> arena)
    : options_(options),
      arena_(std::move(arena)),
      order_(records_, *arena_, EvictionPolicy::Create(options.eviction)),
      pins_({options.max_pinned_bytes_per_tenant, options.max_pins_per_tenant}),
      extent_return_([this](EmptyExtents emptied) {
        arena_->GiveBack(std::move(emptied));
        absl::MutexLock lock(&mutex_);
        ++memory_changes_;
      }) {}

absl::StatusOr<std::unique_ptr<BlockStore>> BlockStore::Create(const BlockStoreOptions& options) {
  const EvictionOptions& eviction = options.eviction;
  if (eviction.recompute_bytes_per_s == 0 || eviction.recompute_doubling_blocks == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("recompute_bytes_per_s = ", eviction.recompute_bytes_per_s,
                     ", recompute_doubling_blocks = ", eviction.recompute_doubling_blocks,
                     ": both must be above 0"));
  }
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Arena> arena, Arena::Create(options.arena));
  return std::make_unique<RamBlockStore>(options, std::move(arena));
}

// ---- Publishing.

absl::Status RamBlockStore::CheckHandle(BlockHandle block) const {
  if (records_.IsCurrent(block)) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("block handle ", block.slot, "/", block.generation, " is stale"));
}

absl::StatusOr<BlockView> RamBlockStore::Publish(BlockHandle block, BlockKey key,
                                                 std::optional<ByteDigest> digest,
                                                 bool* existed) {
  *existed = false;
  ArenaSlot memory;
  {
    absl::MutexLock lock(&mutex_);
    QUARRY_RETURN_IF_ERROR(CheckHandle(block));
    memory = records_.at(block.slot).memory;
  }
  // The caller's lease holds the bytes; nobody else can find them yet.
  if (!digest.has_value()) digest = DigestOf({memory.data, memory.bytes});
  return PublishDigested(block, std::move(key), *digest, existed);
}

absl::StatusOr<BlockView> RamBlockStore::PublishDigested(BlockHandle block, BlockKey key,
                                                         const ByteDigest& digest,
                                                         bool* existed) {
  absl::MutexLock lock(&mutex_);
  QUARRY_RETURN_IF_ERROR(CheckHandle(block));
  BlockRecord& record = records_.at(block.slot);
  if (record.state != BlockState::kWriting) {
    return absl::FailedPreconditionError(
        absl::StrCat("block to publish as ", key.id.Hex(), " is ",
                     std::string(BlockStateName(record.state)), ", not WRITING"));
  }
  record.digest = digest;
  records_.Move(block.slot, BlockState::kSealed);
  const uint32_t earlier = records_.Find(record.tenant, key.id);
  if (earlier != kNoBlock) {
    records_.Move(block.slot, BlockState::kRetiring);
    if (Find(*record.tenant, key) == kNoBlock) {
      return absl::AlreadyExistsError(
          absl::StrCat("block id ", key.id.Hex(), " names a block of another key"));
    }
    *existed = true;
    ++duplicate_publishes_;
    Lease(earlier);
    order_.Use(earlier);
    return ViewOf(earlier);
  }
  record.key = std::move(key);
  records_.Move(block.slot, BlockState::kPublished);
  records_.Insert(block.slot);
  order_.Admit(block.slot);
  order_.Update(record.parent);
  ++leased_;  // the caller's lease
  return ViewOf(block.slot);
}

// ---- Finding and leasing.

uint32_t RamBlockStore::Find(std::string_view tenant, const BlockKey& key) const {
  const TenantName owner = tenants_.Find(tenant);
  if (owner == nullptr) return kNoBlock;
  const uint32_t block = records_.Find(owner, key.id);
  if (block == kNoBlock) return kNoBlock;
  const BlockKey& found = records_.at(block).key;
  const bool same = found.full_key == key.full_key && found.parent == key.parent &&
                    found.name_space == key.name_space;
  return same ? block : kNoBlock;
}

absl::StatusOr<BlockView> RamBlockStore::Acquire(std::string_view tenant, const BlockKey& key) {
  absl::MutexLock lock(&mutex_);
  const uint32_t block = Find(tenant, key);
  if (block == kNoBlock) {
    ++misses_;
    return absl::NotFoundError(absl::StrCat("block ", key.id.Hex(), " is not cached"));
  }
  ++hits_;
  Lease(block);
  order_.Use(block);
  return ViewOf(block);
}

std::optional<BlockPlace> RamBlockStore::Locate(std::string_view tenant,
                                                const BlockKey& key) const {
  absl::MutexLock lock(&mutex_);
  const uint32_t block = Find(tenant, key);
  if (block == kNoBlock) return std::nullopt;
  return BlockPlace{records_.at(block).memory.bytes, true};
}

void RamBlockStore::Lease(uint32_t block) {
  BlockRecord& record = records_.at(block);
  if (record.leases++ == 0 && record.state == BlockState::kPublished) ++leased_;
  order_.Update(block);
}

absl::StatusOr<KeyedBlock> RamBlockStore::AcquireInRam(std::string_view tenant, const BlockId& id) {
  absl::MutexLock lock(&mutex_);
  const uint32_t block = records_.Find(tenants_.Find(tenant), id);
  if (block == kNoBlock) {
    return absl::NotFoundError(absl::StrCat("block ", id.Hex(), " is not in RAM"));
  }
  Lease(block);
  return KeyedBlock{ViewOf(block), records_.at(block).key};
}

void RamBlockStore::NoteDiskCopy(BlockHandle block, std::optional<double> bytes_per_s) {
  absl::MutexLock lock(&mutex_);
  QUARRY_CHECK(records_.IsCurrent(block) && records_.at(block.slot).leases > 0);
  records_.at(block.slot).load_bytes_per_s = bytes_per_s.value_or(0);
}

void RamBlockStore::Retain(BlockHandle block) {
  absl::MutexLock lock(&mutex_);
  QUARRY_CHECK(records_.IsCurrent(block) && records_.at(block.slot).leases > 0);
  ++records_.at(block.slot).leases;
}

void RamBlockStore::Release(BlockHandle block) {
  EmptyExtents emptied;
  {
    absl::MutexLock lock(&mutex_);
    QUARRY_CHECK(records_.IsCurrent(block));
    BlockRecord& record = records_.at(block.slot);
    QUARRY_CHECK(record.leases > 0);
    if (--record.leases > 0) return;
    if (record.state == BlockState::kPublished) {
      --leased_;
      order_.LetGo(block.slot);
      order_.Update(block.slot);
      return;
    }
    // Abandoned, lost to an earlier writer, or retired before: nobody can find it.
    if (record.state != BlockState::kRetiring) records_.Move(block.slot, BlockState::kRetiring);
    std::vector<FreedSlot> freed;
    FreeRetired(block.slot, &freed);
    FreeSlots(freed, &emptied);
  }
  GiveBack(std::move(emptied));
}

absl::Status RamBlockStore::CopyOut(BlockHandle block, uint64_t offset, std::span<std::byte> out) {
  ArenaSlot memory;
  ByteDigest expected;
  {
    absl::MutexLock lock(&mutex_);
    QUARRY_RETURN_IF_ERROR(CheckHandle(block));
    const BlockRecord& record = records_.at(block.slot);
    QUARRY_CHECK(record.leases > 0);
    if (record.state == BlockState::kWriting) {
      return absl::FailedPreconditionError("a block being written has no digest to check");
    }
    memory = record.memory;
    expected = record.digest;
  }
  if (offset > memory.bytes || out.size() > memory.bytes - offset) {
    return absl::InvalidArgumentError(absl::StrCat(out.size(), " bytes at offset ", offset,
                                                   " of a block of ", memory.bytes));
  }
  ByteDigest actual;
  if (out.size() == memory.bytes) {
    actual = CopyAndDigest(out.data(), memory.data, out.size());
  } else {
    StreamingDigest digest;
    digest.Update({memory.data, offset});
    digest.CopyAndUpdate(out.data(), memory.data + offset, out.size());
    const uint64_t end = offset + out.size();
    digest.Update({memory.data + end, memory.bytes - end});
    actual = digest.Finish();
  }
  return actual == expected ? absl::OkStatus() : RetireBroken(block, actual);
}

absl::Status RamBlockStore::RetireBroken(BlockHandle block, const ByteDigest& actual) {
  ArenaSlot memory;
  ByteDigest expected;
  std::string id;
  {
    absl::MutexLock lock(&mutex_);
    const BlockRecord& record = records_.at(block.slot);
    ++digest_failures_;
    memory = record.memory;
    expected = record.digest;
    id = record.key.id.Hex();
    std::vector<FreedSlot> freed;  // none: the caller holds a lease
    if (record.state == BlockState::kPublished) Retire(block.slot, &freed);
  }
  spdlog::error("block {} is broken: extent {} offset {} bytes {}, digest {}, expected {}", id,
                memory.extent, memory.offset, memory.bytes, HexOf(actual), HexOf(expected));
  return absl::DataLossError(absl::StrCat("block ", id, " of ", memory.bytes, " bytes has digest ",
                                          HexOf(actual), ", expected ", HexOf(expected)));
}

BlockView RamBlockStore::ViewOf(uint32_t block) const {
  const BlockRecord& record = records_.at(block);
  return {records_.HandleOf(block),
          record.key.id,
          *record.tenant,
          record.memory,
          record.digest,
          record.state};
}

// ---- Retiring.

void RamBlockStore::Retire(uint32_t block, std::vector<FreedSlot>* freed) {
  BlockRecord& record = records_.at(block);
  const uint32_t parent = records_.Remove(block);
  if (record.pinned) {
    pins_.Forget(record.tenant, record.key.id);
    record.pinned = false;
    --pinned_;
  }
  records_.Move(block, BlockState::kRetiring);
  order_.Update(block);
  order_.Retire(block);
  order_.Update(parent);
  if (record.leases > 0) {
    --leased_;
  } else {
    FreeRetired(block, freed);
  }
}

void RamBlockStore::FreeRetired(uint32_t block, std::vector<FreedSlot>* freed) {
  const BlockRecord& record = records_.at(block);
  --live_;
  live_bytes_ -= record.memory.bytes;
  order_.Vacate(record.memory);
  freed->push_back({record.tenant, record.memory});
  records_.Free(block);
}

absl::StatusOr<uint64_t> RamBlockStore::Purge(std::string_view tenant,
                                              std::optional<NamespaceDigest> name_space,
                                              std::span<const BlockId> blocks) {
  uint64_t retired = 0;
  EmptyExtents emptied;
  std::vector<FreedSlot> freed;
  auto retire = [&](uint32_t block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (name_space.has_value() && records_.at(block).key.name_space != *name_space) return;
    Retire(block, &freed);
    ++retired;
  };
  for (size_t i = 0; i < blocks.size();) {
    absl::MutexLock lock(&mutex_);
    for (const size_t end = std::min(blocks.size(), i + kScanBlocks); i < end; ++i) {
      const uint32_t block = records_.Find(tenants_.Find(tenant), blocks[i]);
      if (block != kNoBlock) retire(block);
    }
    FreeSlots(freed, &emptied);
    freed.clear();
  }
  for (uint32_t i = 0, all = ~0u; blocks.empty() && i < all;) {
    absl::MutexLock lock(&mutex_);
    const TenantName owner = tenants_.Find(tenant);
    all = records_.size();
    for (const uint32_t end = std::min(all, i + kScanBlocks); i < end; ++i) {
      const BlockRecord& record = records_.at(i);
      if (record.state == BlockState::kPublished && record.tenant == owner) retire(i);
    }
    FreeSlots(freed, &emptied);
    freed.clear();
  }
  GiveBack(std::move(emptied));
  return retired;
}

// ---- Pins.

absl::Status RamBlockStore::Pin(std::string_view tenant, std::string_view name,
                                std::span<const BlockId> blocks, absl::Time expires) {
  if (name.empty() || name.size() > kMaxPinNameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("pin name of ", name.size(), " bytes; 1 to ",
                                                   kMaxPinNameBytes, " are allowed"));
  }
  if (blocks.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("pin ", std::string(name), " names no block"));
  }
  if (blocks.size() > kMaxPinnedIds) {
    return absl::InvalidArgumentError(absl::StrCat("pin ", std::string(name), " names ",
                                                   blocks.size(), " blocks; at most ",
                                                   kMaxPinnedIds, " are allowed"));
  }
  absl::MutexLock lock(&mutex_);
  ExpirePins();
  const TenantName owner = tenants_.Find(tenant);
  std::vector<PinTable::SizedBlock> wanted;
  absl::flat_hash_set<BlockId> distinct;
  for (const BlockId& id : blocks) {
    const uint32_t block = records_.Find(owner, id);
    if (block == kNoBlock) {
      return absl::NotFoundError(
          absl::StrCat("pin ", std::string(name), ": block ", id.Hex(), " is not cached"));
    }
    // A block keeps its ancestors: they count, or a pin of leaves would hold the arena for nothing.
    for (uint32_t b = block; b != kNoBlock; b = records_.at(b).parent) {
      if (!distinct.insert(records_.at(b).key.id).second) break;
      wanted.push_back({records_.at(b).key.id, records_.at(b).memory.bytes});
    }
  }
  QUARRY_ASSIGN_OR_RETURN(const PinTable::Change change, pins_.Set(owner, name, wanted, expires));
  CountPins(owner, change);
  return absl::OkStatus();
}

absl::Status RamBlockStore::Unpin(std::string_view tenant, std::string_view name) {
  absl::MutexLock lock(&mutex_);
  ExpirePins();
  const TenantName owner = tenants_.Find(tenant);
  QUARRY_ASSIGN_OR_RETURN(const PinTable::Change change, pins_.Remove(owner, name));
  CountPins(owner, change);
  return absl::OkStatus();
}

void RamBlockStore::CountPins(TenantName tenant, const PinTable::Change& change) {
  for (const bool gained : {true, false}) {
    for (const BlockId& id : gained ? change.gained : change.lost) {
      const uint32_t block = records_.Find(tenant, id);
      QUARRY_CHECK(block != kNoBlock);
      records_.at(block).pinned = gained;
      order_.Update(block);
    }
  }
  pinned_ += change.gained.size();
  pinned_ -= change.lost.size();
}

void RamBlockStore::ExpirePins() {
  const absl::Time now = options_.now();
  TenantName tenant = nullptr;
  PinTable::Change change;
  while (pins_.RemoveOneExpired(now, &tenant, &change)) CountPins(tenant, change);
}

// ---- What there is.

absl::StatusOr<FlushResult> RamBlockStore::Flush(std::string_view,
                                                 std::optional<std::span<const BlockId>>) {
  return absl::FailedPreconditionError("there is no disk that blocks could be durable on");
}

bool RamBlockStore::IsPublished(BlockHandle block) const {
  absl::MutexLock lock(&mutex_);
  return records_.IsCurrent(block) && records_.at(block.slot).state == BlockState::kPublished;
}

uint64_t RamBlockStore::PublishedBytes(std::string_view tenant,
                                       std::span<const BlockId> blocks) const {
  const absl::flat_hash_set<BlockId> distinct(blocks.begin(), blocks.end());
  uint64_t bytes = 0;
  absl::MutexLock lock(&mutex_);
  const TenantName owner = tenants_.Find(tenant);
  for (const BlockId& id : distinct) {
    const uint32_t block = records_.Find(owner, id);
    if (block != kNoBlock) bytes += records_.at(block).memory.bytes;
  }
  return bytes;
}

BlockInfo RamBlockStore::InfoOf(uint32_t block) const {
  const BlockRecord& record = records_.at(block);
  return {record.key.id,
          record.key.parent,
          *record.tenant,
          record.key.name_space,
          record.memory.bytes,
          record.state,
          record.leases,
          pins_.NamesOf(record.tenant, record.key.id),
          record.children,
          true,
          false};
}

std::vector<BlockInfo> RamBlockStore::List(std::string_view tenant, uint32_t limit) const {
  std::vector<BlockInfo> out;
  for (uint32_t i = 0, all = ~0u; i < all && out.size() < limit;) {
    absl::MutexLock lock(&mutex_);
    const TenantName owner = tenants_.Find(tenant);
    all = records_.size();
    for (const uint32_t end = std::min(all, i + kScanBlocks); i < end && out.size() < limit; ++i) {
      const BlockRecord& record = records_.at(i);
      if (record.state == BlockState::kPublished && record.tenant == owner) {
        out.push_back(InfoOf(i));
      }
    }
  }
  return out;
}

BlockStoreStats RamBlockStore::Stats() const {
  absl::MutexLock lock(&mutex_);
  BlockStoreStats s;
  s.blocks = live_;
  s.published = records_.published();
  s.leased = leased_;
  s.pinned = pinned_;
  s.bytes = live_bytes_;
  s.reserved_bytes = reserved_bytes_;
  s.hits = hits_;
  s.misses = misses_;
  s.evictions = evictions_;
  s.ghost_hits = order_.GhostHits();
  s.refused = refused_;
  s.digest_failures = digest_failures_;
  s.duplicate_publishes = duplicate_publishes_;
  s.arena = arena_->Stats();
  return s;
}

}  // namespace quarry

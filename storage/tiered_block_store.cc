#include "storage/tiered_block_store.h"

#include <algorithm>
#include <utility>

#include <pthread.h>
#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/status_macros.h"
#include "storage/crash_point.h"

namespace quarry {
namespace {

// Of one group commit.
constexpr uint64_t kBatchBytes = 64ull << 20;

constexpr double kLoadsOfMean = 8;

}  // namespace

TieredBlockStore::TieredBlockStore(std::unique_ptr<BlockStore> ram, std::unique_ptr<BlockLog> log,
                                   const TieredOptions& options, std::unique_ptr<PageCache> pages)
    : options_(options), ram_(std::move(ram)), log_(std::move(log)), pages_(std::move(pages)) {
  writer_ = std::thread([this] { WriteQueued(); });
  pthread_setname_np(writer_.native_handle(), "quarry-disk");
}

TieredBlockStore::~TieredBlockStore() {
  {
    absl::MutexLock lock(&queue_mutex_);
    ending_ = true;
  }
  writer_.join();
}

absl::Status TieredBlockStore::Reserve(std::string_view tenant, uint64_t bytes, uint32_t count) {
  absl::Status reserved = ram_->Reserve(tenant, bytes, count);
  // What waits to be written is leased: that is not a full arena, if it is as much as is missing.
  const absl::Time end = absl::Now() + options_.reserve_wait;
  while (absl::IsResourceExhausted(reserved)) {
    const ArenaStats arena = ram_->arena().Stats();
    const uint64_t free = arena.capacity_bytes - std::min(arena.capacity_bytes, arena.used_bytes);
    {
      absl::MutexLock lock(&queue_mutex_);
      const uint64_t before = queued_bytes_;
      if (before == 0 || bytes * count > free + before) break;
      const auto fewer = [this, before]() ABSL_SHARED_LOCKS_REQUIRED(queue_mutex_) {
        return queued_bytes_ < before;
      };
      if (!queue_mutex_.AwaitWithDeadline(absl::Condition(&fewer), end)) break;
    }
    reserved = ram_->Reserve(tenant, bytes, count);
  }
  return reserved;
}

// ---- To the disk.

absl::StatusOr<BlockView> TieredBlockStore::Publish(BlockHandle block, BlockKey key,
                                                    std::optional<ByteDigest> digest,
                                                    bool* existed) {
  QUARRY_ASSIGN_OR_RETURN(BlockView view, ram_->Publish(block, key, digest, existed));
  CrashPoint("publish.published");
  if (!*existed) EnqueueOrCount(view, key);
  CrashPoint("publish.queued");
  return view;
}

absl::Status TieredBlockStore::Enqueue(const BlockView& view, const BlockKey& key) {
  QUARRY_RETURN_IF_ERROR(log_->CheckSize(view.tenant, key, view.memory.bytes));
  absl::MutexLock lock(&queue_mutex_);
  if (waiting_.contains(view.handle.slot)) return absl::OkStatus();
  if (ending_) return absl::UnavailableError("the store is ending");
  if (absl::Now() < refuse_until_) return absl::UnavailableError(refusal_);
  const bool fits = queued_bytes_ == 0 ||
                    view.memory.bytes <= options_.max_queued_bytes -
                                             std::min(options_.max_queued_bytes, queued_bytes_);
  if (!fits) {
    return absl::ResourceExhaustedError(
        absl::StrCat(queued_bytes_, " bytes wait for the disk already"));
  }
  ram_->Retain(view.handle);
  queued_bytes_ += view.memory.bytes;
  waiting_.insert(view.handle.slot);
  queue_.push_back({view, key});
  return absl::OkStatus();
}

std::vector<KeyedBlock> TieredBlockStore::TakeQueued(bool* refused) {
  std::vector<KeyedBlock> batch;
  absl::MutexLock lock(&queue_mutex_);
  queue_mutex_.Await(absl::Condition(this, &TieredBlockStore::HasWork));
  *refused = absl::Now() < refuse_until_;
  const uint64_t most = *refused ? ~0ull : kBatchBytes;
  for (uint64_t bytes = 0; !queue_.empty() && bytes < most; queue_.pop_front()) {
    bytes += queue_.front().view.memory.bytes;
    batch.push_back(std::move(queue_.front()));
  }
  return batch;
}

void TieredBlockStore::WriteQueued() {
  while (true) {
    bool refused = false;
    const std::vector<KeyedBlock> batch = TakeQueued(&refused);
    if (batch.empty()) return;
    CrashPoint("write.taken");
    if (refused) {
      not_admitted_ += batch.size();
    } else {
      Write(batch);
    }
    LetGo(batch);
    CrashPoint("write.let-go");
  }
}

void TieredBlockStore::Write(std::span<const KeyedBlock> batch) {
  std::vector<BlockToLog> blocks;
  for (const KeyedBlock& queued : batch) {
    const ArenaSlot& memory = queued.view.memory;
    blocks.push_back({queued.view.tenant,
                      &queued.key,
                      queued.view.digest,
                      {memory.data, memory.bytes},
                      [this, &queued] { return ram_->IsPublished(queued.view.handle); }});
  }
  const std::vector<absl::Status> written = log_->Append(blocks);
  CrashPoint("write.written");
  absl::Status failed;
  for (size_t i = 0; i < batch.size(); ++i) {
    if (written[i].ok()) NoteDiskCopy(batch[i].view.handle, load_bytes_per_second_);
    // The store looks for itself, retires it, and says so.
    if (absl::IsDataLoss(written[i])) (void)ram_->CopyOut(batch[i].view.handle, 0, {});
    if (absl::IsUnavailable(written[i]) || absl::IsResourceExhausted(written[i])) {
      failed.Update(written[i]);
    }
    if (!written[i].ok() && !absl::IsCancelled(written[i])) ++not_admitted_;
  }
  if (failed.ok()) return;
  spdlog::error("the disk tier takes nothing for {}: {}",
                absl::FormatDuration(options_.retry_after), std::string(failed.message()));
  absl::MutexLock lock(&queue_mutex_);
  refuse_until_ = absl::Now() + options_.retry_after;
  refusal_ = std::string(failed.message());
}

void TieredBlockStore::LetGo(std::span<const KeyedBlock> batch) {
  uint64_t bytes = 0;
  {
    // Before the leases end, and the slots may be other blocks'.
    absl::MutexLock lock(&queue_mutex_);
    for (const KeyedBlock& queued : batch) {
      waiting_.erase(queued.view.handle.slot);
      bytes += queued.view.memory.bytes;
    }
  }
  for (const KeyedBlock& queued : batch) ram_->Release(queued.view.handle);
  absl::MutexLock lock(&queue_mutex_);
  queued_bytes_ -= bytes;
}

absl::StatusOr<FlushResult> TieredBlockStore::Flush(
    std::string_view tenant, std::optional<std::span<const BlockId>> blocks) {
  std::vector<BlockId> all;
  if (!blocks.has_value()) {
    for (const BlockInfo& info : ram_->List(tenant, ~0u)) all.push_back(info.id);
  }
  FlushResult result;
  uint64_t named = 0;
  for (const BlockId& id : blocks.value_or(std::span<const BlockId>(all))) {
    if (const auto logged = log_->Find(tenant, id); logged.has_value()) {
      result.leading_blocks += result.leading_blocks == named++ ? 1 : 0;
      ++result.durable_blocks;
      result.durable_bytes += logged->bytes;
      continue;
    }
    ++named;
    const absl::StatusOr<KeyedBlock> in_ram = ram_->AcquireInRam(tenant, id);
    if (!in_ram.ok()) {
      result.missing_blocks += blocks.has_value() ? 1 : 0;  // else evicted or purged since
      continue;
    }
    const absl::Status queued = Enqueue(in_ram->view, in_ram->key);
    ram_->Release(in_ram->view.handle);
    if (queued.ok() || absl::IsResourceExhausted(queued)) {
      ++result.pending_blocks;
    } else {
      ++result.refused_blocks;
      result.refusal = std::string(queued.message());
    }
  }
  return result;
}

// ---- From the disk.

absl::StatusOr<BlockView> TieredBlockStore::Acquire(std::string_view tenant, const BlockKey& key) {
  absl::StatusOr<BlockView> in_ram = ram_->Acquire(tenant, key);
  if (in_ram.ok()) {
    const bool on_disk = log_->Touch(tenant, key.id);
    NoteDiskCopy(in_ram->handle,
                 on_disk ? std::optional<double>(load_bytes_per_second_) : std::nullopt);
    // What was refused when it came is asked for again.
    if (!on_disk) EnqueueOrCount(*in_ram, key);
    return in_ram;
  }
  const std::optional<LoggedBlockInfo> info = log_->Find(tenant, key.id);
  if (!info.has_value()) return in_ram;
  absl::StatusOr<BlockView> promoted = Promote(tenant, key, *info);
  ++(promoted.ok() ? promoted_ : failed_promotions_);
  if (promoted.ok()) return promoted;
  return absl::NotFoundError(absl::StrCat("block ", key.id.Hex(), " is on the disk, and not read: ",
                                          std::string(promoted.status().message())));
}

absl::StatusOr<BlockView> TieredBlockStore::Promote(std::string_view tenant, const BlockKey& key,
                                                    const LoggedBlockInfo& info) {
  QUARRY_RETURN_IF_ERROR(ram_->Reserve(tenant, info.bytes, 1));  // waits for nobody: a miss is one
  const absl::StatusOr<BlockView> begun = ram_->Begin(tenant, info.bytes);
  if (!begun.ok()) {
    ram_->Unreserve(tenant, info.bytes, 1);
    return begun.status();
  }
  CrashPoint("promote.begun");
  const absl::Time start = absl::Now();
  const absl::StatusOr<ByteDigest> digest =
      log_->Read(tenant, key, {begun->memory.data, begun->memory.bytes});
  if (digest.ok()) NoteLoad(info.bytes, absl::Now() - start);
  absl::StatusOr<BlockView> published =
      absl::NotFoundError("it was purged or moved while it was read");
  bool existed = false;
  CrashPoint("promote.read");
  if (digest.ok()) {
    // Not between the two halves of a purge; what was purged before is gone from the log, or
    // another block has its id.
    absl::ReaderMutexLock lock(&promotion_mutex_);
    const std::optional<LoggedBlockInfo> now = log_->Find(tenant, key.id);
    if (now.has_value() && now->born == info.born) {
      published = ram_->Publish(begun->handle, key, *digest, &existed);
    }
    if (published.ok()) NoteDiskCopy(published->handle, load_bytes_per_second_);
  } else {
    published = digest.status();
  }
  CrashPoint("promote.published");
  if (!published.ok() || existed) ram_->Release(begun->handle);
  return published;
}

absl::StatusOr<BlockView> TieredBlockStore::AcquirePaged(std::string_view tenant,
                                                         const BlockKey& key) {
  if (pages_ == nullptr) {
    return absl::FailedPreconditionError("there is no room for pages of the disk");
  }
  // Not between the two halves of a purge.
  absl::ReaderMutexLock lock(&promotion_mutex_);
  absl::StatusOr<BlockView> view =
      paged_.Acquire(tenant, key, [&]() -> absl::StatusOr<std::unique_ptr<PagedBlock>> {
        QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<LoggedBlockReader> reader,
                                log_->OpenBlock(tenant, key));
        return std::make_unique<PagedBlock>(pages_.get(), std::move(reader));
      });
  if (view.ok()) {
    (void)log_->Touch(tenant, key.id);
    return view;
  }
  return absl::NotFoundError(absl::StrCat(
      "block ", key.id.Hex(), " is not used on the disk: ", std::string(view.status().message())));
}

std::optional<BlockPlace> TieredBlockStore::Locate(std::string_view tenant,
                                                   const BlockKey& key) const {
  if (const auto in_ram = ram_->Locate(tenant, key); in_ram.has_value()) return in_ram;
  const std::optional<LoggedBlockInfo> logged = log_->Find(tenant, key.id);
  if (!logged.has_value()) return std::nullopt;
  return BlockPlace{logged->bytes, false};
}

absl::Duration TieredBlockStore::ExpectedLoad(uint64_t bytes) const {
  return absl::Seconds(static_cast<double>(bytes) / load_bytes_per_second_);
}

void TieredBlockStore::NoteLoad(uint64_t bytes, absl::Duration took) {
  const double seen = static_cast<double>(bytes) / std::max(absl::ToDoubleSeconds(took), 1e-9);
  // One of several that end at once may be lost.
  const double mean = load_bytes_per_second_;
  load_bytes_per_second_ = mean + (seen - mean) / kLoadsOfMean;
}

absl::StatusOr<uint64_t> TieredBlockStore::Purge(std::string_view tenant,
                                                 std::optional<NamespaceDigest> name_space,
                                                 std::span<const BlockId> blocks) {
  absl::MutexLock lock(&promotion_mutex_);
  // RAM first: what is written from here on is no longer wanted, what was before is older than the
  // log's purge.
  QUARRY_ASSIGN_OR_RETURN(const uint64_t in_ram, ram_->Purge(tenant, name_space, blocks));
  paged_.Purge(tenant, name_space, blocks);
  CrashPoint("purge.ram-done");
  QUARRY_ASSIGN_OR_RETURN(const uint64_t on_disk, log_->Purge(tenant, name_space, blocks));
  return std::max(in_ram, on_disk);
}

std::vector<BlockInfo> TieredBlockStore::List(std::string_view tenant, uint32_t limit) const {
  std::vector<BlockInfo> list = ram_->List(tenant, limit);
  absl::flat_hash_set<BlockId> in_ram;
  for (BlockInfo& info : list) {
    in_ram.insert(info.id);
    info.on_disk = log_->Find(tenant, info.id).has_value();
  }
  // Of `limit` of them, no more are in RAM than are listed already.
  for (const LoggedBlockName& logged : log_->List(tenant, limit)) {
    if (list.size() == limit) break;
    if (in_ram.contains(logged.id)) continue;
    BlockInfo& info = list.emplace_back();
    info.id = logged.id;
    info.parent = logged.parent;
    info.tenant = std::string(tenant);
    info.name_space = logged.name_space;
    info.bytes = logged.bytes;
    info.state = BlockState::kPublished;
    info.on_disk = true;
  }
  return list;
}

BlockStoreStats TieredBlockStore::Stats() const {
  BlockStoreStats s = ram_->Stats();
  DiskTierStats& disk = s.disk.emplace();
  disk.log = log_->Stats();
  disk.promoted = promoted_;
  disk.failed_promotions = failed_promotions_;
  disk.not_admitted = not_admitted_;
  disk.load_bytes_per_second = load_bytes_per_second_;
  if (pages_ != nullptr) disk.pages = pages_->Stats();
  absl::MutexLock lock(&queue_mutex_);
  disk.queued_bytes = queued_bytes_;
  disk.refuses = absl::Now() < refuse_until_;
  return s;
}

}  // namespace quarry

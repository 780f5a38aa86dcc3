#include "storage/log/segmented_log.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "proto/byte_digest.h"
#include "proto/status_macros.h"
#include "storage/crash_point.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

// Left for reclaiming, which must have room to move to.
constexpr uint32_t kReservedSegments = 1;

uint64_t RandomNumber() {
  std::random_device random;
  return uint64_t{random()} << 32 | random();
}

LogWriterOptions WriterOptions(const BlockLogOptions& options, const Superblock& superblock) {
  LogWriterOptions out;
  // A few parts to a segment, so that its end is used.
  const uint64_t most = superblock.segment_bytes / 4 / kSectorBytes * kSectorBytes;
  out.max_part_bytes = std::min(options.max_part_bytes, most);
  out.min_part_bytes = std::min(out.min_part_bytes, out.max_part_bytes / 4);
  out.min_part_bytes = RoundUp(out.min_part_bytes, kSectorBytes);
  out.write_behind_bytes = GroupBytes(superblock);
  out.random = options.random;
  return out;
}

// Those that the tenant has from before this sequence, durably.
absl::Status DestroyKeys(Disk* disk, std::string_view tenant, uint64_t before, TenantKeys* keys) {
  const absl::StatusOr<size_t> destroyed = keys->Destroy(tenant, before);
  if (destroyed.ok() && *destroyed == 0) return absl::OkStatus();
  CrashPoint("keys.erased");
  absl::Status status = destroyed.status();
  if (status.ok()) status = disk->Sync();
  CrashPoint("keys.gone");
  keys->Settle(status.ok() ? TenantKeys::Outcome::kDurable : TenantKeys::Outcome::kUnknown);
  if (status.ok()) return status;
  return absl::Status(status.code(),
                      absl::StrCat("keys of tenant ", std::string(tenant), " on ", disk->name(),
                                   ", which was purged, are not known to be overwritten: ",
                                   std::string(status.message())));
}

// The power may have gone between a purge and the end of the keys that it destroys.
void FinishDestroying(const RecoveredLog& recovered, Disk* disk, TenantKeys* keys) {
  for (const auto& [tenant, before] : recovered.destroyed_keys) {
    const absl::Status status = DestroyKeys(disk, *tenant, before, keys);
    if (!status.ok()) spdlog::error("{}", std::string(status.message()));
  }
}

}  // namespace

SegmentedLog::SegmentedLog(std::unique_ptr<Disk> disk, const BlockLogOptions& options,
                           TenantNames tenants, std::unique_ptr<TenantKeys> keys,
                           RecoveredLog recovered, double recovery_seconds)
    : disk_(std::move(disk)),
      superblock_(recovered.superblock),
      options_(options),
      min_part_bytes_(WriterOptions(options, superblock_).min_part_bytes),
      max_part_bytes_(WriterOptions(options, superblock_).max_part_bytes),
      keys_(std::move(keys)),
      sealing_(keys_ == nullptr ? Sealing::kPlain : Sealing::kSealed),
      source_{disk_.get(), GroupBytes(superblock_), keys_.get()},
      recovered_blocks_(recovered.index.blocks()),
      hidden_blocks_(recovered.hidden_blocks),
      incomplete_blocks_(recovered.incomplete_blocks),
      scanned_segments_(recovered.scanned_segments),
      recovery_seconds_(recovery_seconds),
      tenants_(std::move(tenants)),
      index_(std::move(recovered.index)),
      segments_(std::move(recovered.segments)),
      writer_(disk_.get(), superblock_, WriterOptions(options, superblock_), &segments_, &mutex_,
              keys_.get(), recovered.next_sequence),
      purges_(std::move(recovered.purges)) {}

absl::StatusOr<std::unique_ptr<BlockLog>> BlockLog::Open(std::unique_ptr<Disk> disk,
                                                         const BlockLogOptions& given) {
  BlockLogOptions options = given;
  if (options.segment_bytes % kSectorBytes != 0 || options.segment_bytes < kMinSegmentBytes ||
      options.segment_bytes > kMaxSegmentBytes) {
    return absl::InvalidArgumentError(absl::StrCat("segment_bytes ", options.segment_bytes,
                                                   " is not in whole sectors from ",
                                                   kMinSegmentBytes, " to ", kMaxSegmentBytes));
  }
  if (options.max_part_bytes % kSectorBytes != 0 || options.max_part_bytes == 0 ||
      options.max_part_bytes > kMaxPartBytes) {
    return absl::InvalidArgumentError(absl::StrCat("max_part_bytes ", options.max_part_bytes,
                                                   " is not in whole sectors up to ",
                                                   kMaxPartBytes));
  }
  if (options.random == nullptr) options.random = RandomNumber;
  QUARRY_ASSIGN_OR_RETURN(const std::optional<LogKey> key, LoadLogKey(options.key));
  const auto start = std::chrono::steady_clock::now();
  QUARRY_ASSIGN_OR_RETURN(const Superblock superblock,
                          OpenSuperblock(disk.get(), options.segment_bytes, key, options.random));
  std::unique_ptr<TenantKeys> keys;
  if (key.has_value()) {
    QUARRY_ASSIGN_OR_RETURN(keys, TenantKeys::Recover(disk.get(), superblock, key->secret));
    CrashPoint("recovery.keys-read");
  }
  TenantNames tenants;
  QUARRY_ASSIGN_OR_RETURN(RecoveredLog recovered, RecoverLog(disk.get(), superblock, &tenants));
  if (keys != nullptr) FinishDestroying(recovered, disk.get(), keys.get());
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  spdlog::info(
      "log on {}{}: {} blocks, {} bytes, in {} segments of {} bytes, {} of them free; read "
      "in {:.3f} s, {} segments scanned",
      disk->name(), keys == nullptr ? "" : ", encrypted", recovered.index.blocks(),
      recovered.index.bytes(), superblock.segments, superblock.segment_bytes,
      recovered.segments.free(), took.count(), recovered.scanned_segments);
  auto log = std::make_unique<SegmentedLog>(std::move(disk), options, std::move(tenants),
                                            std::move(keys), std::move(recovered), took.count());
  if (options.scrub_bytes_per_s > 0) {
    log->StartScrubbing({.bytes_per_s = options.scrub_bytes_per_s});
  }
  return log;
}

// ---- Appending.

absl::Status SegmentedLog::Place(const PartFrame& block, std::span<const std::byte> bytes,
                                 uint32_t reserved, LoggedBlock* out) {
  PartFrame part = block;
  part.block_bytes = bytes.size();
  part.part_offset = 0;
  part.born = 0;
  {
    absl::MutexLock lock(&mutex_);
    out->tenant = tenants_.Intern(part.tenant);
  }
  out->id = part.key.id;
  out->parent = part.key.parent;
  out->name_space = part.key.name_space;
  out->bytes = bytes.size();
  while (part.part_offset < part.block_bytes) {
    QUARRY_ASSIGN_OR_RETURN(const LoggedPart placed,
                            writer_.AddPart(&part, bytes.subspan(part.part_offset), reserved));
    out->parts.push_back(placed);
    part.part_offset += placed.part_bytes;
  }
  out->born = part.born;
  return absl::OkStatus();
}

absl::Status SegmentedLog::Add(const BlockToLog& block, LoggedBlock* out) {
  if (const ByteDigest actual = DigestOf(block.bytes); !(actual == block.digest)) {
    ++broken_blocks_;
    return absl::DataLossError(absl::StrCat("block ", block.key->id.Hex(), " of ",
                                            block.bytes.size(), " bytes has digest ", HexOf(actual),
                                            ", expected ", HexOf(block.digest), ": not logged"));
  }
  PartFrame frame;
  frame.tenant = std::string(block.tenant);
  frame.key = *block.key;
  frame.block_digest = block.digest;
  return Place(frame, block.bytes, kReservedSegments, out);
}

absl::Status SegmentedLog::Commit() {
  absl::Status committed = writer_.Commit();
  written_bytes_ = writer_.written_bytes();
  if (!committed.ok()) ++write_errors_;
  if (keys_ != nullptr) {
    keys_->Settle(committed.ok() ? TenantKeys::Outcome::kDurable : TenantKeys::Outcome::kUnknown);
  }
  return committed;
}

absl::Status SegmentedLog::CommitAdded(std::vector<Added>* added,
                                       std::span<absl::Status> statuses) {
  absl::Status committed = Commit();
  CrashPoint("append.committed");
  absl::MutexLock lock(&mutex_);
  for (Added& one : *added) {
    statuses[one.number] = committed;
    if (!committed.ok()) continue;
    ++appended_blocks_;
    appended_bytes_ += one.block.bytes;
    index_.Add(std::move(one.block));
  }
  added->clear();
  return committed;
}

uint64_t SegmentedLog::DiskBytes(std::string_view tenant, const BlockKey& key,
                                 uint64_t bytes) const {
  return bytes + AllPartFrameBytes(tenant, key, bytes, min_part_bytes_, max_part_bytes_, sealing_);
}

absl::Status SegmentedLog::CheckSize(std::string_view tenant, const BlockKey& key,
                                     uint64_t bytes) const {
  if (bytes == 0 || tenant.empty()) {
    return absl::InvalidArgumentError("a block without bytes or tenant");
  }
  const uint64_t frame = PartFrameBytes(tenant, key, std::min(bytes, max_part_bytes_), sealing_);
  if (frame > kMaxFrameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("a key of ", key.full_key.size(),
                                                   " bytes takes a frame of ", frame, "; ",
                                                   kMaxFrameBytes, " are allowed"));
  }
  const uint64_t capacity = uint64_t{superblock_.segments} * superblock_.segment_bytes;
  const uint64_t wanted = DiskBytes(tenant, key, bytes);
  if (wanted <= capacity / 8) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("block ", key.id.Hex(), " takes up to ", wanted,
                                                 " bytes, more than an eighth of the log's ",
                                                 capacity));
}

absl::Status SegmentedLog::MakeRoom(const BlockToLog& block, std::vector<Added>* added,
                                    std::span<absl::Status> statuses) {
  QUARRY_RETURN_IF_ERROR(CheckSize(block.tenant, *block.key, block.bytes.size()));
  if (reinterpret_cast<uintptr_t>(block.bytes.data()) % kSectorBytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("block ", block.key->id.Hex(), " does not begin at a whole sector in memory"));
  }
  const uint64_t bytes = DiskBytes(block.tenant, *block.key, block.bytes.size());
  // As many as it may reach into, and one to begin in.
  const auto wanted =
      static_cast<uint32_t>(kReservedSegments + 1 + bytes / (superblock_.segment_bytes / 8 * 7));
  {
    absl::MutexLock lock(&mutex_);
    if (segments_.free() >= wanted) return absl::OkStatus();
  }
  QUARRY_RETURN_IF_ERROR(CommitAdded(added, statuses));
  return FreeSegments(wanted);
}

std::vector<absl::Status> SegmentedLog::Append(std::span<const BlockToLog> blocks) {
  std::vector<absl::Status> statuses(blocks.size());
  std::vector<Added> added;
  absl::MutexLock append_lock(&append_mutex_);
  for (size_t i = 0; i < blocks.size(); ++i) {
    const BlockToLog& block = blocks[i];
    statuses[i] = MakeRoom(block, &added, statuses);
    CrashPoint("append.room-made");
    // Nothing waits for the disk from here to the commit but what is written, so that who purges
    // after the answer purges what is written.
    if (statuses[i].ok() && block.still_wanted != nullptr && !block.still_wanted()) {
      statuses[i] = absl::CancelledError("the block is no longer wanted");
    }
    if (statuses[i].ok()) {
      Added one{i, {}};
      statuses[i] = Add(block, &one.block);
      if (statuses[i].ok()) added.push_back(std::move(one));
      CrashPoint("append.added");
    }
    if (absl::IsUnavailable(statuses[i]) || absl::IsResourceExhausted(statuses[i])) {
      std::fill(statuses.begin() + static_cast<ptrdiff_t>(i) + 1, statuses.end(), statuses[i]);
      break;
    }
  }
  (void)CommitAdded(&added, statuses);
  CrashPoint("append.indexed");
  return statuses;
}

// ---- Purging.

absl::StatusOr<uint64_t> SegmentedLog::Purge(std::string_view tenant,
                                             const std::optional<NamespaceDigest>& name_space,
                                             std::span<const BlockId> blocks) {
  if (tenant.empty()) return 0;  // Append takes no blocks of nobody
  PurgeFrame purge;
  purge.tenant = std::string(tenant);
  purge.has_name_space = name_space.has_value();
  if (name_space.has_value()) purge.name_space = *name_space;
  purge.destroys_keys = keys_ != nullptr && !name_space.has_value() && blocks.empty();
  absl::MutexLock append_lock(&append_mutex_);
  if (purge.destroys_keys) keys_->Retire(tenant);
  uint64_t purged;
  TenantName owner;
  {
    absl::MutexLock lock(&mutex_);
    owner = tenants_.Intern(tenant);
    purged = index_.Purge(owner, name_space, blocks);
  }
  CrashPoint("purge.not-found-any-more");
  do {
    const std::span<const BlockId> now =
        blocks.first(std::min(PurgeFrame::MostBlocks(superblock_.segment_bytes), blocks.size()));
    blocks = blocks.subspan(now.size());
    purge.born = 0;
    purge.blocks.clear();
    for (const BlockId& id : now) purge.blocks.push_back({id, 0});
    absl::Status status = FreeSegments(kReservedSegments + 1);
    CrashPoint("purge.room-made");
    uint32_t segment = 0;
    // Where there is no room to reclaim by, the reserve is for this.
    if (status.ok() || absl::IsResourceExhausted(status) || absl::IsUnavailable(status)) {
      const absl::StatusOr<uint32_t> added = writer_.AddPurge(&purge);
      status = added.status();
      if (added.ok()) segment = *added;
    }
    CrashPoint("purge.added");
    if (status.ok()) status = Commit();
    CrashPoint("purge.durable");
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat("purge of tenant ", std::string(tenant),
                                                      " on ", disk_->name(), " is not durable: ",
                                                      std::string(status.message())));
    }
    purges_.Add(owner, purge, segment);
  } while (!blocks.empty());
  // Later than the purge: a block that is found has its key.
  if (purge.destroys_keys)
    QUARRY_RETURN_IF_ERROR(DestroyKeys(disk_.get(), tenant, ~0ull, keys_.get()));
  CrashPoint("purge.done");
  return purged;
}

// ---- Reading.

bool SegmentedLog::Touch(std::string_view tenant, const BlockId& id) {
  absl::MutexLock lock(&mutex_);
  LoggedBlock* const block = index_.Find(tenants_.Find(tenant), id);
  if (block == nullptr) return false;
  block->Use();
  return true;
}

std::optional<LoggedBlockInfo> SegmentedLog::Find(std::string_view tenant,
                                                  const BlockId& id) const {
  absl::MutexLock lock(&mutex_);
  const LoggedBlock* const block = index_.Find(tenants_.Find(tenant), id);
  if (block == nullptr) return std::nullopt;
  return LoggedBlockInfo{block->name_space, block->bytes, block->born};
}

std::vector<LoggedBlockName> SegmentedLog::List(std::string_view tenant, uint32_t limit) const {
  std::vector<LoggedBlockName> list;
  absl::MutexLock lock(&mutex_);
  for (const LoggedBlock* const block : index_.List(tenants_.Find(tenant), limit)) {
    list.push_back({block->id, block->parent, block->name_space, block->bytes});
  }
  return list;
}

absl::StatusOr<ByteDigest> SegmentedLog::Read(std::string_view tenant, const BlockKey& key,
                                              std::span<std::byte> out) {
  absl::Status status;
  LoggedBlock block;
  for (int tries = 0; tries < 3; ++tries) {
    {
      absl::MutexLock lock(&mutex_);
      LoggedBlock* const found = index_.Find(tenants_.Find(tenant), key.id);
      if (found == nullptr) {
        return absl::NotFoundError(absl::StrCat("block ", key.id.Hex(), " is not in the log"));
      }
      if (found->bytes != out.size()) {
        return absl::InvalidArgumentError(absl::StrCat("block ", key.id.Hex(), " has ",
                                                       found->bytes, " bytes, not ", out.size()));
      }
      if (tries > 0 && found->parts == block.parts) break;
      if (tries == 0) found->Use();
      block = *found;
    }
    const absl::StatusOr<WrittenAs> read = ReadBlock(source_, block, out);
    status = read.status();
    if (read.ok()) {
      if (read->key.full_key != key.full_key || read->key.parent != key.parent ||
          read->key.name_space != key.name_space) {
        return absl::NotFoundError(
            absl::StrCat("block id ", key.id.Hex(), " names a block of another key"));
      }
      ++read_blocks_;
      read_bytes_ += block.bytes;
      return read->digest;
    }
    // It may have been moved while it was read.
  }
  if (!absl::IsDataLoss(status)) {
    ++read_errors_;
    return status;
  }
  (void)DropBroken(block, status);
  return status;
}

bool SegmentedLog::DropBroken(const LoggedBlock& block, const absl::Status& why) {
  {
    absl::MutexLock lock(&mutex_);
    const LoggedBlock* const found = index_.Find(block.tenant, block.id);
    if (found == nullptr || found->born != block.born) return false;
    index_.Remove(block.tenant, block.id);
  }
  ++broken_blocks_;
  spdlog::error("block {} of {} bytes on {} is broken: {}", block.id.Hex(), block.bytes,
                disk_->name(), std::string(why.message()));
  return true;
}

BlockLogStats SegmentedLog::Stats() const {
  BlockLogStats s;
  s.capacity_bytes = uint64_t{superblock_.segments} * superblock_.segment_bytes;
  s.appended_blocks = appended_blocks_;
  s.appended_bytes = appended_bytes_;
  s.written_bytes = written_bytes_;
  s.moved_bytes = moved_bytes_;
  s.dropped_blocks = dropped_blocks_;
  s.dropped_bytes = dropped_bytes_;
  s.read_blocks = read_blocks_;
  s.read_bytes = read_bytes_;
  s.broken_blocks = broken_blocks_;
  s.read_errors = read_errors_;
  s.write_errors = write_errors_;
  s.scrubbed_bytes = scrubbed_bytes_;
  s.scrubbed_segments = scrubbed_segments_;
  s.scrub_passes = scrub_passes_;
  s.scrub_broken = scrub_broken_;
  s.scrub_read_errors = scrub_read_errors_;
  s.recovered_blocks = recovered_blocks_;
  s.hidden_blocks = hidden_blocks_;
  s.incomplete_blocks = incomplete_blocks_;
  s.unreadable_keys = keys_ == nullptr ? 0 : keys_->unreadable();
  s.scanned_segments = scanned_segments_;
  s.recovery_seconds = recovery_seconds_;
  absl::MutexLock lock(&mutex_);
  s.segments = segments_.size();
  s.free_segments = segments_.free();
  s.condemned_segments = segments_.condemned();
  s.blocks = index_.blocks();
  s.bytes = index_.bytes();
  return s;
}

}  // namespace quarry

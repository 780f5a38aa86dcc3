// BlockLog over the segments of one disk.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"
#include "storage/log/block_log.h"
#include "storage/log/log_index.h"
#include "storage/log/log_recovery.h"
#include "storage/log/log_writer.h"
#include "storage/log/purge_table.h"
#include "storage/log/read_block.h"
#include "storage/log/scrubber.h"
#include "storage/log/segment_table.h"
#include "storage/log/tenant_keys.h"

namespace quarry {

class SegmentedLog final : public BlockLog {
 public:
  // `keys`: null where the log is not encrypted.
  SegmentedLog(std::unique_ptr<Disk> disk, const BlockLogOptions& options, TenantNames tenants,
               std::unique_ptr<TenantKeys> keys, RecoveredLog recovered, double recovery_seconds);

  std::vector<absl::Status> Append(std::span<const BlockToLog> blocks) override;
  absl::StatusOr<uint64_t> Purge(std::string_view tenant,
                                 const std::optional<NamespaceDigest>& name_space,
                                 std::span<const BlockId> blocks) override;
  absl::Status CheckSize(std::string_view tenant, const BlockKey& key,
                         uint64_t bytes) const override;
  bool Touch(std::string_view tenant, const BlockId& id) override;
  std::optional<LoggedBlockInfo> Find(std::string_view tenant, const BlockId& id) const override;
  std::vector<LoggedBlockName> List(std::string_view tenant, uint32_t limit) const override;
  absl::StatusOr<ByteDigest> Read(std::string_view tenant, const BlockKey& key,
                                  std::span<std::byte> out) override;
  absl::StatusOr<std::unique_ptr<LoggedBlockReader>> OpenBlock(std::string_view tenant,
                                                               const BlockKey& key) override;
  ScrubStep ScrubNext() override;
  BlockLogStats Stats() const override;

  void StartScrubbing(const ScrubberOptions& options) {
    scrubber_ = std::make_unique<Scrubber>([this] { return ScrubNext(); }, options);
  }

 private:
  class BlockReader;  // storage/log/block_reader.cc

  // A block on its way to the next commit.
  struct Added {
    size_t number = 0;  // in Append's list
    LoggedBlock block;
  };
  // A block that reclaiming moves: as it was, as it will be, and its bytes until it is.
  struct Moved {
    LoggedBlock from, to;
    AlignedBuffer bytes;
    bool whole = false;  // if not, only its bytes are wanted, by what is pending
  };
  // One that it does not move, which only a block that is broken may be when it is held.
  enum class Why : uint8_t { kUnwanted, kBroken };
  struct Dropped {
    LoggedBlock block;
    Why why = Why::kUnwanted;
  };
  // Purges that it moves, and the segments that they are moved to.
  struct MovedPurges {
    std::vector<PurgeFrame> frames;
    std::vector<uint32_t> places;
  };

  // Hands the block to the writer; its bytes must live until the commit.
  absl::Status Place(const PartFrame& block, std::span<const std::byte> bytes, uint32_t reserved,
                     LoggedBlock* out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);
  absl::Status Add(const BlockToLog& block, LoggedBlock* out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);
  absl::Status Commit() ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);
  absl::Status CommitAdded(std::vector<Added>* added, std::span<absl::Status> statuses)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);
  // Makes sure of segments for the block; `added` is committed first where others are reclaimed.
  absl::Status MakeRoom(const BlockToLog& block, std::vector<Added>* added,
                        std::span<absl::Status> statuses)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);
  // So many segments free, by reclaiming others.
  absl::Status FreeSegments(uint32_t wanted) ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);
  std::optional<uint32_t> ChooseVictim() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);
  // Aborted: what the segment has cannot be read now, or not moved: another may do. Cancelled: so,
  // because of blocks that are held.
  absl::Status Reclaim(uint32_t segment) ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);
  // Moves what is to be kept of a segment's entries and drops the rest; nothing, if that fails.
  absl::Status MoveOrDrop(uint32_t segment, std::span<const FooterEntry> entries)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);
  // Hands what is kept to the writer, and tells the rest.
  // `again`: what cannot be read is told with it.
  absl::Status HandOver(std::span<const LoggedBlock> live, bool again, MovedPurges* purges,
                        std::vector<Moved>* moved, std::vector<Dropped>* dropped)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);
  // Cancelled: there is no room to move those that are held to.
  absl::Status CheckRoomForHeld(std::span<const LoggedBlock> live) const
      ABSL_LOCKS_EXCLUDED(mutex_);
  // The blocks that have parts in the segment, those that are held and the most used first.
  std::vector<LoggedBlock> TakeStock(uint32_t segment, std::span<const FooterEntry> entries) const
      ABSL_LOCKS_EXCLUDED(mutex_);
  bool Keeps(const LoggedBlock& block) const;
  // DataLoss: what is there is broken. Aborted: it cannot be read. Else as the writer says.
  absl::Status MoveBlock(const LoggedBlock& block, std::vector<Moved>* moved)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(append_mutex_);

  // Counts and logs a block that is not what was written, and drops it. False: what was read is no
  // longer the block, which was moved, purged or written anew meanwhile.
  bool DropBroken(const LoggedBlock& block, const absl::Status& why) ABSL_LOCKS_EXCLUDED(mutex_);

  // Of a segment that is sealed: the footer, the purges, and what parts are to be checked next.
  // Both return the bytes read.
  uint64_t ScrubSegment(uint32_t segment);
  uint64_t ScrubPart(const LoggedBlock& part);
  void FoundByScrub(uint32_t segment, uint64_t generation, const std::string& what,
                    const absl::Status& why);
  // Nothing: it is not sealed.
  std::optional<uint64_t> SealedGeneration(uint32_t segment) const ABSL_LOCKS_EXCLUDED(mutex_);

  // Of a block on the disk, at most.
  uint64_t DiskBytes(std::string_view tenant, const BlockKey& key, uint64_t bytes) const;

  const std::unique_ptr<Disk> disk_;
  const Superblock superblock_;
  const BlockLogOptions options_;
  const uint64_t min_part_bytes_, max_part_bytes_;
  const std::unique_ptr<TenantKeys> keys_;
  const Sealing sealing_;
  const BlockSource source_;
  const uint64_t recovered_blocks_, hidden_blocks_, incomplete_blocks_, scanned_segments_;
  const double recovery_seconds_;

  // One writer at a time; held while the disk is waited for.
  absl::Mutex append_mutex_ ABSL_ACQUIRED_BEFORE(mutex_);
  // Held for bookkeeping only.
  mutable absl::Mutex mutex_;
  TenantNames tenants_ ABSL_GUARDED_BY(mutex_);
  LogIndex index_ ABSL_GUARDED_BY(mutex_);
  SegmentTable segments_ ABSL_GUARDED_BY(mutex_);
  LogWriter writer_ ABSL_GUARDED_BY(append_mutex_);
  PurgeTable purges_ ABSL_GUARDED_BY(append_mutex_);
  // Segments that could not be reclaimed: passed over while there are others, and what cannot be
  // read of them at another try is dropped.
  absl::flat_hash_set<uint32_t> passed_over_ ABSL_GUARDED_BY(append_mutex_);
  absl::flat_hash_set<uint32_t> tried_before_ ABSL_GUARDED_BY(append_mutex_);

  std::atomic<uint64_t> appended_blocks_{0}, appended_bytes_{0}, written_bytes_{0}, moved_bytes_{0};
  std::atomic<uint64_t> dropped_blocks_{0}, dropped_bytes_{0}, read_blocks_{0}, read_bytes_{0};
  std::atomic<uint64_t> broken_blocks_{0}, read_errors_{0}, write_errors_{0};
  std::atomic<uint64_t> scrubbed_bytes_{0}, scrubbed_segments_{0}, scrub_passes_{0};
  std::atomic<uint64_t> scrub_broken_{0}, scrub_read_errors_{0};

  // Where the scrubber is; its thread's alone.
  struct Scrub {
    uint32_t segment = 0;
    std::vector<LoggedBlock> parts;  // of one part each, the next one last
    AlignedBuffer memory;
  };
  Scrub scrub_;
  std::unique_ptr<Scrubber> scrubber_;  // last: it ends first
};

}  // namespace quarry

// Writes frames into segments, many in one group commit.
#pragma once

#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "storage/disk/disk.h"
#include "storage/log/footer.h"
#include "storage/log/frames.h"
#include "storage/log/log_index.h"
#include "storage/log/purge_note.h"
#include "storage/log/segment_table.h"
#include "storage/log/tenant_keys.h"

namespace quarry {

struct LogWriterOptions {
  uint64_t max_part_bytes = 8ull << 20;  // of a block's bytes in one frame; whole sectors
  // A segment with less room left for a part is sealed.
  uint64_t min_part_bytes = 256ull << 10;
  // Enough for a write to take longer than what a thread costs, and little enough for the digests
  // of what follows to be ready when it is done.
  uint64_t write_behind_bytes = 8ull << 20;
  std::function<uint64_t()> random;  // generations of segments
};

// Frames are collected by Add and made durable by Commit, all of them or, if it fails, none; what
// they borrow must live until then; large ones are written meanwhile, one write at a time, by a
// thread of its own. Not thread-safe. The table is the caller's, guarded by
// `table_mutex`.
class LogWriter {
 public:
  // `keys`: null where parts are not encrypted. They are the caller's to settle after each Commit.
  LogWriter(Disk* disk, const Superblock& superblock, const LogWriterOptions& options,
            SegmentTable* table, absl::Mutex* table_mutex, TenantKeys* keys,
            uint64_t next_sequence);

  // Frames `rest`, the bytes of the block from part.part_offset on, or as much as may be in one
  // part; says how it lies on the disk. part.digest and part.part_bytes are set here, part.born too
  // if it is 0: this frame's own sequence. Of a block in one part the digest is the block's. `rest`
  // is at an address and offset of whole sectors, but for its end. `reserved`: segments that are
  // left free. ResourceExhausted: no segment is; FailedPrecondition: no slot for the tenant's key.
  // The frame has at most kMaxFrameBytes.
  absl::StatusOr<LoggedPart> AddPart(PartFrame* part, std::span<const std::byte> rest,
                                     uint32_t reserved);
  // Both copies of it; what was born 0 is born now. Returns the segment that has it.
  absl::StatusOr<uint32_t> AddPurge(PurgeFrame* purge);

  // Data written and synced, commits written and synced. ResourceExhausted and Unavailable: nothing
  // that was added since the last commit is durable. Segments that were begun since are free
  // again, others that it touched are condemned.
  absl::Status Commit();
  uint64_t pending_bytes() const { return pending_bytes_; }

  // Until what was begun to be written is: so that the caller's calls of the disk have an order.
  void AwaitBehind();

  // Of frames and payload, since the start.
  uint64_t written_bytes() const { return written_bytes_; }

 private:
  // The segment that frames go to, and what it has.
  struct OpenSegment {
    uint32_t segment = 0;
    uint64_t generation = 0;
    uint64_t at = 0;  // on the disk: where the next frame goes
    std::vector<FooterEntry> entries;
    uint64_t entry_bytes = 0;
    PurgeNote note;
  };
  // What a commit writes to one segment.
  struct Pending {
    FramePlace place;     // of the commit, once the batch is closed
    uint64_t from = 0;    // on the disk: where the pieces go
    bool starts = false;  // the segment's first
    bool seals = false;
    uint64_t first = 0;  // sequence
    uint32_t count = 0;
    uint64_t oldest_born = ~0ull;
    std::vector<std::span<const std::byte>> pieces;
    std::vector<AlignedBuffer> buffers;
    std::vector<FooterEntry> entries;  // of the whole segment, where it is sealed
    std::optional<PurgeNote> note;     // of the whole segment, where there are new purges
  };

  FramePlace PlaceHere() const;
  uint64_t SegmentEnd() const;
  // Bytes that frames of the tenant with their payload may take here beside what is to come: a
  // commit, a footer.
  uint64_t RoomFor(std::string_view tenant) const;
  uint64_t RoomOfEmpty(std::string_view tenant) const;
  // Opens a free segment: its start is synced before anything else of it is written over, so that
  // what a power cut leaves is of the one use or of the other.
  absl::Status OpenNext(uint32_t reserved);
  // Makes sure of a segment with room for a frame and this much payload, and of its pending batch.
  absl::Status Ensure(std::string_view tenant, uint64_t bytes, uint32_t reserved);
  void BeginBatch();
  // Ends what is pending for the open segment, and the segment if it `seals`.
  void CloseBatch(bool seals);
  // Adds the frame and its payload to the pending batch; `entry` tells of it but for its place.
  void Place(AlignedBuffer frame, std::span<const std::byte> payload, FooterEntry entry);
  // The same of a part that is encrypted first.
  absl::Status PlaceSealed(PartFrame* part, std::span<const std::byte> bytes);
  // Begins to write what the last batch has, while the caller goes on with other frames.
  void WriteBehind();
  absl::Status WriteData();
  absl::Status WriteCommits();
  // Forgets what is pending; its segments are not written any more, or begun again.
  void GiveUp();

  Disk* const disk_;
  const Superblock superblock_;
  const LogWriterOptions options_;
  SegmentTable* const table_;
  absl::Mutex* const table_mutex_;
  TenantKeys* const keys_;
  uint64_t next_sequence_;
  std::optional<OpenSegment> open_;
  std::vector<Pending> pending_;
  uint64_t pending_bytes_ = 0;
  uint64_t unwritten_bytes_ = 0;  // of the last batch, and not on their way
  uint64_t written_bytes_ = 0;
  absl::Status behind_status_;  // of those that have ended since the last commit
  std::future<absl::Status> behind_;
};

}  // namespace quarry

// The disk tier's log: blocks that survive a restart. Format: storage/FORMAT.md.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/types.h"
#include "storage/block_key.h"
#include "storage/disk/disk.h"
#include "storage/disk_tier_stats.h"
#include "storage/log/log_key.h"
#include "storage/log/log_layout.h"
#include "storage/log/scrubber.h"

namespace quarry {

// The bytes of a disk for a log of so many segments, of which there are at least four.
constexpr uint64_t LogBytes(uint32_t segments, uint64_t segment_bytes) {
  return LogLayout{segment_bytes, segments}.bytes();
}
constexpr uint64_t EncryptedLogBytes(uint32_t segments, uint64_t segment_bytes) {
  return LogLayout::Encrypted(segment_bytes, segments).bytes();
}
inline constexpr uint32_t kLeastSegments = 4;

// What is known of a block on the disk when its segment is to be used anew.
struct ReclaimCandidate {
  std::string_view tenant;
  BlockId id;
  uint64_t bytes = 0;
  uint32_t uses = 0;  // since it was written, half of those before it was moved
};

struct BlockLogOptions {
  uint64_t segment_bytes = 64ull << 20;  // of a disk that is formatted now; whole sectors
  uint64_t max_part_bytes = 8ull << 20;
  // Whether to move a block on rather than drop it. At most three quarters of a segment are moved,
  // whatever it says. Called under the log's locks. Default: what was used since.
  std::function<bool(const ReclaimCandidate&)> keep;
  // Random numbers that differ from start to start. Default: of the system; tests have their own.
  std::function<uint64_t()> random;
  // What is written is encrypted, with a key for each tenant: storage/FORMAT.md.
  LogKeyOptions key;
  // That a thread of its own reads, and checks, all the time. 0: there is none.
  uint64_t scrub_bytes_per_s = 0;
};

// A block to write. What it refers to must live until Append returns.
struct BlockToLog {
  std::string_view tenant;
  const BlockKey* key = nullptr;
  ByteDigest digest;
  std::span<const std::byte> bytes;  // at an address that is a multiple of kSectorBytes
  // Asked when nothing can come between the answer and the writing, for instance a purge; no: the
  // block is Cancelled. Null: it is wanted.
  std::function<bool()> still_wanted;
};

// Found by id alone: whether the whole key is the same is seen by Read.
struct LoggedBlockInfo {
  NamespaceDigest name_space;
  uint64_t bytes = 0;
  uint64_t born = 0;  // another one's is another number; changes when it is moved
};

struct LoggedBlockName {
  BlockId id, parent;
  NamespaceDigest name_space;
  uint64_t bytes = 0;
};

// A piece of a block: whole sectors. `out` is at an address that is a multiple of kSectorBytes;
// both `offset` and out.size() are multiples of it. The end may lie in the block's last sector,
// whose rest reads as zeros.
struct PieceToRead {
  uint64_t offset = 0;  // in the block
  std::span<std::byte> out;
};

// A block that can be read in pieces, and that reclaiming moves rather than drops while this is
// held. Has the tables of the block's sectors in memory, a thousandth of its bytes, or of an
// encrypted block four. Thread-safe; the log outlives it.
class LoggedBlockReader {
 public:
  virtual ~LoggedBlockReader() = default;
  virtual uint64_t bytes() const = 0;
  // Of the whole block, as its frames say.
  virtual const ByteDigest& digest() const = 0;
  // All pieces at once; each sector is checked. OK: all are right. NotFound: the block was purged,
  // or written anew, or dropped. DataLoss: something is not what was written; counted, logged, and
  // the block is gone from now on, as in BlockLog::Read. Unavailable: the disk. InvalidArgument: a
  // piece is not as PieceToRead says, or passes the block's end. What is in `out` after an error is
  // to be used by nobody.
  virtual absl::Status Read(std::span<const PieceToRead> pieces) = 0;
};

// Thread-safe. Calls that write (Append, Purge) wait for one another, for the disk, and for
// segments to be reclaimed; Read waits for the disk only. Every answer of Read is checked: place,
// generation, whole key and digests.
class BlockLog {
 public:
  // Formats a blank disk; recovers what a log has. FailedPrecondition: another thing's disk, a
  // version that this program does not know, or another key; nothing is changed then.
  // InvalidArgument names an option and its value; LoadLogKey's errors come as they are.
  static absl::StatusOr<std::unique_ptr<BlockLog>> Open(std::unique_ptr<Disk> disk,
                                                        const BlockLogOptions& options);
  virtual ~BlockLog() = default;

  // One group commit of all, or a few where segments end: when it returns, a block whose status is
  // OK is durable and can be found. DataLoss: the bytes do not have their digest; nothing of the
  // block is kept. InvalidArgument: as CheckSize says, or
  // its address. ResourceExhausted: no
  // segment could be had, or the disk is full; Unavailable: the disk failed; then the blocks behind
  // it are not tried. Of blocks of one id the last stays.
  virtual std::vector<absl::Status> Append(std::span<const BlockToLog> blocks) = 0;
  // As BlockStore::Purge; when it returns OK, the blocks never come back, and if all of a tenant's
  // were meant, the keys that they are encrypted with are overwritten. They cannot be found from
  // the call on, also if it fails. Returns how many there were.
  virtual absl::StatusOr<uint64_t> Purge(std::string_view tenant,
                                         const std::optional<NamespaceDigest>& name_space,
                                         std::span<const BlockId> blocks) = 0;

  // InvalidArgument: Append would never take a block of this key and so many bytes, at most an
  // eighth of the log.
  virtual absl::Status CheckSize(std::string_view tenant, const BlockKey& key,
                                 uint64_t bytes) const = 0;

  // Counts as a use, whoever answers it. False: it is not there.
  virtual bool Touch(std::string_view tenant, const BlockId& id) = 0;
  virtual std::optional<LoggedBlockInfo> Find(std::string_view tenant, const BlockId& id) const = 0;
  // At most `limit` of the tenant's blocks.
  virtual std::vector<LoggedBlockName> List(std::string_view tenant, uint32_t limit) const = 0;
  // The bytes of the block, info.bytes of them, and their digest. `out` is at an address that is a
  // multiple of kSectorBytes. NotFound: it is not there, or
  // under another key. DataLoss: it is not what was written; counted, logged, and gone from now on.
  // Unavailable: the disk. What is in `out` after an error is to be used by nobody.
  virtual absl::StatusOr<ByteDigest> Read(std::string_view tenant, const BlockKey& key,
                                          std::span<std::byte> out) = 0;
  // For reading in pieces. Reads frames only; counts as a use. NotFound, DataLoss and Unavailable
  // as Read. ResourceExhausted: blocks that are held so have as much of the log as they may, half
  // of its segments' bytes.
  virtual absl::StatusOr<std::unique_ptr<LoggedBlockReader>> OpenBlock(std::string_view tenant,
                                                                       const BlockKey& key) = 0;
  // Checks a next piece of what the log has: the footer and the purges of a sealed segment, or a
  // part of a block as Read does. What is not what was written is counted and logged, and such a
  // block is gone; what cannot be read is counted, and looked at again by the next pass. One caller
  // at a time: the scrubber's thread, where there is one.
  virtual ScrubStep ScrubNext() = 0;
  virtual BlockLogStats Stats() const = 0;
};

}  // namespace quarry

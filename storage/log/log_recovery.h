// What a log says of itself after a start.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "storage/disk/disk.h"
#include "storage/log/frames.h"
#include "storage/log/log_index.h"
#include "storage/log/log_key.h"
#include "storage/log/purge_table.h"
#include "storage/log/segment_table.h"
#include "storage/tenant_names.h"

namespace quarry {

struct RecoveredLog {
  Superblock superblock;
  LogIndex index;
  SegmentTable segments;
  PurgeTable purges;
  uint64_t next_sequence = 1;
  // Of tenants that were purged: their keys of before these sequences are to be gone.
  absl::flat_hash_map<TenantName, uint64_t> destroyed_keys;
  // For the log line and the metrics.
  uint32_t scanned_segments = 0;   // which had no footer
  uint64_t incomplete_blocks = 0;  // of which parts were never committed
  uint64_t hidden_blocks = 0;      // that may have been purged where it cannot be read
};

// The superblock of a disk, which is formatted in segments of these bytes first if it is blank, and
// with room for keys if there is one to wrap them with. Broken copies are written again.
// FailedPrecondition: something else is on it, or a log of another version, of a larger disk, or of
// another key.
absl::StatusOr<Superblock> OpenSuperblock(Disk* disk, uint64_t segment_bytes,
                                          const std::optional<LogKey>& key,
                                          const std::function<uint64_t()>& random);

// Reads the footers of sealed segments, and of others what was committed; these are sealed then.
// Blocks are those whose parts are all there, the latest of an id, and that no purge meant. A
// segment of which something cannot be read is condemned, and what can be read of it counts; what
// its note says may have been purged there is not found. Unavailable: nothing of any can be read.
absl::StatusOr<RecoveredLog> RecoverLog(Disk* disk, const Superblock& superblock,
                                        TenantNames* tenants);

}  // namespace quarry

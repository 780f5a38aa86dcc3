// What the disk tier has done and has.
#pragma once

#include <cstdint>

namespace quarry {

// Of the log on the disk. Bytes of blocks are without frames.
struct BlockLogStats {
  uint64_t capacity_bytes = 0;  // of all segments
  uint64_t segments = 0, free_segments = 0, condemned_segments = 0;
  uint64_t blocks = 0, bytes = 0;
  // Since the start, of callers; to the disk, frames and what was moved included.
  uint64_t appended_blocks = 0, appended_bytes = 0, written_bytes = 0;
  uint64_t moved_bytes = 0;  // by reclaiming
  uint64_t dropped_blocks = 0, dropped_bytes = 0;
  uint64_t read_blocks = 0, read_bytes = 0;
  uint64_t broken_blocks = 0;  // read, and not what was written
  uint64_t read_errors = 0, write_errors = 0;
  // Of the scrubber: read so far, passes that ended, segments of this one; what was found broken,
  // and could not be read.
  uint64_t scrubbed_bytes = 0, scrub_passes = 0, scrubbed_segments = 0;
  uint64_t scrub_broken = 0, scrub_read_errors = 0;
  uint64_t recovered_blocks = 0, incomplete_blocks = 0, scanned_segments = 0;
  uint64_t unreadable_keys = 0;  // of tenants, at the start
  uint64_t hidden_blocks = 0;  // not found until what may say that they were purged can be read
  double recovery_seconds = 0;
};

// Pages of blocks on the disk that are in RAM.
struct PageCacheStats {
  uint64_t capacity_bytes = 0, bytes = 0;
  // Pages, since the start: wanted and there, read, read past it by scans, given back; reads that
  // failed.
  uint64_t hits = 0, reads = 0, once = 0, evictions = 0, failures = 0;
};

struct DiskTierStats {
  BlockLogStats log;
  uint64_t queued_bytes = 0;       // that wait to be written
  uint64_t not_admitted = 0;       // blocks that were not queued, or that could not be written
  uint64_t promoted = 0;           // blocks read into RAM
  uint64_t failed_promotions = 0;  // a block was on the disk, and the look-up a miss
  double load_bytes_per_second = 0;  // what loads are expected to take
  PageCacheStats pages;
  bool refuses = false;            // for a while, after a write that failed
};

}  // namespace quarry

// Which live answers are audited, and what came of it.
#pragma once

#include <cstdint>

namespace quarry {

struct AuditOptions {
  // Of the answers to one KV head's queries that were given under a budget; 0: none.
  double fraction = 1.0 / 256;
  uint32_t threads = 1;  // of low priority
  uint32_t queue = 64;   // answers waiting; more are passed by
  // Indexes whose actual errors are mostly larger than so many times the predicted are learned
  // again.
  double drift_factor = 2;
};

struct AuditStats {
  uint64_t queued = 0;
  uint64_t done = 0;
  uint64_t full = 0;      // passed by: the queue was full, or the daemon drains
  uint64_t given_up = 0;  // the context was closed, or the answer was no number any more
  uint64_t drifts = 0;    // times that indexes were asked to be learned again
  uint64_t micros = 0;    // of all threads
};

}  // namespace quarry

// How runs are indexed, and what came of it.
#pragma once

#include <cstdint>

#include "cpu_index/index_choice.h"

namespace quarry {

struct IndexOptions {
  IndexChoice choice;
  uint32_t threads = 1;           // that build, of low priority
  uint32_t query_samples = 128;   // positions kept of each layer and KV head of a context
  uint64_t max_sample_bytes = 1ull << 30;  // of the queries of all contexts; no more are kept
  uint64_t max_bytes = 4ull << 30;  // of all indexes; runs beyond it are scanned
};

struct IndexStats {
  uint64_t queued_runs = 0;   // of which some layer is to be indexed, or is being indexed
  uint64_t indexed_runs = 0;  // that contexts use now, all layers indexed at least once
  uint64_t built = 0;         // indexes of one layer and KV head, since the start
  uint64_t relearned = 0;     // runs indexed anew, as often as the layer that was most often
  uint64_t failed = 0;        // heads that cannot have an index, or layers that found no room
  uint64_t waiting_layers = 0;  // of contexts, for which there is no room now
  uint64_t build_micros = 0;  // of all threads
  uint64_t bytes = 0;         // of the indexes that are held now
  uint64_t sample_bytes = 0;  // of the queries that contexts keep
  // Layers of runs whose indexes were written to the disk, came back from there, and were there and
  // could not be used, since the start.
  uint64_t saved_layers = 0, saved_bytes = 0, loaded_layers = 0, failed_loads = 0;
};

}  // namespace quarry

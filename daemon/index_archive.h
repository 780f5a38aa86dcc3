// IndexArchive: indexes of runs on the disk, from where they come back without being built.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "cpu_index/cluster_model.h"
#include "cpu_index/index_choice.h"
#include "daemon/index_archive_options.h"
#include "daemon/run_indexes.h"
#include "daemon/run_registry.h"
#include "proto/types.h"
#include "storage/log/block_log.h"

namespace quarry {

struct IndexArchiveStats {
  uint64_t saved_layers = 0, saved_bytes = 0;    // of runs, since the start
  uint64_t loaded_layers = 0, failed_loads = 0;  // there, and not to be used
};

// Each layer of a run's indexes is a block of the log with a key of its own, in a namespace that
// stands for the run's. Runs whose blocks were computed under several recipes are not kept. A
// thread of low priority looks for layers that were learned since they were written. Thread-safe.
class IndexArchive {
 public:
  // Log and registry outlive it. What was made by another choice is not found.
  IndexArchive(BlockLog* log, RunRegistry* runs, const IndexChoice& choice,
               const IndexArchiveOptions& options);
  // Writes what is not written yet.
  ~IndexArchive();
  IndexArchive(const IndexArchive&) = delete;
  IndexArchive& operator=(const IndexArchive&) = delete;

  // What Load reads, in bytes; none: it is not there. Does not wait for the disk.
  std::optional<uint64_t> Find(const RunName& run, uint32_t layer) const;

  struct Head {
    MadeIndex made;  // without an index: the head is scanned
    std::optional<RunIndexes::Learning> learned;
  };
  struct Layer {
    RunIndexes::Learning learned;
    std::vector<Head> heads;  // [kv_heads]
  };
  // known: by head, models that clusters share if theirs is the same. Every index fits the run's
  // tokens and head_dim. NotFound, DataLoss, InvalidArgument, Unavailable: a miss.
  using KnownModels = std::vector<std::vector<std::shared_ptr<const ClusterModel>>>;
  absl::StatusOr<Layer> Load(const RunName& run, uint32_t layer, const KnownModels& known);

  IndexArchiveStats stats() const;

 private:
  BlockKey KeyOf(const RunName& run, uint32_t layer) const;
  void Loop();
  // Of all runs that have not changed since the last look, or of all.
  enum class Which { kSettled, kAll };
  void SaveAll(Which which, absl::Time end);
  absl::Status Save(RunIndexes& indexes, std::span<const uint32_t> layers);

  BlockLog* const log_;
  RunRegistry* const runs_;
  const IndexChoice choice_;
  const IndexArchiveOptions options_;
  std::atomic<uint64_t> saved_layers_{0}, saved_bytes_{0}, loaded_layers_{0}, failed_loads_{0};
  // By indexes, when they were looked at last. Of the thread, and of the end behind it.
  absl::flat_hash_map<const RunIndexes*, uint64_t> changes_;
  absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last
};

}  // namespace quarry

// RunIndexer: builds the indexes of runs in the background.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "cpu_index/index_choice.h"
#include "daemon/index_options.h"
#include "daemon/query_samples.h"
#include "daemon/run_registry.h"

namespace quarry {

// Head by head, of runs in the order in which they came; each head is used as soon as it is built.
// A run that no context uses any more is left where it stands. Thread-safe.
class RunIndexer {
 public:
  // Where there is no room, indexes that no context uses are dropped from `runs`, which outlives it.
  RunIndexer(const IndexOptions& options, RunRegistry* runs);
  // Finishes the heads being built and lets go of what is queued.
  ~RunIndexer();
  RunIndexer(const RunIndexer&) = delete;
  RunIndexer& operator=(const RunIndexer&) = delete;

  // Has the run indexed, or indexed anew if many more queries are known than when it was, or other
  // ones. Nothing while it is being indexed.
  void Consider(const std::shared_ptr<const Run>& run, const KvShape& shape,
                const std::shared_ptr<const QuerySamples>& samples,
                RunIndexes::Why why = RunIndexes::Why::kMoreSamples);

  bool enabled() const { return options_.choice.kind != IndexKind::kExact; }
  const IndexOptions& options() const { return options_; }
  IndexStats stats() const;

 private:
  struct Job;

  void Loop();
  // The next head of a run; null: stop.
  std::shared_ptr<Job> NextHead(uint32_t* head);
  void BuildHead(Job& job, uint32_t head);
  absl::Status MakeRoom(uint64_t bytes);
  std::shared_ptr<const KeyIndex> Account(MadeIndex made);

  const IndexOptions options_;
  RunRegistry* const runs_;
  // Shared with the indexes' deleters: an index may outlive the indexer.
  const std::shared_ptr<std::atomic<uint64_t>> bytes_ = std::make_shared<std::atomic<uint64_t>>(0);
  std::atomic<uint64_t> built_{0}, relearned_{0}, failed_{0}, build_micros_{0};
  mutable absl::Mutex mutex_;
  std::deque<std::shared_ptr<Job>> queue_ ABSL_GUARDED_BY(mutex_);  // runs with heads to begin
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;  // last
};

}  // namespace quarry

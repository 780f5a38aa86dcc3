// RunIndexer: builds the indexes of runs in the background.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "cpu_index/index_choice.h"
#include "daemon/block_table.h"
#include "daemon/index_archive.h"
#include "daemon/index_options.h"
#include "daemon/index_room.h"
#include "daemon/query_samples.h"
#include "daemon/run_registry.h"

namespace quarry {

// Layer by layer and head by head, of runs in the order in which they came; each head is used as
// soon as it is built. Of each layer, runs of one context that are due together are learned from
// together; a run that comes later gets its first indexes with what its neighbours' have learned,
// until so much more is known that all are learned anew. Runs that no context uses any more are
// left where they stand; those for which there is no memory wait until there is. Thread-safe.
class RunIndexer {
 public:
  // Where there is no room, indexes that no context uses are dropped from `runs`. What `archive`
  // has is not built; null: nothing. Both outlive it.
  RunIndexer(const IndexOptions& options, RunRegistry* runs, IndexArchive* archive);
  // Finishes the heads being built and lets go of what is queued.
  ~RunIndexer();
  RunIndexer(const RunIndexer&) = delete;
  RunIndexer& operator=(const RunIndexer&) = delete;

  // Has one layer of the runs of a context, in token order, indexed, or indexed anew if many more
  // queries or tokens are known than when it was, or queries were renewed since. The layer's K and
  // V of these runs are there. Runs of which it is being indexed are left.
  void Consider(uint32_t layer, std::span<const RunUse> runs, const KvShape& shape,
                const std::shared_ptr<const QuerySamples>& samples);

  // Samples of one context, within the memory of all.
  std::shared_ptr<QuerySamples> MakeSamples(const KvShape& shape) const;
  // Waits until no head is being built of a run that no context uses any more, or so long: such a
  // run holds its blocks meanwhile. Heads of other runs begin later for it.
  void LetGo(absl::Duration longest);

  static bool Enabled(const IndexOptions& options) {
    return options.choice.kind != IndexKind::kExact && options.max_bytes > 0;
  }
  bool enabled() const { return Enabled(options_); }
  const IndexOptions& options() const { return options_; }
  IndexStats stats() const;

 private:
  struct Job;

  void Loop();
  // The next KV head of a job's layer, or kFromDisk: what is there of it comes first; null: stop.
  std::shared_ptr<Job> NextHead(uint32_t* head);
  std::shared_ptr<Job> NextOf(uint32_t* head) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // A layer of runs that is to be considered when there is room, as long as somebody uses one.
  struct Waiting {
    uint32_t layer = 0;
    KvShape shape;
    std::shared_ptr<const QuerySamples> samples;
    std::vector<std::weak_ptr<RunIndexes>> runs;
    uint64_t turn = 0;  // of those that wait, the lowest is first; 0: it comes last
    // That was too little when it was tried last, whatever is guessed: it takes more.
    uint64_t tried_room = 0;
  };
  // has_room: asked once, for the least that an index of what is due may take; without, the layer
  // waits, in its turn if it has waited `before`.
  void Consider(uint32_t layer, std::span<const RunUse> runs, const KvShape& shape,
                const std::shared_ptr<const QuerySamples>& samples,
                absl::FunctionRef<bool(uint64_t bytes)> has_room, const Waiting* before);
  void Wait(Waiting waiting) ABSL_LOCKS_EXCLUDED(mutex_);
  void ConsiderWaiting() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // When a job begins: it takes what is queued behind it that can be learned from together, and finds
  // a neighbour.
  void Prepare(Job* job) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void TakeLater(Job* job) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void BuildHead(Job& job, uint32_t kv_head);
  // Takes the parts out of the job whose indexes come from the disk.
  void LoadParts(const std::shared_ptr<Job>& job);
  struct Part;
  bool LoadPart(Job& job, Part& part);
  // False: it is to be built.
  bool KeepStored(const Job& job, const RunName& name, Part& part, const Run& run);
  // What one thread builds, and holds meanwhile.
  struct Building;
  // The job's runs that some context still wants and whose head is to be learned, as many of them
  // as there is room for.
  void Hold(Job& job, uint32_t kv_head, Building* building);
  // Of the first so many runs that are held. ResourceExhausted: one found no room after all.
  absl::Status BuildHeld(const Job& job, uint32_t kv_head, Building* building);
  // The next one.
  absl::Status Keep(const Job& job, uint32_t kv_head, MadeIndex* made, Building* building);
  // Neither it nor those behind it get an index.
  void GiveUp(const absl::Status& status, uint32_t kv_head, const Building& building, Job* job);
  void Release(Building* building);
  // Whether nobody but those that build hold one of the runs.
  bool AnyHeldAlone() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  uint64_t UnreservedRoom() const ABSL_LOCKS_EXCLUDED(mutex_);
  // What others are building now.
  uint64_t ReservedBytes() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const IndexOptions options_;
  RunRegistry* const runs_;
  IndexArchive* const archive_;
  IndexRoom room_;
  const std::shared_ptr<SampleMemory> sample_memory_;
  RunCounts counts_;
  std::atomic<uint64_t> built_{0}, failed_{0}, build_micros_{0};
  mutable absl::Mutex mutex_;
  std::deque<std::shared_ptr<Job>> queue_ ABSL_GUARDED_BY(mutex_);  // with heads to begin
  absl::flat_hash_map<std::pair<const QuerySamples*, uint32_t>, Waiting> waiting_
      ABSL_GUARDED_BY(mutex_);  // by samples and layer
  uint64_t turns_ ABSL_GUARDED_BY(mutex_) = 0;       // that were given to those that wait
  uint64_t look_at_ns_ ABSL_GUARDED_BY(mutex_) = 0;  // for their room, by SteadyNowNs
  std::vector<Building*> building_ ABSL_GUARDED_BY(mutex_);
  uint32_t releasing_ ABSL_GUARDED_BY(mutex_) = 0;   // threads that hold runs for a moment
  uint32_t letting_go_ ABSL_GUARDED_BY(mutex_) = 0;  // callers that wait for it; no head begins
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;  // last
};

}  // namespace quarry

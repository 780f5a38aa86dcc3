// AttendLane: one KV head of one layer, for all rows of a batch that ask for it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "cpu_index/cluster_search.h"
#include "cpu_index/key_index.h"
#include "cpu_index/partial.h"
#include "daemon/scan_plan.h"
#include "proto/retrieval_types.h"
#include "proto/types.h"

namespace quarry {

// What all queries of a lane have in common.
struct LaneKey {
  const KvShape* shape = nullptr;  // outlives the lane
  uint32_t layer = 0;
  uint32_t kv_head = 0;
  DType q_dtype = DType::kFp32;
  ScanKind kind = ScanKind::kExact;
  bool samples = false;  // Budget::kSoftmaxLift: tokens are drawn of those that indexes find
  // Budget::kError of indexed lanes, else 0: what no index estimates is attended first and whole.
  float tolerance = 0;
};

// The part of a row that falls to a lane: the query heads of one KV head's group.
struct LaneMember {
  const float* q = nullptr;  // [group][head_dim], widened; read when the lane is made
  Budget budget;
  uint32_t position = 0;  // of the query
  float* o = nullptr;    // [group][head_dim], written by Finish
  float* lse = nullptr;  // [group]
};

struct LaneResult {
  uint64_t tokens = 0, bytes = 0;
  float error_estimate = 0;
};

// Works in phases of tasks that any threads run in any order; partials are merged in the order of
// the units, so the answer does not depend on the threads. An exact lane scans its units. An
// indexed one scores its units, shares each query's budget out over them, then refines them. One
// with a tolerance first attends the units that no index estimates, and the `rest`, tokens that the
// answers will be merged with elsewhere: beside a long sum of these errors matter less. Then it
// searches the others, all at once that have the same members, turn and model, in parts; how
// many tokens may be read one by one is shared out over all searches of a query.
class AttendLane {
 public:
  // `units` and `rest` are PlanScan's answers for these members; indexes[u] may answer for unit u
  // (the exact scan: there is no other), and is asked throughout. All outlive the lane.
  // search_parts: into which the clusters of a search are cut, as far as there are runs.
  AttendLane(const LaneKey& key, std::span<const LaneMember> members,
             std::span<const ScanUnit> units, std::span<const KeyIndex* const> indexes,
             std::span<const ScanUnit> rest = {}, uint32_t search_parts = 1);
  ~AttendLane();

  const LaneKey& key() const { return key_; }
  uint64_t scan_bytes() const;
  // Its arithmetic, as the bytes that can be read meanwhile: more than scan_bytes() where many
  // queries share a scan.
  uint64_t work_bytes() const;

  // Of the current phase.
  uint32_t tasks() const;
  void RunTask(uint32_t task);
  // Counts a finished task; true for the last one of the phase: its caller alone goes on.
  bool TaskDone() { return tasks_left_.fetch_sub(1, std::memory_order_acq_rel) == 1; }
  // False after the last phase, and where it has failed.
  bool NextPhase();
  // Not OK: keys or values could not be read from the disk, and there is no answer.
  absl::Status status() const;

  // Writes the answers of the members; after the last phase, unless it has failed.
  void Finish();
  std::span<const LaneResult> results() const { return results_; }  // by member

 private:
  enum class Phase { kAttend, kScore, kAllocate, kRefine, kSearch, kSearchPart };
  // Units that are searched together.
  using Family = std::vector<uint32_t>;
  class View;
  class Queries;
  class FamilySearch;

  // Units of the lane, and behind them those of the rest.
  const ScanUnit& unit(uint32_t u) const {
    return u < units_.size() ? units_[u] : rest_[u - units_.size()];
  }
  void NoteRead(const absl::Status& status);
  void PickIndexes(std::span<const KeyIndex* const> indexes);
  void EnterPhase(Phase phase);
  void MeasureElsewhere();
  void Attend(uint32_t unit);
  void Score(uint32_t unit);
  void Allocate(uint32_t query);
  void Refine(uint32_t unit);
  void Search(uint32_t family);
  void SearchPart(uint32_t task);
  bool NextStage();
  void ShareCaps();
  void AddToFamily(uint32_t unit, const ClusterIndex* clusters);
  float ErrorOf(const Partial& total, uint32_t query) const;
  std::span<Partial> UnitPartials(uint32_t unit);
  void MergeUnit(uint32_t unit, std::span<Partial> totals);
  // One partial per query; in partials_, or merged into the two buffers.
  std::span<const Partial> MergeUnits(std::vector<Partial>* totals, std::vector<float>* acc);
  void ClearPartials(uint32_t unit);

  const LaneKey key_;
  const uint32_t group_;
  const std::span<const ScanUnit> units_, rest_;
  std::vector<const TokenIndex*> indexes_;      // per unit, also of the rest
  std::vector<const ClusterIndex*> clusters_;  // per unit; null: indexes_ has what is used
  std::vector<uint32_t> whole_, searched_;  // units, and of the rest, that are attended; searched
  std::vector<Family> families_;            // of the others
  bool shares_caps_ = false;                // several families read for a member with a cap
  const uint32_t search_parts_;
  std::vector<std::unique_ptr<FamilySearch>> searches_;  // per family; null: not in parts, or over
  std::vector<LaneMember> members_;
  std::vector<float> packed_q_;           // [member][group][head_dim], if there are several
  std::vector<uint32_t> first_slot_;      // per unit, of partials_; one past the end at the end
  std::vector<Partial> partials_;         // [unit][slot][group]
  std::unique_ptr<float[]> acc_;          // [partial][head_dim], cleared by who scans
  std::vector<CoarseScores> coarse_;      // indexed lanes: per unit
  std::vector<RunAllotment> allotments_;  // indexed lanes: per unit
  std::vector<LaneResult> results_;
  std::vector<float> lost_mass_;  // indexed lanes: per query, of all members' groups
  std::vector<float> elsewhere_;  // with a tolerance: per query, as ClusterLimits::other_length
  Phase phase_;
  std::atomic<uint32_t> tasks_left_;
  std::atomic<bool> failed_{false};
  mutable absl::Mutex status_mutex_;
  absl::Status status_ ABSL_GUARDED_BY(status_mutex_);  // of the first that failed
};

}  // namespace quarry

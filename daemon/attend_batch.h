// AttendBatch: one call of Engine::Attend, from its rows to its answers.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "daemon/attend_lane.h"
#include "daemon/auditor.h"
#include "daemon/context_table.h"
#include "daemon/engine_counters.h"
#include "daemon/executor.h"
#include "daemon/scan_plan.h"
#include "daemon/session_table.h"
#include "proto/retrieval_types.h"

namespace quarry {

// The rows are admitted (checked, copied, their tokens stored) on the calling thread, planned as
// lanes, and scanned by the executor or, small ones, by the calling thread.
class AttendBatch final : public Executor::Job, public std::enable_shared_from_this<AttendBatch> {
 public:
  struct Params {
    std::shared_ptr<Session> session;
    std::span<const AttendRow> rows;
    std::span<AttendAnswer> answers;
    std::function<void()> done;
    uint32_t task_tokens = 0;
    uint64_t inline_bytes = 0;
    uint64_t max_scratch_bytes = 0;
    std::atomic<uint64_t>* scratch_bytes = nullptr;  // of all batches in flight
    EngineCounters* counters = nullptr;
    Auditor* auditor = nullptr;
  };
  AttendBatch(Params params, const ContextTable& contexts);

  // Runs the batch; `done` has run, or will on the thread that scans last. Where rows read pages of
  // the disk it is left to `paged`, and the caller does none of it; null: there are no pages.
  void Start(Executor& executor, Executor* paged);
  void RunTask(uint32_t task) override;

 private:
  class PhaseJob;
  struct AdmittedRow {
    uint32_t index = 0;  // in the batch
    std::shared_ptr<Context> context;
    std::shared_ptr<const BlockTable> table;
    size_t q_offset = 0;
    ScanKind kind = ScanKind::kExact;
    uint32_t rest_hi = 0;  // behind the last token that the query may see
  };
  struct LaneSeat {  // one KV head of one admitted row
    LaneKey key;
    uint32_t row = 0;  // in admitted_
  };
  struct Task {
    AttendLane* lane;
    uint32_t index;  // of the lane's first phase
  };
  struct Plan {
    std::vector<uint32_t> rows;  // in admitted_
    ScanKind kind;
    float tolerance = 0;
    std::vector<ScanUnit> units;
    std::vector<ScanUnit> rest;  // as AttendLane's
  };

  absl::Status Admit(const AttendRow& row, AttendAnswer& answer, AdmittedRow* admitted);
  absl::Status ChargeScratch(const AttendRow& row, ScanKind kind, const KvShape& shape);
  absl::Status TakeQueries(const AttendRow& row, size_t floats);
  void PlanLanes(uint32_t threads);
  std::vector<LaneSeat> Seats() const;
  const Plan& PlanFor(std::span<const LaneSeat> seats);
  void PlanRest(Plan* plan) const;
  void AddLane(std::span<const LaneSeat> seats, uint32_t search_parts);
  bool ReadsPages() const;
  bool cancelled();
  void RunLaneTask(AttendLane& lane, uint32_t task);
  void PhaseDone(AttendLane& lane);
  void OfferAudits();
  void Finish();
  void FailAdmitted(const absl::Status& status);
  // Rows whose keys or values could not be read.
  void FailUnread();

  const Params params_;
  const ContextTable& contexts_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();

  // Constant once Start has planned.
  std::vector<float> q_;  // of all admitted rows, [heads][head_dim] each
  std::vector<AdmittedRow> admitted_;
  std::deque<Plan> plans_;
  std::vector<std::shared_ptr<const KeyIndex>> indexes_;  // what lanes search
  std::deque<AttendLane> lanes_;
  std::vector<std::vector<uint32_t>> lane_rows_;  // per lane, of admitted_
  std::vector<Task> tasks_;
  uint64_t charged_ = 0;  // of *params_.scratch_bytes
  Executor* executor_ = nullptr;  // null: answered by the caller alone

  std::atomic<uint32_t> lanes_left_{0};
  std::atomic<bool> cancelled_{false};
};

}  // namespace quarry

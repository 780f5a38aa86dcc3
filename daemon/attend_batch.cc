#include "daemon/attend_batch.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "daemon/finite.h"
#include "daemon/run_registry.h"
#include "proto/attend_shape.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Whether any run of the row's range has an index.
bool HasIndex(const AttendRow& row, const KvShape& shape, const BlockTable& table) {
  const uint32_t first = row.first_head / shape.group();
  for (const RunUse& use : table.runs) {
    if (Intersect(use.tokens, row.range).empty()) continue;
    for (uint32_t h = first; h < first + row.heads / shape.group(); ++h) {
      if (use.run->indexes()->Get(row.layer, h) != nullptr) return true;
    }
  }
  return false;
}

// A budget that every token of the range fits into is the exact answer, and so is one of error
// where nothing estimates.
ScanKind KindOf(const AttendRow& row, const KvShape& shape, const BlockTable& table) {
  const bool holds_all = row.budget.k >= row.range.size();
  switch (row.budget.kind) {
    case Budget::Kind::kUnlimited:
      return ScanKind::kExact;
    case Budget::Kind::kFixedK:
      return holds_all ? ScanKind::kExact : ScanKind::kIndexed;
    case Budget::Kind::kTopP:
      return row.budget.mass >= 1 && (row.budget.k == 0 || holds_all) ? ScanKind::kExact
                                                                      : ScanKind::kIndexed;
    case Budget::Kind::kError:
      return HasIndex(row, shape, table) ? ScanKind::kIndexed : ScanKind::kExact;
    case Budget::Kind::kDipr:
      return ScanKind::kIndexed;
    case Budget::Kind::kSoftmaxLift:
      return holds_all ? ScanKind::kExact : ScanKind::kIndexed;
  }
  return ScanKind::kExact;
}

// A row over no tokens needs no room: its caller may know the answer.
bool HasRoom(const AttendRow& row, const AttendAnswer& answer, size_t floats) {
  if (row.range.empty() && answer.o.empty() && answer.lse.empty()) return true;
  return answer.o.size() == floats && answer.lse.size() == row.heads;
}

void AnswerEmpty(const AttendRow& row, AttendAnswer& answer) {
  std::fill(answer.o.begin(), answer.o.end(), 0.0f);
  std::fill(answer.lse.begin(), answer.lse.end(), kEmptyLse);
  answer.covered = row.range;
}

}  // namespace

// A later phase of one lane.
class AttendBatch::PhaseJob final : public Executor::Job {
 public:
  PhaseJob(std::shared_ptr<AttendBatch> batch, AttendLane& lane)
      : Job(lane.tasks()), batch_(std::move(batch)), lane_(lane) {}
  void RunTask(uint32_t task) override { batch_->RunLaneTask(lane_, task); }

 private:
  const std::shared_ptr<AttendBatch> batch_;
  AttendLane& lane_;
};

AttendBatch::AttendBatch(Params params, const ContextTable& contexts)
    : params_(std::move(params)), contexts_(contexts) {}

void AttendBatch::Start(Executor& executor, Executor* paged) {
  if (executor.full()) {
    params_.counters->refused_batches.fetch_add(1, std::memory_order_relaxed);
    for (AttendAnswer& answer : params_.answers) {
      answer.status = absl::ResourceExhaustedError(
          absl::StrCat("attend queue is full with ", executor.queued_jobs(), " batches"));
    }
    return Finish();
  }
  size_t q_floats = 0;
  for (const AttendAnswer& answer : params_.answers) q_floats += answer.o.size();
  q_.reserve(q_floats);
  for (uint32_t i = 0; i < params_.rows.size(); ++i) {
    AttendAnswer& answer = params_.answers[i];
    answer.covered = {};
    answer.tokens_attended = answer.bytes_touched = 0;
    answer.shifted_tokens = 0;
    answer.error_estimate = 0;
    AdmittedRow admitted{i};
    answer.status = Admit(params_.rows[i], answer, &admitted);
    if (!answer.status.ok()) continue;
    if (params_.rows[i].range.empty()) {
      AnswerEmpty(params_.rows[i], answer);
    } else {
      admitted_.push_back(std::move(admitted));
    }
  }
  if (admitted_.empty()) return Finish();

  PlanLanes(executor.threads());
  uint64_t bytes = 0;
  for (const AttendLane& lane : lanes_) bytes += std::max(lane.scan_bytes(), lane.work_bytes());
  lanes_left_.store(static_cast<uint32_t>(lanes_.size()), std::memory_order_relaxed);
  set_tasks(static_cast<uint32_t>(tasks_.size()));
  if (ReadsPages()) {
    executor_ = paged;
    if (paged->Submit(shared_from_this())) return;
    FailAdmitted(absl::ResourceExhaustedError(absl::StrCat(
        "queue of attends that read the disk is full with ", paged->queued_jobs(), " batches")));
    return Finish();
  }
  if (bytes > params_.inline_bytes) {
    executor_ = &executor;
    if (executor.Submit(shared_from_this())) return;
    // Filled since it was asked above: nobody helps, but no stored token becomes void.
  }
  Help();
}

absl::Status AttendBatch::Admit(const AttendRow& row, AttendAnswer& answer, AdmittedRow* admitted) {
  QUARRY_ASSIGN_OR_RETURN(admitted->context,
                          contexts_.Find(params_.session->tenant(), row.context));
  Context& context = *admitted->context;
  const KvShape& s = context.shape();
  QUARRY_RETURN_IF_ERROR(CheckRow(row, s));
  QUARRY_RETURN_IF_ERROR(CheckHasQueries(row));
  const size_t q_floats = size_t{row.heads} * s.head_dim;
  if (!HasRoom(row, answer, q_floats)) {
    return absl::InvalidArgumentError(absl::StrCat("room for ", answer.o.size(), " and ",
                                                   answer.lse.size(), " numbers of o and lse of ",
                                                   row.heads, " heads of ", s.head_dim));
  }
  QUARRY_ASSIGN_OR_RETURN(admitted->table, context.Table());
  const uint32_t first_kv_head = row.first_head / s.group();
  const uint32_t kv_heads = row.heads / s.group();
  uint64_t available = context.AvailableTokens(row.layer, first_kv_head, kv_heads);
  if (row.has_token) available = std::max(available, uint64_t{row.token_position} + 1);
  if (row.range.hi > available) {
    return absl::InvalidArgumentError(
        absl::StrCat("context ", row.context.value, ": row of tokens [", row.range.lo, ", ",
                     row.range.hi, ") of layer ", row.layer, ", which has ", available));
  }
  admitted->kind = KindOf(row, s, *admitted->table);
  admitted->rest_hi = static_cast<uint32_t>(
      std::min({available, uint64_t{row.token_position} + 1,
                uint64_t{admitted->table->blocks.size()} * kBlockTokens}));
  admitted->q_offset = q_.size();
  absl::Status status;
  if (!row.range.empty()) {
    QUARRY_RETURN_IF_ERROR(ChargeScratch(row, admitted->kind, s));
    status = TakeQueries(row, q_floats);
  }
  const float* const q = q_.data() + admitted->q_offset;
  if (status.ok() && row.has_token) {
    // Last, so that a row that fails stores no token.
    status =
        context.AppendToken(row.layer, first_kv_head, kv_heads, row.token_position, row.k, row.v);
  }
  if (!status.ok()) {
    q_.resize(admitted->q_offset);
  } else if (!row.range.empty()) {
    context.SampleQueries(row.layer, first_kv_head, kv_heads, q);
  }
  return status;
}

// What the row's answer will need beside the arena, before any of it is allocated.
absl::Status AttendBatch::ChargeScratch(const AttendRow& row, ScanKind kind,
                                        const KvShape& shape) {
  const uint64_t tokens = row.range.size();
  const uint64_t units = tokens / UnitTokens(row.range.size(), params_.task_tokens) + 2;
  uint64_t query = 4 * shape.head_dim + units * (4 * shape.head_dim + sizeof(Partial));
  if (kind == ScanKind::kIndexed) query += 4 * tokens;  // scores
  const uint64_t bytes = row.heads * query;
  const uint64_t used = params_.scratch_bytes->fetch_add(bytes) + bytes;
  charged_ += bytes;
  if (used <= params_.max_scratch_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("attends in flight and this row of ", tokens, " tokens and ", row.heads,
                   " heads need ", used, " bytes, engine.max_attend_scratch_bytes is ",
                   params_.max_scratch_bytes));
}

absl::Status AttendBatch::TakeQueries(const AttendRow& row, size_t floats) {
  q_.resize(q_.size() + floats);
  if (WidenFinite(row.q_dtype, row.q, floats, q_.data() + q_.size() - floats)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "context ", row.context.value, ": NaN or infinity in a query of layer ", row.layer));
}

std::vector<AttendBatch::LaneSeat> AttendBatch::Seats() const {
  std::vector<const KvShape*> shapes;  // one pointer per shape, so that keys compare by it
  std::vector<LaneSeat> seats;
  for (uint32_t r = 0; r < admitted_.size(); ++r) {
    const AttendRow& row = params_.rows[admitted_[r].index];
    const KvShape& s = admitted_[r].context->shape();
    auto shape =
        std::find_if(shapes.begin(), shapes.end(), [&](const KvShape* seen) { return *seen == s; });
    if (shape == shapes.end()) shape = shapes.insert(shapes.end(), &s);
    const uint32_t first = row.first_head / s.group();
    for (uint32_t h = first; h < first + row.heads / s.group(); ++h) {
      const bool indexed = admitted_[r].kind == ScanKind::kIndexed;
      const bool samples = indexed && row.budget.kind == Budget::Kind::kSoftmaxLift;
      const float tolerance =
          indexed && row.budget.kind == Budget::Kind::kError ? row.budget.error : 0;
      seats.push_back(
          {{*shape, row.layer, h, row.q_dtype, admitted_[r].kind, samples, tolerance}, r});
    }
  }
  if (admitted_.size() > 1) {
    const auto order = [&](const LaneSeat& seat) {
      const auto shape = std::find(shapes.begin(), shapes.end(), seat.key.shape);
      return std::tuple(shape - shapes.begin(), seat.key.kind, seat.key.samples,
                        seat.key.tolerance, seat.key.q_dtype, seat.key.layer, seat.key.kv_head,
                        seat.row);
    };
    std::sort(seats.begin(), seats.end(),
              [&](const LaneSeat& a, const LaneSeat& b) { return order(a) < order(b); });
  }
  return seats;
}

void AttendBatch::PlanLanes(uint32_t threads) {
  const std::vector<LaneSeat> seats = Seats();
  const auto same = [](const LaneKey& a, const LaneKey& b) {
    return a.shape == b.shape && a.layer == b.layer && a.kv_head == b.kv_head &&
           a.q_dtype == b.q_dtype && a.kind == b.kind && a.samples == b.samples &&
           a.tolerance == b.tolerance;
  };
  std::vector<std::span<const LaneSeat>> lanes;
  for (size_t lo = 0, hi = 0; lo < seats.size(); lo = hi) {
    for (hi = lo + 1; hi < seats.size() && same(seats[lo].key, seats[hi].key);) ++hi;
    lanes.push_back(std::span(seats).subspan(lo, hi - lo));
  }
  // So many that no thread is idle, the caller's neither.
  const auto parts = static_cast<uint32_t>(threads / lanes.size() + 1);
  for (const std::span<const LaneSeat> lane : lanes) AddLane(lane, parts);
}

const AttendBatch::Plan& AttendBatch::PlanFor(std::span<const LaneSeat> seats) {
  // The KV heads of a layer mostly have the same rows: one plan serves them all.
  const LaneKey& key = seats.front().key;
  if (!plans_.empty() && plans_.back().kind == key.kind &&
      plans_.back().tolerance == key.tolerance &&
      std::equal(seats.begin(), seats.end(), plans_.back().rows.begin(), plans_.back().rows.end(),
                 [](const LaneSeat& seat, uint32_t row) { return seat.row == row; })) {
    return plans_.back();
  }
  Plan& plan = plans_.emplace_back();
  plan.kind = key.kind;
  plan.tolerance = key.tolerance;
  std::vector<ScanMember> members;
  for (const LaneSeat& seat : seats) {
    plan.rows.push_back(seat.row);
    const AdmittedRow& row = admitted_[seat.row];
    members.push_back({row.table.get(), params_.rows[row.index].range});
  }
  plan.units = PlanScan(members, plan.kind, params_.task_tokens);
  if (plan.tolerance > 0) PlanRest(&plan);
  return plan;
}

void AttendBatch::PlanRest(Plan* plan) const {
  std::vector<ScanMember> parts;  // two of each row: before its range, and behind it
  for (uint32_t r : plan->rows) {
    const AttendRow& row = params_.rows[admitted_[r].index];
    const BlockTable* table = admitted_[r].table.get();
    const std::array<TokenRange, 2> rest =
        row.merged ? RestBeside(row.range, admitted_[r].rest_hi) : std::array<TokenRange, 2>{};
    for (const TokenRange& part : rest) parts.push_back({table, part});
  }
  plan->rest = PlanScan(parts, ScanKind::kExact, params_.task_tokens);
  for (ScanUnit& unit : plan->rest) {
    for (uint32_t& member : unit.members) member /= 2;
  }
}

void AttendBatch::AddLane(std::span<const LaneSeat> seats, uint32_t search_parts) {
  const Plan& plan = PlanFor(seats);
  const LaneKey& key = seats.front().key;
  const size_t group = key.shape->group();
  const size_t head_dim = key.shape->head_dim;
  std::vector<LaneMember> members;
  for (const LaneSeat& seat : seats) {
    const AdmittedRow& admitted = admitted_[seat.row];
    const AttendRow& row = params_.rows[admitted.index];
    const AttendAnswer& answer = params_.answers[admitted.index];
    const size_t head = key.kv_head * group - row.first_head;  // within the row
    members.push_back({q_.data() + admitted.q_offset + head * head_dim, row.budget,
                       row.token_position, answer.o.data() + head * head_dim, answer.lse.data() + head});
  }
  std::vector<const KeyIndex*> indexes;
  for (const ScanUnit& unit : plan.units) {
    std::shared_ptr<const KeyIndex> index;
    if (unit.run != nullptr) index = unit.run->indexes()->Get(key.layer, key.kv_head);
    indexes.push_back(index == nullptr ? &ExactScan() : index.get());
    if (index != nullptr) indexes_.push_back(std::move(index));
  }
  AttendLane& lane = lanes_.emplace_back(key, members, plan.units, indexes, plan.rest,
                                         search_parts);
  lane_rows_.push_back(plan.rows);
  for (uint32_t i = 0; i < lane.tasks(); ++i) tasks_.push_back({&lane, i});
}

bool AttendBatch::ReadsPages() const {
  return std::any_of(admitted_.begin(), admitted_.end(), [&](const AdmittedRow& row) {
    const uint32_t paged_end = row.table->paged_end;
    return params_.rows[row.index].range.lo < paged_end ||
           (params_.rows[row.index].merged && paged_end > 0);  // what it is merged with may be read
  });
}

bool AttendBatch::cancelled() {
  if (params_.session->ended()) cancelled_.store(true, std::memory_order_relaxed);
  return cancelled_.load(std::memory_order_relaxed);
}

void AttendBatch::RunTask(uint32_t task) { RunLaneTask(*tasks_[task].lane, tasks_[task].index); }

void AttendBatch::RunLaneTask(AttendLane& lane, uint32_t task) {
  if (!cancelled()) lane.RunTask(task);
  if (lane.TaskDone()) PhaseDone(lane);
}

void AttendBatch::PhaseDone(AttendLane& lane) {
  if (!cancelled() && lane.NextPhase()) {
    auto job = std::make_shared<PhaseJob>(shared_from_this(), lane);
    // A full queue only means that nobody helps.
    if (executor_ == nullptr || !executor_->Submit(job)) job->Help();
    return;
  }
  if (!cancelled() && lane.status().ok()) lane.Finish();
  if (lanes_left_.fetch_sub(1, std::memory_order_acq_rel) == 1) Finish();
}

void AttendBatch::FailUnread() {
  for (size_t l = 0; l < lanes_.size() && !admitted_.empty(); ++l) {
    const absl::Status status = lanes_[l].status();
    if (status.ok()) continue;
    for (const uint32_t r : lane_rows_[l]) {
      params_.answers[admitted_[r].index].status.Update(status);
    }
  }
}

void AttendBatch::FailAdmitted(const absl::Status& status) {
  for (const AdmittedRow& row : admitted_) params_.answers[row.index].status = status;
  admitted_.clear();
}

// Copies what the auditor drew, before the buffers are their client's again.
void AttendBatch::OfferAudits() {
  for (size_t l = 0; l < lanes_.size() && !admitted_.empty(); ++l) {
    const LaneKey& key = lanes_[l].key();
    for (size_t m = 0; m < lane_rows_[l].size() && key.kind == ScanKind::kIndexed; ++m) {
      // An audit reads all tokens: not from the disk.
      if (admitted_[lane_rows_[l][m]].table->paged_end > 0) continue;
      if (!params_.auditor->Draw()) continue;
      const AdmittedRow& admitted = admitted_[lane_rows_[l][m]];
      const AttendRow& row = params_.rows[admitted.index];
      const AttendAnswer& answer = params_.answers[admitted.index];
      const size_t group = key.shape->group(), floats = group * key.shape->head_dim;
      const size_t head = key.kv_head * group - row.first_head;  // within the row
      const float* const q = q_.data() + admitted.q_offset + head * key.shape->head_dim;
      const float* const o = answer.o.data() + head * key.shape->head_dim;
      const float* const lse = answer.lse.data() + head;
      params_.auditor->Offer({admitted.context,
                              key.layer,
                              key.kv_head,
                              row.range,
                              row.budget,
                              key.q_dtype,
                              {q, q + floats},
                              {o, o + floats},
                              {lse, lse + group},
                              lanes_[l].results()[m].error_estimate,
                              row.merged,
                              admitted.rest_hi});
    }
  }
}

void AttendBatch::Finish() {
  if (cancelled_.load(std::memory_order_relaxed)) {
    FailAdmitted(
        absl::CancelledError(absl::StrCat("session ", params_.session->id().value, " ended")));
  }
  for (size_t l = 0; l < lanes_.size() && !admitted_.empty(); ++l) {
    const std::span<const LaneResult> results = lanes_[l].results();
    for (size_t m = 0; m < results.size(); ++m) {
      AttendAnswer& answer = params_.answers[admitted_[lane_rows_[l][m]].index];
      answer.tokens_attended += results[m].tokens;
      answer.bytes_touched += results[m].bytes;
      answer.error_estimate = std::max(answer.error_estimate, results[m].error_estimate);
    }
  }
  FailUnread();
  uint64_t failures = 0, tokens = 0, bytes = 0, shifted_rows = 0;
  for (const AdmittedRow& row : admitted_) {
    AttendAnswer& answer = params_.answers[row.index];
    if (!answer.status.ok()) continue;
    answer.covered = params_.rows[row.index].range;
    answer.shifted_tokens = row.table->PlacedTokens(answer.covered);
    shifted_rows += answer.shifted_tokens > 0 ? 1 : 0;
    tokens += answer.tokens_attended;
    bytes += answer.bytes_touched;
  }
  for (const AttendAnswer& answer : params_.answers) failures += !answer.status.ok();
  EngineCounters& c = *params_.counters;
  c.attend_rows.fetch_add(params_.rows.size(), std::memory_order_relaxed);
  c.attend_failures.fetch_add(failures, std::memory_order_relaxed);
  c.attend_tokens.fetch_add(tokens, std::memory_order_relaxed);
  c.attend_shifted_rows.fetch_add(shifted_rows, std::memory_order_relaxed);
  c.attend_bytes.fetch_add(bytes, std::memory_order_relaxed);
  c.attend.Add(std::chrono::steady_clock::now() - start_);
  OfferAudits();
  // What the rows read is given back before anybody learns that they are answered. A parked executor
  // keeps its last batch.
  admitted_.clear();
  indexes_.clear();
  params_.scratch_bytes->fetch_sub(charged_);
  params_.done();
}

}  // namespace quarry

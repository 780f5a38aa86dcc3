#include "daemon/attend_slot.h"

#include <cstring>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/steady_clock.h"
#include "proto/attend_shape.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr size_t kMaxCachedContexts = 4096;

// Buffers of a message: whole, inside the slot, behind its rows, aligned.
class SlotBuffers {
 public:
  SlotBuffers(std::byte* slot, uint64_t slot_bytes, uint64_t first)
      : slot_(slot), slot_bytes_(slot_bytes), first_(first) {}

  absl::StatusOr<std::byte*> At(std::string_view what, uint64_t offset, uint64_t bytes) const {
    if (offset % 4 != 0 || offset < first_ || offset > slot_bytes_ ||
        bytes > slot_bytes_ - offset) {
      return absl::InvalidArgumentError(absl::StrCat(
          absl::string_view(what.data(), what.size()), ": ", bytes, " bytes at offset ", offset,
          " are not 4-byte aligned inside [", first_, ", ", slot_bytes_, ")"));
    }
    return slot_ + offset;
  }

  uint64_t size() const { return slot_bytes_; }

 private:
  std::byte* const slot_;
  const uint64_t slot_bytes_;
  const uint64_t first_;  // after the header and the rows
};

absl::StatusOr<Channel::ContextFacts> FactsOf(Engine& engine, Channel& channel, ContextId context) {
  // Context ids are never reused and these facts never change; a closed context's stale entry only
  // lets the engine say NotFound itself.
  auto& contexts = channel.contexts();
  if (const auto it = contexts.find(context.value); it != contexts.end()) return it->second;
  QUARRY_ASSIGN_OR_RETURN(const ContextInfo info, engine.Info(channel.owner().session, context));
  if (contexts.size() >= kMaxCachedContexts) contexts.clear();
  return contexts[context.value] = {info.shape, info.shifted_tokens > 0};
}

AttendRow ToRow(const shm::AttendRowPod& pod) {
  AttendRow row;
  row.context = {pod.context};
  row.layer = pod.layer;
  row.range = {pod.range_lo, pod.range_hi};
  row.first_head = pod.first_head;
  row.heads = pod.heads;
  row.budget.kind = static_cast<Budget::Kind>(pod.budget_kind);
  row.budget.k = pod.budget_k;
  row.budget.mass = row.budget.error = row.budget.beta = pod.budget_amount;
  row.budget.seed = pod.budget_seed;
  row.merged = pod.merged != 0;
  row.q_dtype = static_cast<DType>(pod.q_dtype);
  row.has_token = pod.has_token != 0;
  row.token_position = pod.token_position;
  return row;
}

absl::Status AddRow(Engine& engine, Channel& channel, const SlotBuffers& buffers,
                    const shm::AttendRowPod& pod, SlotState* state) {
  AttendRow row = ToRow(pod);
  if (pod.has_token > 1 || pod.merged > 1) {
    return absl::InvalidArgumentError("has_token and merged must be 0 or 1");
  }
  if (channel.geometry().version < 2 &&
      (row.budget.kind > Budget::Kind::kTopP || pod.merged != 0 || pod.budget_seed != 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("budget kind ", pod.budget_kind, ", merged ", pod.merged, " and seed ",
                     pod.budget_seed, " on a channel of version 1"));
  }
  QUARRY_ASSIGN_OR_RETURN(const Channel::ContextFacts context,
                          FactsOf(engine, channel, row.context));
  if (context.shifted && channel.geometry().version < 3) {
    return absl::FailedPreconditionError(absl::StrCat(
        "context ", row.context.value, " has tokens of other positions: a channel of version ",
        channel.geometry().version, " has no room to say so in answers"));
  }
  QUARRY_ASSIGN_OR_RETURN(const AttendRowBytes bytes, BytesOfRow(row, context.shape));
  AttendAnswer answer;
  // Rows that share their buffers could ask for more than any slot holds.
  state->claimed_bytes += bytes.q + 2 * bytes.kv + bytes.o + bytes.lse;
  if (state->claimed_bytes > buffers.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the buffers of the message's rows have ", state->claimed_bytes,
        " bytes in a slot of ", buffers.size(), ": they must not overlap"));
  }
  if (!row.range.empty()) {  // else the client knows the answer, and neither q nor o is moved
    QUARRY_ASSIGN_OR_RETURN(row.q, buffers.At("q", pod.q_offset, bytes.q));
    QUARRY_ASSIGN_OR_RETURN(std::byte* const o, buffers.At("o", pod.o_offset, bytes.o));
    QUARRY_ASSIGN_OR_RETURN(std::byte* const lse, buffers.At("lse", pod.lse_offset, bytes.lse));
    answer.o = {reinterpret_cast<float*>(o), bytes.o / sizeof(float)};
    answer.lse = {reinterpret_cast<float*>(lse), bytes.lse / sizeof(float)};
  }
  if (row.has_token) {
    QUARRY_ASSIGN_OR_RETURN(row.k, buffers.At("k", pod.k_offset, bytes.kv));
    QUARRY_ASSIGN_OR_RETURN(row.v, buffers.At("v", pod.v_offset, bytes.kv));
  }
  state->rows.push_back(row);
  state->answers.push_back(std::move(answer));
  return absl::OkStatus();
}

// Runs once, on whichever thread wrote the last answer.
void Finish(TransportCounters& counters, SlotState& state) {
  // After Answer the slot's state belongs to the poller again; `keep` holds the memory until then.
  const std::shared_ptr<Channel> keep = std::move(state.keep);
  for (size_t i = 0; i < state.answers.size(); ++i) {
    const AttendAnswer& answer = state.answers[i];
    shm::AttendAnswerPod& pod = state.replies[state.answer_index[i]];
    pod.status = static_cast<uint32_t>(answer.status.code());
    pod.covered_lo = answer.covered.lo;
    pod.covered_hi = answer.covered.hi;
    pod.tokens_attended = answer.tokens_attended;
    pod.bytes_touched = answer.bytes_touched;
    pod.error_estimate = answer.error_estimate;
    pod.shifted_tokens = answer.shifted_tokens;
  }
  const Submission request = state.submission;
  const size_t bytes = state.replies.size() * sizeof(shm::AttendAnswerPod);
  std::memcpy(keep->payload(request.slot).data(), state.replies.data(), bytes);
  counters.shm_attend.Observe(SteadyNowNs() - request.seen_ns);
  keep->Answer(request, absl::StatusCode::kOk, bytes);
}

}  // namespace

void ServeAttend(Engine& engine, TransportCounters& counters, std::shared_ptr<Channel> channel,
                 const Submission& request) {
  std::byte* const slot = channel->slot(request.slot);
  const uint64_t slot_bytes = channel->geometry().slot_bytes;
  const auto header = CopyOnce<shm::AttendHeader>(slot + shm::kSlotPayload);
  const uint64_t rows_offset = shm::kSlotPayload + sizeof(shm::AttendHeader);
  const uint64_t rows_end = rows_offset + uint64_t{header.rows} * sizeof(shm::AttendRowPod);
  if (header.rows == 0 || header.rows > shm::kMaxRows ||
      rows_end > shm::kSlotPayload + request.request_bytes) {
    counters.shm_request_errors.fetch_add(1, std::memory_order_relaxed);
    return channel->AnswerError(
        request, absl::InvalidArgumentError(absl::StrCat(header.rows, " rows in a request of ",
                                                         request.request_bytes, " bytes; 1 to ",
                                                         shm::kMaxRows, " that fit are allowed")));
  }
  SlotState& state = channel->state(request.slot);
  state.submission = request;
  state.rows.clear();
  state.answers.clear();
  state.answer_index.clear();
  state.claimed_bytes = 0;
  state.replies.assign(header.rows, shm::AttendAnswerPod{});
  const SlotBuffers buffers(slot, slot_bytes, rows_end);
  for (uint32_t i = 0; i < header.rows; ++i) {
    const auto pod =
        CopyOnce<shm::AttendRowPod>(slot + rows_offset + i * sizeof(shm::AttendRowPod));
    state.replies[i].generation = request.generation;
    const absl::Status added = AddRow(engine, *channel, buffers, pod, &state);
    if (added.ok()) {
      state.answer_index.push_back(i);
    } else {
      state.replies[i].status = static_cast<uint32_t>(added.code());
      counters.shm_request_errors.fetch_add(1, std::memory_order_relaxed);
    }
  }
  const SessionId session = channel->owner().session;
  state.keep = std::move(channel);
  if (state.rows.empty()) return Finish(counters, state);
  // Two references fit a std::function without an allocation.
  engine.Attend(session, state.rows, state.answers,
                [&counters, &state] { Finish(counters, state); });
}

}  // namespace quarry

#include "client/attend_message.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "proto/attend_shape.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr uint64_t kAlign = 64;

// No offset: an answer that the daemon does not write, since the row asks for no tokens.
constexpr uint64_t kKnown = 0;

uint64_t Align(uint64_t x) { return (x + kAlign - 1) / kAlign * kAlign; }

float AmountOf(const Budget& budget) {
  switch (budget.kind) {
    case Budget::Kind::kError:
      return budget.error;
    case Budget::Kind::kDipr:
      return budget.beta;
    default:
      return budget.mass;
  }
}

// Whether the row can be said on a channel of this version, and holds what its budget needs.
absl::Status CheckSayable(const AttendRow& row, size_t i, uint16_t version) {
  if (absl::Status status = CheckBudget(row.budget); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("attend row ", i, ": ", status.message()));
  }
  if (version >= 2 || (row.budget.kind <= Budget::Kind::kTopP && !row.merged)) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(
      absl::StrCat("attend row ", i, ": budget kind ", static_cast<int>(row.budget.kind),
                   ", merged ", row.merged ? 1 : 0, " need shared-memory version 2, quarryd speaks ",
                   version));
}

shm::AttendRowPod PodOf(const AttendRow& row) {
  shm::AttendRowPod pod{};
  pod.context = row.context.value;
  pod.layer = row.layer;
  pod.range_lo = row.range.lo;
  pod.range_hi = row.range.hi;
  pod.first_head = row.first_head;
  pod.heads = row.heads;
  pod.budget_kind = static_cast<uint8_t>(row.budget.kind);
  pod.budget_k = row.budget.k;
  pod.budget_amount = AmountOf(row.budget);
  // Not used by the kinds of version 1, which has no room for it.
  pod.budget_seed = row.budget.kind == Budget::Kind::kSoftmaxLift ? row.budget.seed : 0;
  pod.merged = row.merged ? 1 : 0;
  pod.q_dtype = static_cast<uint8_t>(row.q_dtype);
  pod.has_token = row.has_token ? 1 : 0;
  pod.token_position = row.token_position;
  return pod;
}

}  // namespace

absl::StatusOr<AttendMessage> AttendMessage::Plan(std::span<const AttendRow> rows,
                                                  std::span<const KvShape> shapes,
                                                  uint64_t payload_bytes, uint16_t version,
                                                  Buffers buffers) {
  if (rows.empty() || rows.size() > shm::kMaxRows) {
    return absl::InvalidArgumentError(
        absl::StrCat("attend of ", rows.size(), " rows, 1 to ", shm::kMaxRows, " are taken"));
  }
  AttendMessage message;
  message.rows_.resize(rows.size());
  message.end_ = Align(shm::kSlotPayload + message.head_bytes());
  const auto place = [&](uint64_t bytes) {
    const uint64_t at = message.end_;
    message.end_ = Align(at + bytes);
    return at;
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    const AttendRow& row = rows[i];
    const KvShape& s = shapes[i];
    QUARRY_RETURN_IF_ERROR(CheckSayable(row, i, version));
    const bool asks = !row.range.empty();  // else q is not sent, and the answer is known
    const bool has_buffers =
        buffers == Buffers::kElsewhere ||
        ((!asks || row.q != nullptr) && (!row.has_token || (row.k != nullptr && row.v != nullptr)));
    if (!has_buffers || !IsValid(row.q_dtype)) {
      return absl::InvalidArgumentError(absl::StrCat("attend row ", i, " lacks a buffer"));
    }
    if (row.heads == 0 || row.heads > s.heads || row.heads % s.group() != 0) {
      return absl::InvalidArgumentError(absl::StrCat("attend row ", i, " has ", row.heads,
                                                     " heads, whole groups of ", s.group(),
                                                     " up to ", s.heads, " are wanted"));
    }
    Row& described = message.rows_[i];
    Place& b = described.place;
    b.q_bytes = asks ? uint64_t{row.heads} * s.head_dim * DTypeBytes(row.q_dtype) : 0;
    b.kv_bytes = row.has_token ? row.heads / s.group() * s.vector_bytes() : 0;
    b.o_bytes = uint64_t{row.heads} * s.head_dim * sizeof(float);
    b.lse_bytes = uint64_t{row.heads} * sizeof(float);
    b.q = place(b.q_bytes);
    b.k = place(b.kv_bytes);
    b.v = place(b.kv_bytes);
    b.o = asks ? place(b.o_bytes) : kKnown;
    b.lse = asks ? place(b.lse_bytes) : kKnown;
    described.context = row.context;
    described.layer = row.layer;
    described.range = row.range;
    if (absl::Status status = CheckRow(row, s); !status.ok()) {
      described.wrong = absl::StrCat(": ", status.message());
    }
  }
  if (message.request_bytes() > payload_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("attend of ", rows.size(), " rows needs ",
                                                   message.request_bytes(),
                                                   " bytes, a slot carries ", payload_bytes));
  }
  return message;
}

uint64_t AttendMessage::head_bytes() const {
  return sizeof(shm::AttendHeader) + rows_.size() * sizeof(shm::AttendRowPod);
}

void AttendMessage::WriteHead(std::span<const AttendRow> rows, std::byte* payload) const {
  const shm::AttendHeader header{static_cast<uint32_t>(rows.size()), 0};
  std::memcpy(payload, &header, sizeof(header));
  payload += sizeof(header);
  for (size_t i = 0; i < rows.size(); ++i) {
    const Place& b = rows_[i].place;
    shm::AttendRowPod pod = PodOf(rows[i]);
    pod.q_offset = b.q;
    pod.k_offset = b.k;
    pod.v_offset = b.v;
    pod.o_offset = b.o;
    pod.lse_offset = b.lse;
    std::memcpy(payload + i * sizeof(pod), &pod, sizeof(pod));
  }
}

void AttendMessage::Write(std::span<const AttendRow> rows, std::byte* slot_start) const {
  WriteHead(rows, slot_start + shm::kSlotPayload);
  for (size_t i = 0; i < rows.size(); ++i) {
    const Place& b = rows_[i].place;
    if (b.q_bytes > 0) std::memcpy(slot_start + b.q, rows[i].q, b.q_bytes);
    if (b.kv_bytes == 0) continue;
    std::memcpy(slot_start + b.k, rows[i].k, b.kv_bytes);
    std::memcpy(slot_start + b.v, rows[i].v, b.kv_bytes);
  }
}

void AttendMessage::ReadPods(const std::byte* pods, uint32_t generation, uint32_t layers,
                             std::span<AttendAnswer> answers) const {
  for (size_t i = 0; i < answers.size(); ++i) {
    shm::AttendAnswerPod pod;
    std::memcpy(&pod, pods + i * sizeof(pod), sizeof(pod));
    AttendAnswer& answer = answers[i];
    const Row& row = rows_[i];
    if (pod.generation != generation) {
      answer.status = absl::UnavailableError(absl::StrCat("row ", i, " was answered for request ",
                                                          pod.generation, ", not ", generation));
    } else if (pod.status != 0) {
      answer.status =
          absl::Status(static_cast<absl::StatusCode>(pod.status),
                       absl::StrCat("attend row ", i, " of context ", row.context.value, ", layer ",
                                    row.layer + layers, ", tokens [", row.range.lo, ", ",
                                    row.range.hi, ") was refused by the daemon", row.wrong));
    } else {
      answer.status = absl::OkStatus();
      answer.covered = {pod.covered_lo, pod.covered_hi};
      answer.tokens_attended = pod.tokens_attended;
      answer.bytes_touched = pod.bytes_touched;
      answer.error_estimate = pod.error_estimate;
      answer.shifted_tokens = pod.shifted_tokens;
    }
  }
}

void AttendMessage::ReadAnswers(const std::byte* slot_start, uint32_t generation,
                                std::span<AttendAnswer> answers) const {
  ReadPods(slot_start + shm::kSlotPayload, generation, 0, answers);
  for (size_t i = 0; i < answers.size(); ++i) {
    AttendAnswer& answer = answers[i];
    const Place& b = rows_[i].place;
    if (!answer.status.ok()) continue;
    if (answer.o.size_bytes() != b.o_bytes || answer.lse.size_bytes() != b.lse_bytes) {
      answer.status = absl::InvalidArgumentError(absl::StrCat(
          "attend row ", i, " has ", answer.o.size_bytes(), " and ", answer.lse.size_bytes(),
          " bytes of room for o and lse, needs ", b.o_bytes, " and ", b.lse_bytes));
      continue;
    }
    if (b.o == kKnown) {
      std::fill(answer.o.begin(), answer.o.end(), 0.0f);
      std::fill(answer.lse.begin(), answer.lse.end(), kEmptyLse);
      continue;
    }
    std::memcpy(answer.o.data(), slot_start + b.o, b.o_bytes);
    std::memcpy(answer.lse.data(), slot_start + b.lse, b.lse_bytes);
  }
}

}  // namespace quarry

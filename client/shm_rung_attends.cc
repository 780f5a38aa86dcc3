#include "client/shm_rung_attends.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// How long a daemon that has parked, gone or stopped may go unnoticed.
constexpr absl::Duration kLookEvery = absl::Milliseconds(1);
// What ends a wait without an answer: never a generation, and it has every bit.
constexpr uint32_t kGivenUp = ~0u;
// Generations end with one of two bits, by turns: when one comes, its bit was not set before.
constexpr uint32_t kTurnBits = 2;

absl::Status CheckRungRow(const AttendRow& row, const AttendRow& first, size_t i) {
  if (!row.range.empty() && row.has_token && row.q_dtype == DType::kFp32 &&
      row.heads == first.heads && row.q == nullptr && row.k == nullptr && row.v == nullptr) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "attend row ", i, " (tokens [", row.range.lo, ", ", row.range.hi, "), ", row.heads,
      " heads) cannot be rung by a device: it asks for tokens, stores one, has fp32 queries, ",
      first.heads, " heads and no buffers"));
}

// Its entry may hold a later message by now: a ring has fewer entries than there are layers.
bool IsSubmitted(const RungMessage& message) {
  return message.entry->sequence.load(std::memory_order_acquire) >= message.sequence;
}

std::atomic<uint32_t>& DoneOf(const RungMessage& message) {
  return reinterpret_cast<shm::SlotHeader*>(message.slot)->done;
}

}  // namespace

RingWatchdog::RingWatchdog(ClientChannel& channel)
    : channel_(channel), thread_([this] { Run(); }) {}

RingWatchdog::~RingWatchdog() {
  {
    absl::MutexLock lock(&mutex_);
    ending_ = true;
  }
  thread_.join();
}

void RingWatchdog::Watch(std::span<const RungMessage> messages) {
  absl::MutexLock lock(&mutex_);
  messages_ = messages;
  rung_ = 0;
  given_up_.reset();
}

void RingWatchdog::Stop() { Watch({}); }

std::optional<size_t> RingWatchdog::GivenUp() const {
  absl::MutexLock lock(&mutex_);
  return given_up_;
}

void RingWatchdog::Run() {
  const auto work = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return ending_ || !messages_.empty();
  };
  const auto rest = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return ending_ || messages_.empty();
  };
  absl::MutexLock lock(&mutex_);
  while (true) {
    mutex_.Await(absl::Condition(&work));
    if (ending_) return;
    do {
      Look();
    } while (!mutex_.AwaitWithTimeout(absl::Condition(&rest), kLookEvery));
  }
}

void RingWatchdog::Look() {
  size_t rung = rung_;
  while (rung < messages_.size() && IsSubmitted(messages_[rung])) ++rung;
  const absl::Time now = absl::Now();
  if (rung != rung_) since_ = now;
  rung_ = rung;
  if (rung == 0) return;
  const RungMessage& latest = messages_[rung - 1];
  std::atomic<uint32_t>& done = DoneOf(latest);
  const auto answered = [&] { return done.load(std::memory_order_acquire) == latest.generation; };
  if (!given_up_) {
    if (answered()) return;
    channel_.RingIfParked();
    const bool gone = channel_.DaemonHungUp();
    if (!gone && !channel_.lost() && now - since_ < channel_.deadline()) return;
    if (answered()) return;  // before it went
    given_up_ = rung - 1;
    // Who uses the channel next gets the error.
    (void)(gone ? channel_.Gone() : channel_.MissedDeadline());
  }
  // Again and again: a daemon that was stopped may go on, and write over it.
  done.store(kGivenUp, std::memory_order_release);
}

absl::StatusOr<std::unique_ptr<RungAttends>> ShmRungAttends::Begin(ClientChannel& channel,
                                                                   RingWatchdog& watchdog,
                                                                   std::span<const AttendRow> rows,
                                                                   const KvShape& shape,
                                                                   uint32_t messages) {
  if (messages == 0) return absl::InvalidArgumentError("no messages for a device to ring");
  for (size_t i = 0; i < rows.size(); ++i) {
    QUARRY_RETURN_IF_ERROR(CheckRungRow(rows[i], rows[0], i));
  }
  const std::vector<KvShape> shapes(rows.size(), shape);
  QUARRY_ASSIGN_OR_RETURN(
      AttendMessage message,
      AttendMessage::Plan(rows, shapes, channel.payload_bytes(), channel.version(),
                          AttendMessage::Buffers::kElsewhere));
  QUARRY_ASSIGN_OR_RETURN(const ClientChannel::Loan loan, channel.Lend());
  std::unique_ptr<ShmRungAttends> out(
      new ShmRungAttends(channel, watchdog, std::move(message), loan));
  out->Fill(rows, shape, messages);
  watchdog.Watch(out->messages_);
  return out;
}

void ShmRungAttends::Fill(std::span<const AttendRow> rows, const KvShape& shape,
                          uint32_t messages) {
  const AttendMessage::Place& place = message_.place(0);
  layout_ = {.rows = static_cast<uint32_t>(rows.size()),
             .heads = rows[0].heads,
             .head_dim = shape.head_dim,
             .kv_bytes = place.kv_bytes,
             .q = place.q,
             .k = place.k,
             .v = place.v,
             .o = place.o,
             .lse = place.lse,
             .row_stride = rows.size() > 1 ? message_.place(1).q - place.q : 0,
             .head_bytes = message_.head_bytes()};
  heads_.resize(messages * layout_.head_bytes);
  // Not the slot's last generation, whatever its turn.
  const uint32_t series = ((loan_.slot.generation >> kTurnBits) + 1) & (kGivenUp >> kTurnBits);
  std::vector<AttendRow> of_layer(rows.begin(), rows.end());
  for (uint32_t i = 0; i < messages; ++i) {
    message_.WriteHead(of_layer, heads_.data() + i * layout_.head_bytes);
    for (AttendRow& row : of_layer) ++row.layer;
    RungMessage& m = messages_.emplace_back();
    m.slot = channel_.slot_start(loan_.slot);
    m.sequence = loan_.submitted + i + 1;
    m.entry = channel_.entry(m.sequence);
    m.request_bytes = message_.request_bytes();
    m.slot_index = loan_.slot.index;
    m.answered_bit = 1 + i % 2;
    m.generation = series << kTurnBits | m.answered_bit;
  }
  // The slot is free: nobody waits for what it had.
  DoneOf(messages_[0]).store(0, std::memory_order_release);
}

ShmRungAttends::~ShmRungAttends() {
  watchdog_.Stop();
  // What was not rung, nobody will ring: the next request takes its place.
  for (const RungMessage& m : messages_) {
    if (!IsSubmitted(m)) break;
    loan_.submitted = m.sequence;
    loan_.slot.generation = m.generation;
  }
  if (loan_.submitted < messages_[0].sequence) {  // as if it had been asked for and answered
    DoneOf(messages_[0]).store(loan_.slot.generation, std::memory_order_release);
  }
  channel_.TakeBack(loan_);
}

absl::Status ShmRungAttends::Read(uint32_t i, std::span<const std::byte> outcome,
                                  std::span<AttendAnswer> answers) const {
  RungOutcome seen;
  std::memcpy(&seen, outcome.data(), sizeof(seen));
  const std::optional<size_t> given_up = watchdog_.GivenUp();
  absl::Status status;
  if ((given_up && i >= *given_up) || seen.done != messages_[i].generation) {
    status = absl::UnavailableError(
        absl::StrCat("attend message ", i, " of ", messages_.size(),
                     " was given up: quarryd has gone, or did not answer within ",
                     absl::FormatDuration(channel_.deadline())));
  } else if (seen.status != 0) {
    status = absl::Status(
        static_cast<absl::StatusCode>(seen.status),
        absl::StrCat("attend message ", i, " of ", messages_.size(), " was refused by the daemon"));
  } else {
    message_.ReadPods(outcome.data() + sizeof(seen), seen.done, i, answers);
    return absl::OkStatus();
  }
  for (AttendAnswer& answer : answers) answer.status = status;
  return status;
}

}  // namespace quarry

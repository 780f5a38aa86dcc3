#include "client/channel.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/socket.h"
#include "proto/check.h"
#include "proto/status_macros.h"
#include "proto/submit_entry.h"

namespace quarry {
namespace {

// A wake-up across CPUs costs up to 65 us in virtual machines: shorter answers are spun for.
constexpr absl::Duration kSpin = absl::Microseconds(60);
// While asleep, how often the socket is looked at: a killed daemon is noticed within this time.
constexpr absl::Duration kWatchEvery = absl::Milliseconds(20);
// While somebody waits for any slot, how often all of them are looked at.
constexpr absl::Duration kLookEvery = absl::Milliseconds(1);

void FutexWait(std::atomic<uint32_t>* word, uint32_t expected, absl::Duration timeout) {
  timespec ts = absl::ToTimespec(timeout);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, expected, &ts, nullptr, 0);
}

template <typename T>
std::span<const std::byte> BytesOf(const T& x) {
  return std::as_bytes(std::span(&x, 1));
}
template <typename T>
std::span<std::byte> WritableBytesOf(T& x) {
  return std::as_writable_bytes(std::span(&x, 1));
}

std::string TextOf(const char* text, size_t size) { return std::string(text, strnlen(text, size)); }

}  // namespace

absl::StatusOr<std::unique_ptr<ClientChannel>> ClientChannel::Connect(
    std::string_view socket_path, const shm::HelloRequest& hello, absl::Duration deadline) {
  auto channel = std::unique_ptr<ClientChannel>(new ClientChannel);
  channel->path_ = std::string(socket_path);
  channel->deadline_ = deadline;
  const absl::Time end = absl::Now() + deadline;
  QUARRY_ASSIGN_OR_RETURN(channel->socket_, ConnectSeqPacket(socket_path, deadline));
  shm::HelloReply reply{};
  std::vector<OwnedFd> descriptors;
  QUARRY_RETURN_IF_ERROR(Exchange(channel->socket_.get(), BytesOf(hello), WritableBytesOf(reply),
                                  end - absl::Now(), &descriptors));
  if (reply.magic != shm::kMagic) {
    return absl::FailedPreconditionError(
        absl::StrCat("what answers at ", channel->path_, " is not quarryd"));
  }
  if (reply.status != 0) {
    return absl::Status(static_cast<absl::StatusCode>(reply.status),
                        absl::StrCat("quarryd refused: ",
                                     TextOf(reply.message, sizeof(reply.message)),
                                     " (it speaks versions ", reply.min_version, " to ",
                                     reply.max_version, ", this client ", hello.min_version,
                                     " to ", hello.max_version, ")"));
  }
  if (reply.version < hello.min_version || reply.version > hello.max_version) {
    return absl::FailedPreconditionError(absl::StrCat(
        "quarryd chose version ", reply.version, ", outside ", hello.min_version, " to ",
        hello.max_version));
  }
  if (descriptors.size() != 2) {
    return absl::FailedPreconditionError(
        absl::StrCat("quarryd sent ", descriptors.size(), " descriptors, expected 2"));
  }
  QUARRY_RETURN_IF_ERROR(
      channel->Map(reply, std::move(descriptors[0]), std::move(descriptors[1])));
  return channel;
}

absl::Status ClientChannel::Map(const shm::HelloReply& reply, OwnedFd memory, OwnedFd doorbell) {
  doorbell_ = std::move(doorbell);
  tenant_ = TextOf(reply.tenant, sizeof(reply.tenant));
  session_ = {reply.session};
  memory_bytes_ = reply.channel_bytes;
  version_ = reply.version;
  slot_bytes_ = reply.slot_bytes;
  slot_count_ = reply.slots;
  void* at = mmap(nullptr, memory_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  if (at == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("mapping a channel of ", memory_bytes_, " bytes: ", std::strerror(errno)));
  }
  memory_ = static_cast<std::byte*>(at);
  channel_ = reinterpret_cast<shm::ChannelHeader*>(memory_);
  const uint64_t ring_end =
      uint64_t{channel_->ring_offset} + uint64_t{slot_count_} * sizeof(shm::SubmitEntry);
  if (channel_->magic != shm::kMagic || channel_->slots != slot_count_ ||
      channel_->slot_bytes != slot_bytes_ || ring_end > channel_->slots_offset ||
      channel_->slots_offset + slot_count_ * slot_bytes_ > memory_bytes_) {
    return absl::FailedPreconditionError("the channel's header does not fit its handshake");
  }
  ring_ = reinterpret_cast<shm::SubmitEntry*>(memory_ + channel_->ring_offset);
  slots_ = memory_ + channel_->slots_offset;
  absl::MutexLock lock(&mutex_);
  generations_.assign(slot_count_, 0);
  for (uint32_t i = slot_count_; i > 0; --i) free_.push_back(i - 1);
  return absl::OkStatus();
}

ClientChannel::~ClientChannel() {
  if (memory_ != nullptr) munmap(memory_, memory_bytes_);
}

bool ClientChannel::TakeFree(Slot* slot) {
  if (free_.empty()) {
    std::erase_if(abandoned_, [&](const Slot& s) ABSL_NO_THREAD_SAFETY_ANALYSIS {
      if (!Done(s)) return false;
      free_.push_back(s.index);
      return true;
    });
  }
  if (free_.empty()) return false;
  slot->index = free_.back();
  free_.pop_back();
  uint32_t generation = generations_[slot->index] + 1;
  if (generation == ~0u) generation = 1;
  generations_[slot->index] = slot->generation = generation;
  return true;
}

absl::StatusOr<ClientChannel::Slot> ClientChannel::Take() {
  Slot slot;
  absl::MutexLock lock(&mutex_);
  if (!lost() && TakeFree(&slot)) return slot;
  const absl::Time end = absl::Now() + deadline_;
  const Slot oldest = abandoned_.empty() ? Slot{} : abandoned_.front();  // generation 0: none
  do {
    if (lost()) return absl::UnavailableError(absl::StrCat("quarryd at ", path_, " is lost"));
    if (DaemonHungUp()) return Gone();
    const absl::Duration left = end - absl::Now();
    if (left <= absl::ZeroDuration()) {
      const bool held_up = oldest.generation != 0 && std::any_of(
          abandoned_.begin(), abandoned_.end(), [&](const Slot& s) {
            return s.index == oldest.index && s.generation == oldest.generation;
          });
      if (held_up) return MissedDeadline();
      return absl::ResourceExhaustedError(absl::StrCat(
          "all ", slot_count_, " slots have been in use for ", absl::FormatDuration(deadline_)));
    }
    AwaitSlot(std::min(left, kWatchEvery));
  } while (!TakeFree(&slot));
  return slot;
}

// The daemon's answer to an abandoned slot frees it without a word to this process: somebody has to
// look. Slots that callers give back meanwhile are noticed after kLookEvery at the latest.
void ClientChannel::AwaitSlot(absl::Duration most) {
  if (abandoned_.empty()) {
    const auto some = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return !free_.empty() || !abandoned_.empty();
    };
    mutex_.AwaitWithTimeout(absl::Condition(&some), most);
    return;
  }
  const Slot oldest = abandoned_.front();
  mutex_.Unlock();
  Spin(oldest);
  Sleep(oldest, std::min(most, kLookEvery));
  mutex_.Lock();
}

void ClientChannel::Submit(const Slot& slot, shm::Opcode opcode, uint64_t request_bytes) {
  QUARRY_CHECK(request_bytes <= payload_bytes());
  header_of(slot)->waiting.store(0, std::memory_order_relaxed);
  {
    absl::MutexLock lock(&submit_mutex_);
    QUARRY_CHECK(lent_by_ != std::this_thread::get_id());
    AwaitOrder();
    ++cursor_;
    shm::SubmitTo(entry(cursor_), cursor_, slot.index, opcode, request_bytes, slot.generation);
  }
  RingIfParked();
}

void ClientChannel::AwaitOrder() {
  const auto mine = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(submit_mutex_) { return !lent_by_; };
  submit_mutex_.Await(absl::Condition(&mine));
}

absl::StatusOr<ClientChannel::Loan> ClientChannel::Lend() {
  {
    absl::MutexLock lock(&submit_mutex_);
    if (lent_by_ == std::this_thread::get_id()) {
      return absl::FailedPreconditionError("this thread has attends that a device rings");
    }
  }
  QUARRY_ASSIGN_OR_RETURN(const Slot slot, Take());
  absl::MutexLock lock(&submit_mutex_);
  AwaitOrder();
  lent_by_ = std::this_thread::get_id();
  header_of(slot)->waiting.store(0, std::memory_order_relaxed);
  return Loan{slot, cursor_};
}

void ClientChannel::TakeBack(const Loan& loan) {
  {
    absl::MutexLock lock(&mutex_);
    generations_[loan.slot.index] = loan.slot.generation;
  }
  Abandon(loan.slot);
  absl::MutexLock lock(&submit_mutex_);
  cursor_ = loan.submitted;
  lent_by_.reset();
}

// The daemon writes `parked`, fences and looks at the rings; we write the ring, fence and look at
// `parked`: one of the two sees the other, so no request is left lying.
void ClientChannel::RingIfParked() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (channel_->parked.load(std::memory_order_relaxed) == 0) return;
  const uint64_t one = 1;
  // Not blocking: a full counter means that it is ringing already.
  [[maybe_unused]] ssize_t written = write(doorbell_.get(), &one, sizeof(one));
}

void ClientChannel::Arm(bool armed) {
  absl::MutexLock lock(&submit_mutex_);
  if (!armed && armed_by_ == 0) return;
  armed_by_ += armed ? 1 : -1;
  channel_->armed.store(armed_by_ > 0 ? 1 : 0, std::memory_order_relaxed);
  if (armed) RingIfParked();
}

bool ClientChannel::Done(const Slot& slot) const {
  return header_of(slot)->done.load(std::memory_order_acquire) == slot.generation;
}

bool ClientChannel::DaemonHungUp() const {
  pollfd watch{socket_.get(), POLLRDHUP, 0};
  return poll(&watch, 1, 0) > 0 && (watch.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

absl::Status ClientChannel::Lost(std::string_view why) {
  lost_.store(true, std::memory_order_release);
  return absl::UnavailableError(absl::StrCat("quarryd at ", path_, " ", std::string(why)));
}

absl::Status ClientChannel::Gone() { return Lost("has gone: its socket is closed"); }

absl::Status ClientChannel::MissedDeadline() {
  return Lost(absl::StrCat("did not answer within ", absl::FormatDuration(deadline_)));
}

void ClientChannel::Spin(const Slot& slot) const {
  const absl::Time start = absl::Now();
  while (!Done(slot) && absl::Now() - start < kSpin) {
    for (int i = 0; i < 64 && !Done(slot); ++i) __builtin_ia32_pause();
    // On few cores the daemon may be waiting for this one.
    if (!Done(slot)) sched_yield();
  }
}

void ClientChannel::Sleep(const Slot& slot, absl::Duration most) const {
  shm::SlotHeader* header = header_of(slot);
  const uint32_t seen = header->done.load(std::memory_order_acquire);
  if (seen == slot.generation) return;
  header->waiting.store(1, std::memory_order_seq_cst);
  FutexWait(&header->done, seen, most);
}

absl::Status ClientChannel::Wait(const Slot& slot, uint64_t* bytes) {
  shm::SlotHeader* header = header_of(slot);
  const absl::Time end = absl::Now() + deadline_;
  Spin(slot);
  while (!Done(slot)) {
    if (DaemonHungUp()) {
      if (Done(slot)) break;  // answered before it went
      return Gone();
    }
    // Another thread's deadline has passed: the session is over for all of them.
    if (lost()) return Lost("is lost");
    const absl::Duration left = end - absl::Now();
    if (left <= absl::ZeroDuration()) {
      return MissedDeadline();
    }
    Sleep(slot, std::min(left, kWatchEvery));
  }
  const uint64_t length = header->response_bytes;
  *bytes = std::min(length, payload_bytes());
  if (header->status == 0) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(header->status),
                      absl::string_view(reinterpret_cast<const char*>(payload(slot)), *bytes));
}

void ClientChannel::Abandon(const Slot& slot) {
  absl::MutexLock lock(&mutex_);
  if (Done(slot)) {
    free_.push_back(slot.index);
  } else {
    abandoned_.push_back(slot);
  }
}

absl::StatusOr<OwnedFd> ClientChannel::FetchExtent(uint32_t extent, uint64_t* bytes) {
  absl::MutexLock lock(&socket_mutex_);
  if (lost()) return absl::UnavailableError(absl::StrCat("quarryd at ", path_, " is lost"));
  const shm::SocketRequest request{static_cast<uint32_t>(shm::SocketRequestKind::kExtent), extent};
  shm::SocketReply reply{};
  std::vector<OwnedFd> descriptors;
  absl::Status status = Exchange(socket_.get(), BytesOf(request), WritableBytesOf(reply),
                                 deadline_, &descriptors);
  if (!status.ok()) {
    lost_.store(true, std::memory_order_release);
    return status;
  }
  if (reply.status != 0 || descriptors.size() != 1) {
    return absl::Status(reply.status != 0 ? static_cast<absl::StatusCode>(reply.status)
                                          : absl::StatusCode::kInternal,
                        absl::StrCat("quarryd gave no descriptor of extent ", extent));
  }
  *bytes = reply.bytes;
  return std::move(descriptors[0]);
}

}  // namespace quarry

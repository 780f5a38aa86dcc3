// The client's end of the shared-memory protocol (proto/SHM.md): handshake, submission, waiting.
#pragma once

#include <atomic>
#include <cstddef>
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
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/shm_layout.h"
#include "proto/types.h"

namespace quarry {

// A descriptor with one owner.
class OwnedFd {
 public:
  explicit OwnedFd(int fd = -1) : fd_(fd) {}
  ~OwnedFd();
  OwnedFd(OwnedFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  OwnedFd& operator=(OwnedFd&& other) noexcept;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Thread-safe. Once the daemon has gone or missed a deadline the channel is lost: every call is
// Unavailable from then on.
class ClientChannel {
 public:
  // A slot taken from the channel, with a request in it or about to be.
  struct Slot {
    uint32_t index = 0;
    uint32_t generation = 0;
  };

  static absl::StatusOr<std::unique_ptr<ClientChannel>> Connect(std::string_view socket_path,
                                                                const shm::HelloRequest& hello,
                                                                absl::Duration deadline);
  ~ClientChannel();
  ClientChannel(const ClientChannel&) = delete;
  ClientChannel& operator=(const ClientChannel&) = delete;

  const std::string& tenant() const { return tenant_; }
  SessionId session() const { return session_; }
  uint16_t version() const { return version_; }  // of the protocol, as negotiated
  uint64_t payload_bytes() const { return slot_bytes_ - shm::kSlotPayload; }

  // A free slot, waiting for one until the deadline: then ResourceExhausted if callers hold them
  // all, Unavailable (and the channel is lost) if the daemon has left an abandoned one unanswered.
  absl::StatusOr<Slot> Take();
  std::byte* slot_start(const Slot& slot) const { return slots_ + slot.index * slot_bytes_; }
  std::byte* payload(const Slot& slot) const { return slot_start(slot) + shm::kSlotPayload; }
  void Submit(const Slot& slot, shm::Opcode opcode, uint64_t request_bytes);

  // Lends the submission order, and a slot with a generation that is new to it, to somebody who
  // writes the channel's memory himself: other threads' Submit waits. `submitted` is how many
  // requests there were so far. Errors are those of Take; FailedPrecondition if this thread has
  // lent it.
  struct Loan {
    Slot slot;
    uint64_t submitted = 0;
  };
  absl::StatusOr<Loan> Lend();
  // Now there were `submitted` requests, and the slot's last generation is the loan's.
  void TakeBack(const Loan& loan);
  // All of what Connect mapped.
  std::span<std::byte> memory() const { return {memory_, memory_bytes_}; }
  // Where the request of this sequence, counted from 1, is submitted.
  shm::SubmitEntry* entry(uint64_t sequence) const { return ring_ + (sequence - 1) % slot_count_; }
  shm::SlotHeader* header_of(const Slot& slot) const {
    return reinterpret_cast<shm::SlotHeader*>(slot_start(slot));
  }
  bool Done(const Slot& slot) const;
  // Waits for the answer and returns its status (an error's text is its payload); *bytes is the
  // payload's length, checked against the slot. The caller then abandons the slot.
  absl::Status Wait(const Slot& slot, uint64_t* bytes);
  // The answer has been read, or is of no interest: the slot is free again once the daemon has
  // written it.
  void Abandon(const Slot& slot);

  void Arm(bool armed);
  bool lost() const { return lost_.load(std::memory_order_acquire); }

  // For who waits without Wait().
  absl::Duration deadline() const { return deadline_; }
  void RingIfParked();
  bool DaemonHungUp() const;
  // The channel is lost from now on; Unavailable, with what the daemon did.
  absl::Status Gone();
  absl::Status MissedDeadline();

  // Asks over the socket for an extent's descriptor.
  absl::StatusOr<OwnedFd> FetchExtent(uint32_t extent, uint64_t* bytes);

 private:
  ClientChannel() = default;

  absl::Status Map(const shm::HelloReply& reply, OwnedFd memory, OwnedFd doorbell);
  void AwaitOrder() ABSL_EXCLUSIVE_LOCKS_REQUIRED(submit_mutex_);
  bool TakeFree(Slot* slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Until a slot may have come free, for `most` at most.
  void AwaitSlot(absl::Duration most) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Spin(const Slot& slot) const;
  // Sleeps until the slot is answered, or for `most`; may return early.
  void Sleep(const Slot& slot, absl::Duration most) const;
  absl::Status Lost(std::string_view why);

  // Constant after Connect.
  OwnedFd socket_, doorbell_;
  std::string path_, tenant_;
  SessionId session_;
  absl::Duration deadline_;
  std::byte* memory_ = nullptr;
  uint16_t version_ = 0;
  uint64_t memory_bytes_ = 0, slot_bytes_ = 0;
  uint32_t slot_count_ = 0;
  shm::ChannelHeader* channel_ = nullptr;
  shm::SubmitEntry* ring_ = nullptr;
  std::byte* slots_ = nullptr;

  std::atomic<bool> lost_{false};
  absl::Mutex socket_mutex_;  // one conversation at a time
  absl::Mutex mutex_;
  std::vector<uint32_t> free_ ABSL_GUARDED_BY(mutex_);
  std::vector<Slot> abandoned_ ABSL_GUARDED_BY(mutex_);  // the longest in flight first
  std::vector<uint32_t> generations_ ABSL_GUARDED_BY(mutex_);  // last one of each slot
  absl::Mutex submit_mutex_;
  uint64_t cursor_ ABSL_GUARDED_BY(submit_mutex_) = 0;
  std::optional<std::thread::id> lent_by_ ABSL_GUARDED_BY(submit_mutex_);
  int armed_by_ ABSL_GUARDED_BY(submit_mutex_) = 0;  // threads with a token in flight
};

}  // namespace quarry

// One client's channel: its shared memory as the daemon sees it. Everything in it that the
// client writes is read once into private copies.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "daemon/file_descriptor.h"
#include "daemon/handshake.h"
#include "daemon/peer_tenant.h"
#include "proto/retrieval_types.h"
#include "proto/shm_layout.h"

namespace quarry {

class Channel;

// A private copy of a submitted entry; its slot, generation and bytes are within bounds.
struct Submission {
  uint32_t slot = 0;
  uint32_t generation = 0;
  uint16_t opcode = 0;
  uint64_t request_bytes = 0;
  uint64_t seen_ns = 0;  // steady clock, when the poller saw it
};

// Where a slot stands, as the poller and the thread that answers see it. Private memory.
struct SlotState {
  std::atomic<bool> busy{false};
  uint32_t last_generation = 0;
  // Of the attend in flight; kept between requests so that decode steps do not allocate.
  Submission submission;
  std::shared_ptr<Channel> keep;  // while a request is in flight
  std::vector<AttendRow> rows;
  std::vector<AttendAnswer> answers;
  std::vector<uint32_t> answer_index;  // engine row -> message row
  uint64_t claimed_bytes = 0;          // by the rows' buffers
  std::vector<shm::AttendAnswerPod> replies;
};

// The poller reads entries; any thread may answer. Created by Create, shared by the poller and the
// requests in flight: the memory is unmapped when the last of them has finished.
class Channel {
 public:
  struct Owner {
    SessionId session;
    PeerIdentity peer;
    std::string client_name;
    pid_t pid = 0;  // for the log only
  };
  // ResourceExhausted if the system gives no memory or descriptors.
  static absl::StatusOr<std::unique_ptr<Channel>> Create(const ChannelGeometry& geometry,
                                                         Owner owner);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  const Owner& owner() const { return owner_; }
  const ChannelGeometry& geometry() const { return geometry_; }
  int memory_fd() const { return memory_fd_.get(); }  // sealed against resizing
  int doorbell_fd() const { return doorbell_fd_.get(); }
  // Both are needed only until the client has them (the doorbell until the channel closes).
  void CloseMemoryFd() { memory_fd_.Reset(); }

  // ---- Poller only.
  enum class Next { kNone, kEntry, kMalformed };
  // Copies the next entry and marks its slot busy. kMalformed says why; the channel is to be
  // closed, since there is no slot to answer in.
  Next TakeEntry(Submission* out, std::string* why);
  bool HasEntry() const;
  bool armed() const { return header_->armed.load(std::memory_order_relaxed) != 0; }
  void SetParked(bool parked) { header_->parked.store(parked ? 1 : 0, std::memory_order_relaxed); }
  void SetClosing() { header_->closing.store(1, std::memory_order_release); }
  // What stays as it is of contexts this client named, so that a decode step does not ask the
  // engine.
  struct ContextFacts {
    KvShape shape;
    bool shifted = false;  // some of its tokens are reused from another position
  };
  absl::flat_hash_map<uint64_t, ContextFacts>& contexts() { return contexts_; }

  // ---- Any thread.
  std::byte* slot(uint32_t index) const { return slots_ + index * geometry_.slot_bytes; }
  SlotState& state(uint32_t index) { return states_[index]; }
  std::span<std::byte> payload(uint32_t index) const {
    return {slot(index) + shm::kSlotPayload, geometry_.slot_bytes - shm::kSlotPayload};
  }
  // Publishes an answer whose payload is written. The slot may be submitted again at once, so the
  // caller touches neither the payload nor the slot's state afterwards.
  void Answer(const Submission& request, absl::StatusCode code, uint64_t response_bytes);
  // An error: its text is the payload.
  void AnswerError(const Submission& request, const absl::Status& status);

  // Requests taken and not yet answered.
  uint32_t in_flight() const { return in_flight_.load(std::memory_order_acquire); }
  // Of them, those waiting in or running on the bulk pool; kept by the pool's callers.
  std::atomic<uint32_t> bulk_in_flight{0};

 private:
  Channel(const ChannelGeometry& geometry, Owner owner);

  // Constant after Create.
  const ChannelGeometry geometry_;
  const Owner owner_;
  FileDescriptor memory_fd_, doorbell_fd_;
  std::byte* memory_ = nullptr;
  shm::ChannelHeader* header_ = nullptr;
  shm::SubmitEntry* ring_ = nullptr;
  std::byte* slots_ = nullptr;

  // Poller only: a cursor the client cannot reach.
  uint64_t cursor_ = 0;
  absl::flat_hash_map<uint64_t, ContextFacts> contexts_;

  std::unique_ptr<SlotState[]> states_;
  std::atomic<uint32_t> in_flight_{0};
};

// Copies a value out of memory that another process writes. The barrier keeps the compiler from
// reading the memory a second time in place of the copy.
template <typename T>
T CopyOnce(const std::byte* from) {
  T copy;
  __builtin_memcpy(&copy, from, sizeof(T));
  asm volatile("" : : "r"(&copy) : "memory");
  return copy;
}

}  // namespace quarry

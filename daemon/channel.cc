#include "daemon/channel.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace quarry {
namespace {

void WakeWaiters(std::atomic<uint32_t>* word) {
  // Not FUTEX_PRIVATE: the waiter is another process.
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

constexpr uint32_t kNeverAGeneration = ~0u;

}  // namespace

Channel::Channel(const ChannelGeometry& geometry, Owner owner)
    : geometry_(geometry), owner_(std::move(owner)), states_(new SlotState[geometry.slots]) {}

absl::StatusOr<std::unique_ptr<Channel>> Channel::Create(const ChannelGeometry& geometry,
                                                         Owner owner) {
  std::unique_ptr<Channel> channel(new Channel(geometry, std::move(owner)));
  channel->memory_fd_.Reset(memfd_create("quarry-channel", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!channel->memory_fd_.valid()) return ErrnoStatus(errno, "memfd_create");
  const int fd = channel->memory_fd_.get();
  if (ftruncate(fd, static_cast<off_t>(geometry.total_bytes)) != 0) {
    return ErrnoStatus(errno, "ftruncate of a channel");
  }
  // Sealed before anyone else sees it: a client that shrank it would make our reads fault.
  if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return ErrnoStatus(errno, "sealing a channel");
  }
  void* memory = mmap(nullptr, geometry.total_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return ErrnoStatus(errno, "mmap of a channel");
  channel->memory_ = static_cast<std::byte*>(memory);
  channel->doorbell_fd_.Reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!channel->doorbell_fd_.valid()) return ErrnoStatus(errno, "eventfd");

  auto* header = new (memory) shm::ChannelHeader();
  header->magic = shm::kMagic;
  header->version = geometry.version;
  header->slots = geometry.slots;
  header->ring_offset = shm::kHeaderBytes;
  header->slots_offset = geometry.slots_offset;
  header->slot_bytes = geometry.slot_bytes;
  channel->header_ = header;
  channel->ring_ = reinterpret_cast<shm::SubmitEntry*>(channel->memory_ + shm::kHeaderBytes);
  channel->slots_ = channel->memory_ + geometry.slots_offset;
  return channel;
}

Channel::~Channel() {
  if (memory_ != nullptr) munmap(memory_, geometry_.total_bytes);
}

bool Channel::HasEntry() const {
  const uint64_t index = cursor_ & (geometry_.slots - 1);
  const uint64_t sequence = ring_[index].sequence.load(std::memory_order_acquire);
  const uint64_t before = cursor_ >= geometry_.slots ? cursor_ + 1 - geometry_.slots : 0;
  return sequence != before;
}

Channel::Next Channel::TakeEntry(Submission* out, std::string* why) {
  const uint64_t index = cursor_ & (geometry_.slots - 1);
  const shm::SubmitEntry& entry = ring_[index];
  const uint64_t sequence = entry.sequence.load(std::memory_order_acquire);
  const uint64_t before = cursor_ >= geometry_.slots ? cursor_ + 1 - geometry_.slots : 0;
  if (sequence == before) return Next::kNone;
  if (sequence != cursor_ + 1) {
    *why =
        absl::StrCat("ring entry ", index, " has sequence ", sequence, ", expected ", cursor_ + 1);
    return Next::kMalformed;
  }
  struct Rest {  // of the entry, after its sequence
    uint32_t slot;
    uint16_t opcode, flags;
    uint64_t request_bytes;
    uint32_t generation, reserved;
  };
  static_assert(offsetof(shm::SubmitEntry, slot) == 8 &&
                offsetof(shm::SubmitEntry, reserved) == 8 + offsetof(Rest, reserved));
  const Rest copy = CopyOnce<Rest>(reinterpret_cast<const std::byte*>(&entry.slot));
  ++cursor_;

  if (copy.slot >= geometry_.slots) {
    *why = absl::StrCat("slot ", copy.slot, " of ", geometry_.slots);
    return Next::kMalformed;
  }
  SlotState& state = states_[copy.slot];
  if (state.busy.load(std::memory_order_acquire)) {
    *why = absl::StrCat("slot ", copy.slot, " submitted while its request is in flight");
    return Next::kMalformed;
  }
  if (copy.generation == 0 || copy.generation == kNeverAGeneration ||
      copy.generation == state.last_generation) {
    *why = absl::StrCat("slot ", copy.slot, " has generation ", copy.generation, " after ",
                        state.last_generation);
    return Next::kMalformed;
  }
  state.last_generation = copy.generation;
  state.busy.store(true, std::memory_order_relaxed);
  in_flight_.fetch_add(1, std::memory_order_relaxed);
  *out = {copy.slot, copy.generation, copy.flags == 0 ? copy.opcode : uint16_t{0},
          copy.request_bytes};
  return Next::kEntry;
}

void Channel::Answer(const Submission& request, absl::StatusCode code, uint64_t response_bytes) {
  auto* header = reinterpret_cast<shm::SlotHeader*>(slot(request.slot));
  header->status = static_cast<uint32_t>(code);
  header->response_bytes = response_bytes;
  // Free the slot before the client can see the answer, since it may submit again at once.
  states_[request.slot].busy.store(false, std::memory_order_release);
  header->done.store(request.generation, std::memory_order_release);
  // No lost wake-up: a client stores `waiting`, fences, and sleeps only if `done` is still old;
  // we store `done`, fence, and read `waiting`. Both fences are sequentially consistent, so at
  // least one side sees the other's store: either the client does not sleep or we wake it. If it
  // is between its check and the kernel's, the kernel compares `done` again under its own lock.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (header->waiting.load(std::memory_order_relaxed) != 0) WakeWaiters(&header->done);
  in_flight_.fetch_sub(1, std::memory_order_release);
}

void Channel::AnswerError(const Submission& request, const absl::Status& status) {
  const std::span<std::byte> out = payload(request.slot);
  const size_t bytes = std::min(out.size(), status.message().size());
  std::copy_n(status.message().data(), bytes, reinterpret_cast<char*>(out.data()));
  Answer(request, status.code(), bytes);
}

}  // namespace quarry

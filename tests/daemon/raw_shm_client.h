// A client of the shared-memory protocol with no manners: tests write what they like into the
// ring and the slots. Written from the layout alone, so it also checks the layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/file_descriptor.h"
#include "proto/shm_layout.h"
#include "tests/support/eventually.h"

namespace quarry::testing {

// Not thread-safe.
class RawShmClient {
 public:
  static shm::HelloRequest Hello(uint32_t slots = 4, uint64_t slot_bytes = 65536);

  // Connects and says hello; the reply is in hello_reply() also when it is a refusal (then the
  // status is the refusal).
  static absl::StatusOr<std::unique_ptr<RawShmClient>> Connect(
      const std::string& path, const shm::HelloRequest& hello = Hello());
  // A bare connection, nothing sent.
  static absl::StatusOr<FileDescriptor> Dial(const std::string& path);
  // Sends bytes on a bare connection and returns the reply, if one comes before the deadline or
  // the end of the connection.
  static std::optional<shm::HelloReply> SayHello(int fd, std::span<const std::byte> bytes,
                                                 std::vector<int>* descriptors = nullptr);
  ~RawShmClient();

  const shm::HelloReply& hello_reply() const { return reply_; }
  int socket() const { return socket_.get(); }
  int memory_fd() const { return memory_fd_.get(); }
  int doorbell_fd() const { return doorbell_.get(); }
  void CloseSocket() { socket_.Reset(); }

  shm::ChannelHeader* header() const { return reinterpret_cast<shm::ChannelHeader*>(memory_); }
  shm::SubmitEntry* ring() const {
    return reinterpret_cast<shm::SubmitEntry*>(memory_ + header()->ring_offset);
  }
  std::byte* slot(uint32_t i) const { return memory_ + reply_offset_ + i * reply_.slot_bytes; }
  shm::SlotHeader* slot_header(uint32_t i) const {
    return reinterpret_cast<shm::SlotHeader*>(slot(i));
  }
  std::byte* payload(uint32_t i) const { return slot(i) + shm::kSlotPayload; }
  uint32_t slots() const { return reply_.slots; }

  // Writes the next ring entry as given; rings the doorbell when the daemon is parked.
  struct Entry {
    uint32_t slot = 0;
    shm::Opcode opcode = shm::Opcode::kNop;
    uint64_t request_bytes = 0;
    uint32_t generation = 0;
    uint16_t flags = 0;
  };
  void Submit(const Entry& entry);
  void RingDoorbell() const;
  // The next generation of a slot.
  uint32_t NextGeneration(uint32_t slot) { return ++generations_[slot]; }
  uint64_t& cursor() { return cursor_; }

  // Waits until the slot's request is answered: its status, or nothing at the deadline.
  std::optional<absl::StatusCode> Await(uint32_t slot, uint32_t generation,
                                        absl::Duration deadline = kPatience) const;
  // Submits and waits.
  std::optional<absl::StatusCode> Run(uint32_t slot, shm::Opcode opcode, uint64_t request_bytes);
  // The payload of an answer, e.g. an error's text.
  std::string Response(uint32_t slot) const;
  // True when the daemon has closed our socket.
  bool AwaitHangUp(absl::Duration deadline = kPatience) const;

  struct ExtentAnswer {
    shm::SocketReply reply{};
    FileDescriptor fd;
  };
  std::optional<ExtentAnswer> AskExtent(uint32_t extent) const;

 private:
  RawShmClient() = default;
  FileDescriptor socket_, memory_fd_, doorbell_;
  shm::HelloReply reply_{};
  uint64_t reply_offset_ = 0;
  std::byte* memory_ = nullptr;
  uint64_t cursor_ = 0;
  std::vector<uint32_t> generations_;
};

}  // namespace quarry::testing

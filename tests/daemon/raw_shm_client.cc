#include "tests/daemon/raw_shm_client.h"

#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>

namespace quarry::testing {
namespace {

constexpr int kReplyDeadlineMs = 10000;

ssize_t Receive(int fd, std::span<std::byte> out, std::vector<int>* descriptors) {
  pollfd wait{fd, POLLIN, 0};
  if (poll(&wait, 1, kReplyDeadlineMs) != 1) return -1;
  iovec part{out.data(), out.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  const ssize_t n = recvmsg(fd, &header, MSG_CMSG_CLOEXEC);
  for (cmsghdr* c = CMSG_FIRSTHDR(&header); c != nullptr; c = CMSG_NXTHDR(&header, c)) {
    if (c->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    std::vector<int> got(count);
    std::memcpy(got.data(), CMSG_DATA(c), count * sizeof(int));
    for (const int received : got) {
      if (descriptors != nullptr) {
        descriptors->push_back(received);
      } else {
        close(received);
      }
    }
  }
  return n;
}

}  // namespace

shm::HelloRequest RawShmClient::Hello(uint32_t slots, uint64_t slot_bytes) {
  shm::HelloRequest hello{};
  hello.magic = shm::kMagic;
  hello.min_version = shm::kMinVersion;
  hello.max_version = shm::kMaxVersion;
  hello.slots = slots;
  hello.slot_bytes = slot_bytes;
  std::strcpy(hello.client_name, "raw");
  return hello;
}

absl::StatusOr<FileDescriptor> RawShmClient::Dial(const std::string& path) {
  FileDescriptor fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  if (connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    return ErrnoStatus(errno, path);
  }
  return fd;
}

std::optional<shm::HelloReply> RawShmClient::SayHello(int fd, std::span<const std::byte> bytes,
                                                      std::vector<int>* descriptors) {
  shm::HelloReply reply;
  if (send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) < 0) return std::nullopt;
  const ssize_t n =
      Receive(fd, std::as_writable_bytes(std::span<shm::HelloReply>(&reply, 1)), descriptors);
  if (n != sizeof(reply)) return std::nullopt;
  return reply;
}

absl::StatusOr<std::unique_ptr<RawShmClient>> RawShmClient::Connect(
    const std::string& path, const shm::HelloRequest& hello) {
  absl::StatusOr<FileDescriptor> socket = Dial(path);
  if (!socket.ok()) return socket.status();
  std::vector<int> descriptors;
  const auto reply = SayHello(
      socket->get(), std::as_bytes(std::span<const shm::HelloRequest>(&hello, 1)), &descriptors);
  if (!reply) return absl::UnavailableError("no reply to hello");
  if (reply->status != 0) {
    return absl::Status(static_cast<absl::StatusCode>(reply->status), reply->message);
  }
  if (descriptors.size() != 2) return absl::InternalError("not two descriptors");
  std::unique_ptr<RawShmClient> client(new RawShmClient());
  client->socket_ = *std::move(socket);
  client->reply_ = *reply;
  client->memory_fd_.Reset(descriptors[0]);
  client->doorbell_.Reset(descriptors[1]);
  void* memory =
      mmap(nullptr, reply->channel_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptors[0], 0);
  if (memory == MAP_FAILED) return ErrnoStatus(errno, "mmap");
  client->memory_ = static_cast<std::byte*>(memory);
  client->reply_offset_ = client->header()->slots_offset;
  client->generations_.resize(reply->slots);
  return client;
}

RawShmClient::~RawShmClient() {
  if (memory_ != nullptr) munmap(memory_, reply_.channel_bytes);
}

void RawShmClient::RingDoorbell() const {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(doorbell_.get(), &one, sizeof(one));
}

void RawShmClient::Submit(const Entry& entry) {
  shm::SubmitEntry& e = ring()[cursor_ & (slots() - 1)];
  e.slot = entry.slot;
  e.opcode = static_cast<uint16_t>(entry.opcode);
  e.flags = entry.flags;
  e.request_bytes = entry.request_bytes;
  e.generation = entry.generation;
  e.sequence.store(++cursor_, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (header()->parked.load(std::memory_order_relaxed) != 0) RingDoorbell();
}

std::optional<absl::StatusCode> RawShmClient::Await(uint32_t slot, uint32_t generation,
                                                    absl::Duration deadline) const {
  shm::SlotHeader* h = slot_header(slot);
  const absl::Time end = absl::Now() + deadline;
  while (true) {
    const uint32_t done = h->done.load(std::memory_order_acquire);
    if (done == generation) return static_cast<absl::StatusCode>(h->status);
    if (absl::Now() > end) return std::nullopt;
    h->waiting.store(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    // A lost wake-up shows as a wait of the whole time-out.
    timespec timeout = absl::ToTimespec(std::max(end - absl::Now(), absl::ZeroDuration()));
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&h->done), FUTEX_WAIT, done, &timeout, nullptr,
            0);
    h->waiting.store(0, std::memory_order_relaxed);
  }
}

std::optional<absl::StatusCode> RawShmClient::Run(uint32_t slot, shm::Opcode opcode,
                                                  uint64_t request_bytes) {
  const uint32_t generation = NextGeneration(slot);
  Submit({slot, opcode, request_bytes, generation});
  return Await(slot, generation);
}

std::string RawShmClient::Response(uint32_t slot) const {
  return {reinterpret_cast<const char*>(payload(slot)), slot_header(slot)->response_bytes};
}

bool RawShmClient::AwaitHangUp(absl::Duration deadline) const {
  pollfd wait{socket_.get(), POLLRDHUP, 0};
  return poll(&wait, 1, static_cast<int>(absl::ToInt64Milliseconds(deadline))) == 1 &&
         (wait.revents & (POLLRDHUP | POLLHUP)) != 0;
}

std::optional<RawShmClient::ExtentAnswer> RawShmClient::AskExtent(uint32_t extent) const {
  const shm::SocketRequest request{static_cast<uint32_t>(shm::SocketRequestKind::kExtent), extent};
  if (send(socket_.get(), &request, sizeof(request), MSG_NOSIGNAL) != sizeof(request)) {
    return std::nullopt;
  }
  ExtentAnswer answer;
  std::vector<int> descriptors;
  const ssize_t n =
      Receive(socket_.get(), std::as_writable_bytes(std::span<shm::SocketReply>(&answer.reply, 1)),
              &descriptors);
  if (n != sizeof(shm::SocketReply)) return std::nullopt;
  if (!descriptors.empty()) answer.fd.Reset(descriptors[0]);
  return answer;
}

}  // namespace quarry::testing

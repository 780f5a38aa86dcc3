#include "tests/client/fake_server.h"

#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <new>
#include <utility>

#include "absl/status/status.h"
#include "proto/check.h"

namespace quarry::testing {
namespace {

constexpr uint64_t kPage = 4096;

int NewMemory(uint64_t bytes) {
  const int fd = memfd_create("fake", MFD_CLOEXEC);
  QUARRY_CHECK(fd >= 0 && ftruncate(fd, static_cast<off_t>(bytes)) == 0);
  return fd;
}

void Send(int socket, const void* data, size_t bytes, std::vector<int> descriptors) {
  iovec part{const_cast<void*>(data), bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!descriptors.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(descriptors.size() * sizeof(int));
    cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
    std::memcpy(CMSG_DATA(c), descriptors.data(), descriptors.size() * sizeof(int));
  }
  sendmsg(socket, &message, MSG_NOSIGNAL);
}

template <size_t N>
void CopyText(char (&out)[N], const std::string& text) {
  std::memcpy(out, text.data(), std::min(text.size(), N));
}

}  // namespace

FakeServer::FakeServer(Script script) : script_(std::move(script)) {
  char directory[] = "/tmp/quarry-fake-XXXXXX";
  QUARRY_CHECK(mkdtemp(directory) != nullptr);
  directory_ = directory;
  path_ = directory_ + "/socket";
  listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path_.data(), path_.size());
  QUARRY_CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0 &&
               listen(listener_, 1) == 0);
  // Signals go to the test's threads.
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  thread_ = std::thread([this] { Run(); });
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
}

FakeServer::~FakeServer() {
  stop_ = true;
  thread_.join();
  close(listener_);
  if (doorbell_ >= 0) close(doorbell_);
  if (memory_ != nullptr) munmap(memory_, memory_bytes_);
  unlink(path_.c_str());
  rmdir(directory_.c_str());
}

std::vector<FakeServer::Request> FakeServer::requests() const {
  absl::MutexLock lock(&mutex_);
  return requests_;
}

void FakeServer::Run() {
  pollfd watch{listener_, POLLIN, 0};
  while (!stop_ && poll(&watch, 1, 5) == 0) {
  }
  if (stop_) return;
  const int socket = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
  if (Greet(socket)) {
    while (!stop_ && !hang_up_ && ServeSocket(socket)) {
    }
  } else {
    while (!stop_ && !script_.close_at_hello) {  // stay connected and silent
      pollfd hangup{socket, POLLRDHUP, 0};
      if (poll(&hangup, 1, 5) > 0) break;
    }
  }
  close(socket);
}

bool FakeServer::Greet(int socket) {
  shm::HelloRequest hello{};
  if (recv(socket, &hello, sizeof(hello), 0) != sizeof(hello)) return false;
  if (script_.close_at_hello || script_.no_reply) return false;
  if (script_.hello_delay_ms > 0) poll(nullptr, 0, script_.hello_delay_ms);

  shm::HelloReply reply{};
  reply.magic = script_.magic;
  reply.min_version = script_.min_version;
  reply.max_version = script_.max_version;
  reply.status = script_.status;
  CopyText(reply.message, script_.message);
  reply.version = std::min(hello.max_version, script_.max_version);
  if (reply.version < hello.min_version || reply.version < script_.min_version) {
    if (!script_.choose_wrong_version) {
      reply.version = 0;
      reply.status = 9;  // FailedPrecondition
    }
  }
  std::vector<int> descriptors;
  int memory = -1;
  if (reply.status == 0) {
    reply.session = 17;
    reply.slots = script_.slots;
    reply.slot_bytes = script_.slot_bytes;
    const uint64_t slots_offset =
        (shm::kHeaderBytes + reply.slots * sizeof(shm::SubmitEntry) + kPage - 1) / kPage * kPage;
    reply.channel_bytes = memory_bytes_ = slots_offset + reply.slots * reply.slot_bytes;
    CopyText(reply.tenant, "acme");
    memory = NewMemory(memory_bytes_);
    memory_ = static_cast<std::byte*>(
        mmap(nullptr, memory_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0));
    QUARRY_CHECK(memory_ != MAP_FAILED);
    header_ = new (memory_) shm::ChannelHeader();
    header_->magic = shm::kMagic;
    header_->version = reply.version;
    header_->slots = reply.slots;
    header_->ring_offset = shm::kHeaderBytes;
    header_->slots_offset = slots_offset;
    header_->slot_bytes = reply.slot_bytes;
    header_->parked.store(1);
    doorbell_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    descriptors = {memory, doorbell_};
    descriptors.resize(static_cast<size_t>(script_.descriptors), doorbell_);
  }
  Send(socket, &reply, script_.reply_bytes, descriptors);
  if (memory >= 0) close(memory);
  return reply.status == 0;
}

// Looks at the ring only when the doorbell rings: it is parked throughout.
bool FakeServer::ServeSocket(int socket) {
  pollfd watch[] = {{doorbell_, POLLIN, 0}, {socket, POLLIN | POLLRDHUP, 0}};
  if (poll(watch, 2, 5) <= 0) return true;
  uint64_t rung;
  if ((watch[0].revents & POLLIN) != 0 && read(doorbell_, &rung, sizeof(rung)) > 0) ServeRing();
  if ((watch[1].revents & (POLLRDHUP | POLLHUP)) != 0) return false;
  if ((watch[1].revents & POLLIN) == 0) return true;
  shm::SocketRequest request{};
  if (recv(socket, &request, sizeof(request), 0) != sizeof(request)) return false;
  ++extents_asked_;
  shm::SocketReply reply{};
  reply.kind = request.kind;
  reply.extent = request.extent;
  reply.bytes = script_.extent_bytes;
  reply.page_bytes = kPage;
  if (script_.extent_gone && script_.extent_gone(request.extent)) {
    reply.status = static_cast<uint32_t>(absl::StatusCode::kNotFound);
    Send(socket, &reply, sizeof(reply), {});
    return true;
  }
  const int fd = NewMemory(script_.extent_bytes);
  Send(socket, &reply, sizeof(reply), {fd});
  close(fd);
  return true;
}

void FakeServer::ServeRing() {
  auto* ring = reinterpret_cast<shm::SubmitEntry*>(memory_ + header_->ring_offset);
  while (!hang_up_) {
    const shm::SubmitEntry& entry = ring[cursor_ % script_.slots];
    if (entry.sequence.load(std::memory_order_acquire) != cursor_ + 1) return;
    ++cursor_;
    Request request{static_cast<shm::Opcode>(entry.opcode), entry.slot, entry.generation, {},
                    memory_ + header_->slots_offset + entry.slot * script_.slot_bytes};
    request.payload.assign(
        reinterpret_cast<const char*>(request.slot_start + shm::kSlotPayload),
        entry.request_bytes);
    {
      absl::MutexLock lock(&mutex_);
      requests_.push_back(request);
    }
    const Answer answer = script_.serve ? script_.serve(request) : Answer{};
    if (answer.hang_up) hang_up_ = true;
    if (answer.given && !answer.hang_up) Write(request, answer);
  }
}

void FakeServer::AnswerLater(const Request& request, const Answer& answer) {
  Write(request, answer);
}

void FakeServer::Write(const Request& request, const Answer& answer) {
  auto* header = reinterpret_cast<shm::SlotHeader*>(request.slot_start);
  std::memcpy(request.slot_start + shm::kSlotPayload, answer.payload.data(),
              answer.payload.size());
  header->status = answer.status;
  header->response_bytes = answer.payload.size();
  header->done.store(request.generation, std::memory_order_seq_cst);
  if (header->waiting.load() != 0) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&header->done), FUTEX_WAKE, INT_MAX, nullptr,
            nullptr, 0);
  }
}

}  // namespace quarry::testing

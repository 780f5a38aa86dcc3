#include "daemon/shm_clients.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/log.h"
#include "daemon/steady_clock.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// What an epoll event belongs to: the low bits of its data; the rest is the client's id.
enum Source : uint64_t { kWake = 0, kListener = 1, kSocket = 2, kDoorbell = 3 };
constexpr int kEventsAtOnce = 64;
constexpr int kAcceptsAtOnce = 16;   // before the rings get a turn
constexpr int kMessagesAtOnce = 8;  // of one socket before others get a turn
constexpr uint32_t kMaxUngreeted = 64;
constexpr int kMaxUngreetedPerUser = 16;  // so that no user keeps the others out
constexpr uint64_t kAcceptPauseNs = 100'000'000;

template <typename T>
std::span<const std::byte> BytesOf(const T& value) {
  return std::as_bytes(std::span<const T>(&value, 1));
}

}  // namespace

ShmClients::ShmClients(const ShmOptions& options, Parts parts) : options_(options), parts_(parts) {}

absl::StatusOr<std::unique_ptr<ShmClients>> ShmClients::Create(const ShmOptions& options,
                                                               Parts parts, int wake_fd) {
  std::unique_ptr<ShmClients> clients(new ShmClients(options, parts));
  clients->epoll_.Reset(epoll_create1(EPOLL_CLOEXEC));
  if (!clients->epoll_.valid()) return ErrnoStatus(errno, "epoll_create1");
  epoll_event wake{.events = EPOLLIN | EPOLLET, .data = {.u64 = kWake}};
  if (epoll_ctl(clients->epoll_.get(), EPOLL_CTL_ADD, wake_fd, &wake) != 0) {
    return ErrnoStatus(errno, "epoll_ctl");
  }
  clients->WatchListener(true);
  return clients;
}

ShmClients::~ShmClients() {
  while (!clients_.empty()) Close(clients_.begin()->second.get(), "the daemon stops");
}

void ShmClients::WatchListener(bool watch) {
  epoll_event event{.events = EPOLLIN, .data = {.u64 = kListener}};
  epoll_ctl(epoll_.get(), watch ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, parts_.listener.fd(), &event);
}

int ShmClients::TimeoutMs(int wanted_ms, uint64_t now_ns) const {
  if (wanted_ms == 0) return 0;
  uint64_t first = UINT64_MAX;
  if (ungreeted_ > 0) {
    for (const auto& [id, client] : clients_) {
      if (client->channel == nullptr) {
        first = std::min(first, client->accepted_ns + HelloTimeoutNs());
      }
    }
  }
  if (accept_again_ns_ != 0) first = std::min(first, accept_again_ns_);
  if (first == UINT64_MAX) return wanted_ms;
  const int left_ms = first <= now_ns ? 0 : static_cast<int>((first - now_ns) / 1'000'000 + 1);
  return wanted_ms < 0 ? left_ms : std::min(wanted_ms, left_ms);
}

void ShmClients::HandleEvents(int timeout_ms, uint64_t now_ns) {
  std::array<epoll_event, kEventsAtOnce> events;
  const int n =
      epoll_wait(epoll_.get(), events.data(), kEventsAtOnce, TimeoutMs(timeout_ms, now_ns));
  if (timeout_ms != 0) now_ns = SteadyNowNs();
  for (int i = 0; i < n; ++i) {
    const uint64_t data = events[i].data.u64;
    const auto source = static_cast<Source>(data & 3);
    if (source == kListener) AcceptSome(now_ns);
    const auto it = clients_.find(data >> 2);
    if (it == clients_.end()) continue;  // closed by an earlier event of this batch
    if (source == kSocket) HandleSocket(it->second.get(), events[i].events);
    // A doorbell is never read. It is watched edge-triggered, and every write is a new edge, so
    // there is nothing to reset; reading could block, since the client shares the descriptor's
    // flags and may have cleared O_NONBLOCK.
    if (source == kDoorbell) it->second->last_traffic_ns = now_ns;
  }
  if (accept_again_ns_ != 0 && now_ns >= accept_again_ns_) {
    accept_again_ns_ = 0;
    WatchListener(true);
  }
  if (ungreeted_ > 0) CloseSilent(now_ns);
}

void ShmClients::AcceptSome(uint64_t now_ns) {
  // The listener is level-triggered: who is left is found at the next look.
  for (int i = 0; i < kAcceptsAtOnce; ++i) {
    FileDescriptor socket(parts_.listener.Accept());
    if (!socket.valid()) {
      if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
        Log(LogLevel::kError, "cannot accept clients", {{"error", ErrnoStatus(errno, "accept4")}});
        WatchListener(false);
        accept_again_ns_ = now_ns + kAcceptPauseNs;
      }
      return;
    }
    if (ungreeted_ >= kMaxUngreeted) continue;  // closed: nobody is owed an answer yet
    absl::StatusOr<PeerCredentials> credentials = CredentialsOf(socket.get());
    if (!credentials.ok()) continue;
    const auto same_user = [&](const auto& known) {
      return known.second->channel == nullptr && known.second->credentials.uid == credentials->uid;
    };
    if (std::count_if(clients_.begin(), clients_.end(), same_user) >= kMaxUngreetedPerUser) {
      continue;
    }
    auto client = std::make_unique<ShmClient>();
    client->id = next_id_++;
    client->socket = std::move(socket);
    client->credentials = *credentials;
    client->accepted_ns = now_ns;
    epoll_event event{.events = EPOLLIN | EPOLLRDHUP, .data = {.u64 = client->id << 2 | kSocket}};
    if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, client->socket.get(), &event) != 0) continue;
    ++ungreeted_;
    clients_[client->id] = std::move(client);
  }
}

void ShmClients::CloseSilent(uint64_t now_ns) {
  std::vector<ShmClient*> silent;
  for (const auto& [id, client] : clients_) {
    if (client->channel == nullptr && now_ns >= client->accepted_ns + HelloTimeoutNs()) {
      silent.push_back(client.get());
    }
  }
  for (ShmClient* client : silent) Close(client, "no handshake in time");
}

void ShmClients::HandleSocket(ShmClient* client, uint32_t events) {
  if ((events & (EPOLLHUP | EPOLLRDHUP | EPOLLERR)) != 0) return Close(client, "it hung up");
  // One byte more than any message, so that a longer one shows.
  std::array<std::byte, sizeof(shm::HelloRequest) + 1> buffer;
  for (int i = 0; i < kMessagesAtOnce; ++i) {
    const ssize_t n = recv(client->socket.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return;
    if (n <= 0) return Close(client, "it hung up");
    const std::span<const std::byte> message(buffer.data(), static_cast<size_t>(n));
    if (client->channel != nullptr) {
      if (!PassExtent(client, message)) return Close(client, "a malformed socket request");
      continue;
    }
    const uint64_t id = client->id;
    Greet(client, message);
    if (!clients_.contains(id)) return;
  }
}

absl::StatusOr<std::shared_ptr<Channel>> ShmClients::Admit(const ShmClient& client,
                                                           const shm::HelloRequest& hello) {
  QUARRY_ASSIGN_OR_RETURN(const ChannelGeometry geometry,
                          Negotiate(hello, options_, parts_.versions));
  if (closing_) return absl::UnavailableError("the daemon is draining; it takes no new clients");
  QUARRY_ASSIGN_OR_RETURN(PeerIdentity peer, parts_.tenants.OfUser(client.credentials.uid));
  if (parts_.reaper.channels() >= options_.max_channels) {
    return absl::ResourceExhaustedError(
        absl::StrCat("shm.max_channels = ", options_.max_channels, " clients are attached"));
  }
  const uint64_t used = parts_.reaper.channel_bytes();
  if (geometry.total_bytes > options_.max_total_bytes - std::min(used, options_.max_total_bytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a channel of ", geometry.total_bytes, " bytes, ", used,
                     " in use, shm.max_total_bytes is ", options_.max_total_bytes));
  }
  const std::string name = ClientNameOf(hello);
  QUARRY_ASSIGN_OR_RETURN(const SessionId session, parts_.engine.StartSession(peer.tenant, name));
  absl::StatusOr<std::unique_ptr<Channel>> channel =
      Channel::Create(geometry, {session, std::move(peer), name, client.credentials.pid});
  if (!channel.ok()) {
    parts_.reaper.EndSession(session);
    return channel.status();
  }
  return parts_.reaper.Adopt(*std::move(channel));
}

void ShmClients::Greet(ShmClient* client, std::span<const std::byte> message) {
  absl::StatusOr<std::shared_ptr<Channel>> channel = absl::InvalidArgumentError(absl::StrCat(
      "a handshake of ", message.size(), " bytes; it has ", sizeof(shm::HelloRequest)));
  if (message.size() == sizeof(shm::HelloRequest)) {
    shm::HelloRequest hello;
    std::memcpy(&hello, message.data(), sizeof(hello));
    channel = Admit(*client, hello);
  }
  if (!channel.ok()) {
    parts_.counters.shm_handshakes_refused.fetch_add(1, std::memory_order_relaxed);
    LogClientEvent(LogLevel::kWarning, "shm client refused",
                   {{"uid", client->credentials.uid},
                    {"client_pid", client->credentials.pid},
                    {"why", channel.status()}});
    const shm::HelloReply refusal = RefusalOf(channel.status(), parts_.versions);
    (void)SendWithDescriptors(client->socket.get(), BytesOf(refusal), {});
    return Close(client, "refused");
  }
  client->channel = *std::move(channel);
  client->last_traffic_ns = SteadyNowNs();
  --ungreeted_;
  greeted_.push_back(client);
  parts_.counters.shm_channels.fetch_add(1, std::memory_order_relaxed);
  parts_.counters.shm_channels_opened.fetch_add(1, std::memory_order_relaxed);

  Channel& open = *client->channel;
  epoll_event event{.events = EPOLLIN | EPOLLET, .data = {.u64 = client->id << 2 | kDoorbell}};
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, open.doorbell_fd(), &event) != 0) {
    return Close(client, "epoll_ctl failed");
  }
  const Channel::Owner& owner = open.owner();
  const shm::HelloReply reply =
      AcceptanceOf(open.geometry(), parts_.versions, owner.session.value, owner.peer.tenant);
  const int descriptors[] = {open.memory_fd(), open.doorbell_fd()};
  if (absl::Status sent = SendWithDescriptors(client->socket.get(), BytesOf(reply), descriptors);
      !sent.ok()) {
    return Close(client, "the handshake's answer could not be sent");
  }
  open.CloseMemoryFd();
  LogClientEvent(LogLevel::kInfo, "shm client attached",
                 {{"session", owner.session.value},
                  {"tenant", owner.peer.tenant},
                  {"client", owner.client_name},
                  {"client_pid", owner.pid},
                  {"slots", open.geometry().slots},
                  {"slot_bytes", open.geometry().slot_bytes}});
}

bool ShmClients::PassExtent(ShmClient* client, std::span<const std::byte> message) {
  shm::SocketRequest request;
  if (message.size() != sizeof(request)) return false;
  std::memcpy(&request, message.data(), sizeof(request));
  if (request.kind != static_cast<uint32_t>(shm::SocketRequestKind::kExtent)) return false;

  shm::SocketReply reply{};
  reply.kind = request.kind;
  reply.extent = request.extent;
  absl::StatusOr<ExtentInfo> extent =
      parts_.engine.Extent(client->channel->owner().session, request.extent);
  reply.status = static_cast<uint32_t>(extent.status().code());
  if (!extent.ok()) {
    return SendWithDescriptors(client->socket.get(), BytesOf(reply), {}).ok();
  }
  reply.numa_node = extent->numa_node;
  reply.bytes = extent->bytes;
  reply.page_bytes = extent->page_bytes;
  const int descriptors[] = {extent->fd};  // open: `extent` keeps it so
  return SendWithDescriptors(client->socket.get(), BytesOf(reply), descriptors).ok();
}

void ShmClients::Close(ShmClient* client, std::string_view why) {
  if (client->channel != nullptr) {
    const Channel::Owner& owner = client->channel->owner();
    LogClientEvent(LogLevel::kInfo, "shm client gone",
                   {{"session", owner.session.value},
                    {"tenant", owner.peer.tenant},
                    {"client", owner.client_name},
                    {"client_pid", owner.pid},
                    {"why", why}});
    client->channel->SetClosing();
    epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, client->channel->doorbell_fd(), nullptr);
    parts_.reaper.EndSession(owner.session);
    greeted_.erase(std::find(greeted_.begin(), greeted_.end(), client));
    parts_.counters.shm_channels.fetch_sub(1, std::memory_order_relaxed);
  } else {
    --ungreeted_;
  }
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, client->socket.get(), nullptr);
  clients_.erase(client->id);
}

void ShmClients::SetClosing() {
  closing_ = true;
  for (ShmClient* client : greeted_) client->channel->SetClosing();
}

}  // namespace quarry

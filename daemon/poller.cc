#include "daemon/poller.h"

#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <utility>

#include "daemon/log.h"
#include "daemon/steady_clock.h"

namespace quarry {
namespace {

// How often a spinning poller looks at the sockets: far below the second within which a dead
// client's leases must end, far above the cost of one look (about 0.5 µs).
constexpr uint64_t kSocketIntervalNs = 200'000;
// Entries of one ring before the next ring gets its turn.
constexpr int kEntriesAtOnce = 16;
// After spinning in vain for so long the poller offers its core at every turn. Where spinning
// threads outnumber cores, the client that is about to submit may need this one: with client,
// poller and one executor on 2 cores, an empty attend took 66 µs at the median without such
// offers and 5 to 9 µs with them. Alone on a core an offer costs about 0.3 µs.
constexpr uint64_t kYieldAfterNs = 1'000;
constexpr int kDrainIntervalMs = 1;

void SpinPause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Poller::Poller(const ShmOptions& options, const SlotServices& services)
    : options_(options), services_(services) {}

absl::StatusOr<std::unique_ptr<Poller>> Poller::Start(const ShmOptions& options,
                                                      const SlotServices& services,
                                                      ShmClients::Parts parts) {
  std::unique_ptr<Poller> poller(new Poller(options, services));
  poller->wake_fd_.Reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!poller->wake_fd_.valid()) return ErrnoStatus(errno, "eventfd");
  absl::StatusOr<std::unique_ptr<ShmClients>> clients =
      ShmClients::Create(options, parts, poller->wake_fd_.get());
  if (!clients.ok()) return clients.status();
  poller->clients_ = *std::move(clients);
  poller->thread_ = std::thread([raw = poller.get()] { raw->Run(); });
  pthread_setname_np(poller->thread_.native_handle(), "quarry-poller");
  return poller;
}

Poller::~Poller() {
  if (!thread_.joinable()) return;
  stop_.store(true);
  Wake();
  thread_.join();
}

void Poller::BeginDrain() {
  draining_.store(true);
  Wake();
}

void Poller::Wake() {
  const uint64_t one = 1;
  // Watched edge-triggered and never read; its counter cannot fill up in our lifetime.
  [[maybe_unused]] const ssize_t n = write(wake_fd_.get(), &one, sizeof(one));
}

void Poller::Run() {
  uint64_t last_work_ns = 0, last_sockets_ns = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    const uint64_t now_ns = SteadyNowNs();
    // A scan's task only when no ring has an entry: nobody waits behind another's large attend.
    const bool worked = ServeRings(now_ns) || services_.parts.engine.Work();
    if (worked) last_work_ns = now_ns;
    if (now_ns - last_sockets_ns >= kSocketIntervalNs) {
      last_sockets_ns = now_ns;
      clients_->HandleEvents(0, now_ns);
      if (draining_.load(std::memory_order_relaxed)) NoteDrain();
    }
    const bool armed = AnyArmed(now_ns);
    SetEngineArmed(armed);
    if (worked) continue;
    const uint64_t idle_ns = now_ns - last_work_ns;
    if (!armed && idle_ns >= options_.linger_us * 1000ull) {
      Park(now_ns);
    } else if (idle_ns < kYieldAfterNs) {
      SpinPause();
    } else {
      sched_yield();
    }
  }
  SetEngineArmed(false);
  clients_.reset();
}

bool Poller::ServeRings(uint64_t now_ns) {
  bool worked = false;
  const std::vector<ShmClient*>& clients = clients_->greeted();
  for (size_t i = 0; i < clients.size();) {
    ShmClient* client = clients[i];
    worked |= ServeRing(client, now_ns);
    if (i < clients.size() && clients[i] == client) ++i;  // else it was closed and erased
  }
  return worked;
}

bool Poller::ServeRing(ShmClient* client, uint64_t now_ns) {
  bool worked = false;
  for (int i = 0; i < kEntriesAtOnce; ++i) {
    Submission request;
    std::string why;
    const Channel::Next next = client->channel->TakeEntry(&request, &why);
    if (next == Channel::Next::kNone) break;
    worked = true;
    if (next == Channel::Next::kMalformed) {
      services_.counters.shm_channels_malformed.fetch_add(1, std::memory_order_relaxed);
      clients_->Close(client, "malformed entry: " + why);
      break;
    }
    client->last_traffic_ns = now_ns;
    request.seen_ns = i == 0 ? now_ns : SteadyNowNs();
    ServeRequest(services_, client->channel, request);
  }
  return worked;
}

// An armed client keeps the poller awake until armed_idle_ms after its last sign of life: a
// request, one in flight, a doorbell, or arming itself.
bool Poller::KeepsAwake(ShmClient* client, uint64_t now_ns) {
  const bool armed = client->channel->armed();
  if (armed && (!client->was_armed || client->channel->in_flight() > 0)) {
    client->last_traffic_ns = now_ns;
  }
  client->was_armed = armed;
  return armed && now_ns - client->last_traffic_ns < options_.armed_idle_ms * 1'000'000ull;
}

bool Poller::AnyArmed(uint64_t now_ns) {
  bool any = false;
  for (ShmClient* client : clients_->greeted()) any |= KeepsAwake(client, now_ns);
  return any;
}

void Poller::SetEngineArmed(bool armed) {
  if (armed == engine_armed_) return;
  engine_armed_ = armed;
  services_.parts.engine.SetArmed(armed);
}

// No lost wake-up. A client writes its ring entry (or `armed`), fences, and reads `parked`; it
// rings the doorbell if that is 1. We write `parked`, fence, and read the rings (and `armed`).
// Both fences are sequentially consistent, so one side must see the other's store: either the
// client rings, and epoll_wait returns, or we find the entry here and do not sleep. A doorbell
// rung before epoll_wait is not lost either: its edge stays pending in the epoll instance.
void Poller::Park(uint64_t now_ns) {
  for (ShmClient* client : clients_->greeted()) client->channel->SetParked(true);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  bool sleep = true;
  for (ShmClient* client : clients_->greeted()) {
    if (client->channel->HasEntry() || KeepsAwake(client, now_ns)) sleep = false;
  }
  if (sleep) {
    services_.counters.shm_parks.fetch_add(1, std::memory_order_relaxed);
    const bool draining = draining_.load(std::memory_order_relaxed);
    if (draining) NoteDrain();
    clients_->HandleEvents(draining ? kDrainIntervalMs : -1, now_ns);
  }
  for (ShmClient* client : clients_->greeted()) client->channel->SetParked(false);
}

void Poller::NoteDrain() {
  if (!told_closing_) {
    told_closing_ = true;
    clients_->SetClosing();
  }
  bool idle = true;
  for (ShmClient* client : clients_->greeted()) {
    idle &= client->channel->in_flight() == 0 && !client->channel->HasEntry();
  }
  drained_.store(idle, std::memory_order_release);
}

}  // namespace quarry

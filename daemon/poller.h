// The one thread that serves every channel's ring.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "absl/status/statusor.h"
#include "daemon/shm_clients.h"
#include "daemon/slot_calls.h"

namespace quarry {

// Spins over the rings while a client is armed, or shortly after a request; otherwise sleeps in
// epoll_wait on doorbells and sockets. Never blocks on a client, an engine call that may take
// long, or the log; it helps the executor one task at a time while no ring has an entry.
class Poller {
 public:
  static absl::StatusOr<std::unique_ptr<Poller>> Start(const ShmOptions& options,
                                                       const SlotServices& services,
                                                       ShmClients::Parts parts);
  // Stops the thread and closes every client; requests in flight keep their channels.
  ~Poller();

  // Known clients are told, new ones refused. What is answered to requests is the services' say.
  void BeginDrain();
  // After BeginDrain: no request is in flight and every ring is empty.
  bool drained() const { return drained_.load(std::memory_order_acquire); }

 private:
  Poller(const ShmOptions& options, const SlotServices& services);
  void Run();
  bool ServeRings(uint64_t now_ns);
  bool ServeRing(ShmClient* client, uint64_t now_ns);
  bool AnyArmed(uint64_t now_ns);
  bool KeepsAwake(ShmClient* client, uint64_t now_ns);
  void SetEngineArmed(bool armed);
  void Park(uint64_t now_ns);
  void Wake();
  void NoteDrain();

  const ShmOptions options_;
  const SlotServices& services_;
  FileDescriptor wake_fd_;
  std::unique_ptr<ShmClients> clients_;  // the thread's own, after Start
  bool engine_armed_ = false;            // the thread's own
  bool told_closing_ = false;            // the thread's own
  std::atomic<bool> stop_{false}, draining_{false}, drained_{false};
  std::thread thread_;
};

}  // namespace quarry

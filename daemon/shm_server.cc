#include "daemon/shm_server.h"

#include <sys/socket.h>

#include <utility>

#include "absl/time/clock.h"
#include "daemon/bulk_pool.h"
#include "daemon/log.h"
#include "daemon/poller.h"
#include "daemon/session_reaper.h"
#include "daemon/slot_calls.h"
#include "daemon/unix_socket.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

class ShmServerImpl : public ShmServer {
 public:
  ShmServerImpl(const ShmOptions& options, const ServiceParts& parts, const PeerTenants& tenants,
                VersionRange versions, std::unique_ptr<UnixListener> listener)
      : options_(options),
        parts_(parts),
        tenants_(tenants),
        versions_(versions),
        listener_(std::move(listener)),
        reaper_(parts.engine),
        bulk_({options.bulk_threads, options.bulk_queue, "quarry-bulk"}),
        services_{parts, parts.metrics.counters(), bulk_, options.bulk_queue_per_client} {}

  absl::Status StartPoller() {
    QUARRY_ASSIGN_OR_RETURN(poller_, Poller::Start(options_, services_,
                                                   {parts_.engine, tenants_, reaper_,
                                                    services_.counters, *listener_, versions_}));
    return absl::OkStatus();
  }

  // Requests in flight hold their channels, and the reaper and the pool they report to; so the
  // poller goes first and the rest waits for them.
  ~ShmServerImpl() override {
    poller_.reset();
    reaper_.AwaitNoChannels(absl::InfiniteFuture());
  }

  void BeginDrain() override { poller_->BeginDrain(); }

  bool AwaitDrained(absl::Time deadline) override {
    while (!poller_->drained()) {
      if (absl::Now() >= deadline) return false;
      absl::SleepFor(absl::Milliseconds(1));
    }
    return true;
  }

 private:
  const ShmOptions options_;
  const ServiceParts& parts_;
  const PeerTenants& tenants_;
  const VersionRange versions_;
  const std::unique_ptr<UnixListener> listener_;
  SessionReaper reaper_;
  BulkPool bulk_;
  const SlotServices services_;
  std::unique_ptr<Poller> poller_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ShmServer>> ShmServer::Start(const ShmOptions& options,
                                                            const ServiceParts& parts,
                                                            const PeerTenants& tenants,
                                                            VersionRange versions) {
  QUARRY_ASSIGN_OR_RETURN(
      std::unique_ptr<UnixListener> listener,
      UnixListener::Listen({options.socket, SOCK_SEQPACKET, options.socket_mode}));
  auto server =
      std::make_unique<ShmServerImpl>(options, parts, tenants, versions, std::move(listener));
  QUARRY_RETURN_IF_ERROR(server->StartPoller());
  Log(LogLevel::kInfo, "serving shared memory", {{"socket", options.socket}});
  return server;
}

}  // namespace quarry

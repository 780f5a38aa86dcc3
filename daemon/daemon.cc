#include "daemon/daemon.h"

#include <unistd.h>

#include <atomic>
#include <functional>

#include "absl/time/clock.h"
#include "cpu_index/simd.h"
#include "daemon/call_dispatch.h"
#include "daemon/grpc_listener.h"
#include "daemon/log.h"
#include "daemon/shm_server.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

class DaemonImpl : public Daemon {
 public:
  DaemonImpl(const Config& config, std::unique_ptr<Engine> engine, std::string_view simd_level,
             std::function<void()> on_drain)
      : engine_(std::move(engine)),
        tenants_(config.tenants, geteuid()),
        metrics_(*engine_, [this] { return UptimeSeconds(); }),
        parts_{*engine_,
               metrics_,
               QUARRY_VERSION,
               std::string(simd_level),
               [this] { return UptimeSeconds(); },
               [this] { return draining_.load(std::memory_order_relaxed); },
               std::move(on_drain)} {}

  absl::Status StartServers(const Config& config) {
    QUARRY_ASSIGN_OR_RETURN(shm_, ShmServer::Start(config.shm, parts_, tenants_));
    if (!config.grpc.socket.empty() || !config.grpc.listen.empty()) {
      QUARRY_ASSIGN_OR_RETURN(grpc_, GrpcListener::Start(config.grpc, parts_, tenants_));
    }
    if (!config.metrics.listen.empty()) {
      QUARRY_ASSIGN_OR_RETURN(page_, MetricsServer::Start(config.metrics, metrics_));
      Log(LogLevel::kInfo, "serving metrics",
          {{"listen", config.metrics.listen}, {"port", page_->port()}});
    }
    return absl::OkStatus();
  }

  bool Drain(absl::Time deadline) override {
    draining_.store(true);
    engine_->Drain();
    shm_->BeginDrain();
    const bool shm_done = shm_->AwaitDrained(deadline);
    return (grpc_ == nullptr || grpc_->AwaitDrained(deadline)) && shm_done;
  }

 private:
  double UptimeSeconds() const { return absl::ToDoubleSeconds(absl::Now() - started_); }

  const absl::Time started_ = absl::Now();
  const std::unique_ptr<Engine> engine_;
  const PeerTenants tenants_;
  Metrics metrics_;
  std::atomic<bool> draining_{false};
  const ServiceParts parts_;
  // Stopped in reverse order, before the engine.
  std::unique_ptr<ShmServer> shm_;
  std::unique_ptr<GrpcListener> grpc_;
  std::unique_ptr<MetricsServer> page_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Daemon>> Daemon::Start(const Config& config,
                                                      std::function<void()> on_drain) {
  QUARRY_ASSIGN_OR_RETURN(const SimdLevel level, ChooseSimdLevel());
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine, Engine::Create(config.engine));
  auto daemon = std::make_unique<DaemonImpl>(config, std::move(engine), SimdLevelName(level),
                                             std::move(on_drain));
  QUARRY_RETURN_IF_ERROR(daemon->StartServers(config));
  return daemon;
}

}  // namespace quarry

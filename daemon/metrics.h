// What quarryd counts. One list of samples feeds both /metrics (Prometheus) and
// Admin.Statistics, so that the two never disagree. Audits, which name models of all tenants, are
// on /metrics alone: a tenant asks Admin.Audit for its own.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/engine.h"
#include "daemon/latency_histogram.h"

namespace quarry {

struct MetricsOptions {
  std::string listen;         // address:port; empty: off
  bool allow_remote = false;  // the figures name models, but no tenant; still, off by default
};

// Counted by the transports; relaxed atomics, any thread.
struct TransportCounters {
  std::atomic<uint64_t> shm_channels{0};  // open now
  std::atomic<uint64_t> shm_handshakes_refused{0};
  std::atomic<uint64_t> shm_channels_malformed{0};  // closed because of what the client wrote
  std::atomic<uint64_t> shm_channels_opened{0};
  std::array<std::atomic<uint64_t>, 8> shm_requests{};  // by opcode; 0: unknown opcodes
  std::atomic<uint64_t> shm_request_errors{0};
  std::atomic<uint64_t> shm_bulk_refused{0};  // queue full
  std::atomic<uint64_t> shm_parks{0};         // how often the poller went to sleep
  std::atomic<uint64_t> grpc_calls{0};
  std::atomic<uint64_t> grpc_call_errors{0};
  std::atomic<uint64_t> grpc_sessions{0};     // open now
  std::atomic<uint64_t> grpc_connections{0};  // open now, of the Unix socket
  std::atomic<uint64_t> grpc_connections_refused{0};
  std::atomic<uint64_t> grpc_calls_refused{0};  // limits and full queues
  LatencyHistogram shm_attend;                  // request seen to answer written
  LatencyHistogram grpc_attend;
};

struct MetricSample {
  enum class Type { kCounter, kGauge } type = Type::kGauge;
  std::string name;  // quarry_<area>_<what>_<unit>
  std::string help;
  std::vector<std::pair<std::string, std::string>> labels;
  double value = 0;
};
struct MetricHistogram {
  std::string name, help;
  LatencyHistogram::Snapshot snapshot;
};
struct MetricsSnapshot {
  std::vector<MetricSample> samples;
  std::vector<MetricHistogram> histograms;
};

// Thread-safe; Collect costs one Engine::Stats().
class Metrics {
 public:
  Metrics(const Engine& engine, std::function<double()> uptime_seconds);

  TransportCounters& counters() { return counters_; }
  MetricsSnapshot Collect() const;
  // Of audited answers, labelled by model, layer and KV head: of the 8 models audited most, the
  // first 1,024 heads each. Samples of one name follow each other.
  std::vector<MetricSample> CollectAudits() const;
  // The same figures under their names as on /metrics, e.g.
  // quarry_shm_requests_total{opcode="nop"}.
  std::map<std::string, double> Flat() const;

 private:
  const Engine& engine_;
  const std::function<double()> uptime_seconds_;
  TransportCounters counters_;
};

// Serves /metrics over HTTP until destroyed. FailedPrecondition names an address in use.
class MetricsServer {
 public:
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(const MetricsOptions& options,
                                                              const Metrics& metrics);
  virtual ~MetricsServer() = default;
  virtual int port() const = 0;
};

}  // namespace quarry

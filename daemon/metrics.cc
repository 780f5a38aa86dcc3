#include "daemon/metrics.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace quarry {
namespace {

constexpr std::string_view kOpcodeNames[8] = {"unknown", "call",    "append", "attend",
                                              "lease",   "release", "put",    "nop"};

// Collects samples with their names spelled once.
class Writer {
 public:
  explicit Writer(MetricsSnapshot* out) : out_(*out) {}
  template <typename T>
  void Gauge(std::string_view name, std::string_view help, const T& value) {
    Add(MetricSample::Type::kGauge, name, help, static_cast<double>(value));
  }
  template <typename T>
  void Counter(std::string_view name, std::string_view help, const T& value) {
    Add(MetricSample::Type::kCounter, name, help, static_cast<double>(value));
  }

 private:
  void Add(MetricSample::Type type, std::string_view name, std::string_view help, double value) {
    out_.samples.push_back({type, std::string(name), std::string(help), "", "", value});
  }
  MetricsSnapshot& out_;
};

void WriteStore(const BlockStoreStats& store, Writer& w) {
  w.Gauge("quarry_arena_capacity_bytes", "RAM the arena may hold", store.arena.capacity_bytes);
  w.Gauge("quarry_arena_extent_bytes", "RAM in extents now", store.arena.extent_bytes);
  w.Gauge("quarry_arena_used_bytes", "RAM in slots in use", store.arena.used_bytes);
  w.Gauge("quarry_arena_huge_page_bytes", "extent bytes on huge pages",
          store.arena.huge_page_bytes);
  w.Gauge("quarry_arena_extents_count", "extents now", store.arena.extents);
  w.Gauge("quarry_store_blocks_count", "blocks in any state", store.blocks);
  w.Gauge("quarry_store_published_blocks_count", "blocks that can be found", store.published);
  w.Gauge("quarry_store_leased_blocks_count", "blocks some client holds", store.leased);
  w.Gauge("quarry_store_pinned_blocks_count", "blocks kept by a pin", store.pinned);
  w.Gauge("quarry_store_used_bytes", "bytes of blocks", store.bytes);
  w.Gauge("quarry_store_reserved_bytes", "bytes set aside for open contexts", store.reserved_bytes);
  w.Counter("quarry_store_hits_total", "block look-ups that found one", store.hits);
  w.Counter("quarry_store_misses_total", "block look-ups that found none", store.misses);
  w.Counter("quarry_store_evictions_total", "blocks evicted for room", store.evictions);
  w.Counter("quarry_store_refused_total", "reservations refused for lack of room", store.refused);
  w.Counter("quarry_store_digest_failures_total", "blocks lost to a wrong checksum",
            store.digest_failures);
  w.Counter("quarry_store_duplicate_publishes_total", "blocks dropped for an earlier equal one",
            store.duplicate_publishes);
}

void WriteEngine(const EngineStats& stats, Writer& w) {
  w.Gauge("quarry_engine_contexts_count", "contexts open", stats.contexts);
  w.Gauge("quarry_engine_sessions_count", "clients attached", stats.sessions);
  w.Counter("quarry_context_opened_total", "contexts opened", stats.opened);
  w.Counter("quarry_context_reused_tokens_total", "prompt tokens found in the cache",
            stats.reused_tokens);
  w.Counter("quarry_append_tokens_total", "token-layers appended", stats.append_tokens);
  w.Counter("quarry_append_bytes_total", "bytes of K and V appended", stats.append_bytes);
  w.Counter("quarry_attend_rows_total", "rows answered", stats.attend_rows);
  w.Counter("quarry_attend_failures_total", "rows answered with an error", stats.attend_failures);
  w.Counter("quarry_attend_read_bytes_total", "bytes of K, V and index read", stats.attend_bytes);
  w.Counter("quarry_attend_tokens_total", "tokens attended, summed over heads",
            stats.attend_tokens);
  w.Gauge("quarry_attend_queued_batches_count", "attend batches waiting", stats.queued_batches);
  w.Counter("quarry_attend_refused_batches_total", "attend batches refused: queue full",
            stats.refused_batches);
  w.Gauge("quarry_index_runs_count", "runs indexed now", stats.runs_live);
  w.Counter("quarry_index_runs_built_total", "runs indexed since the start", stats.runs_indexed);
  w.Gauge("quarry_engine_leases_count", "leases of all sessions", stats.leases);
  w.Counter("quarry_engine_publish_failures_total", "full blocks that stayed private",
            stats.publish_failures);
  w.Counter("quarry_engine_read_digest_failures_total", "reads that met a wrong checksum",
            stats.read_digest_failures);
}

// The engine's own percentiles since the start, one sample per quantile.
void WriteLatency(std::string_view name, std::string_view help, const LatencySummary& latency,
                  MetricsSnapshot* out) {
  const std::pair<const char*, double> quantiles[] = {{"0.5", latency.p50_us},
                                                      {"0.9", latency.p90_us},
                                                      {"0.99", latency.p99_us},
                                                      {"0.999", latency.p999_us},
                                                      {"1", latency.max_us}};
  for (const auto& [quantile, microseconds] : quantiles) {
    out->samples.push_back({MetricSample::Type::kGauge, std::string(name), std::string(help),
                            "quantile", quantile, microseconds * 1e-6});
  }
}

void WriteTransports(const TransportCounters& c, Writer& w) {
  w.Gauge("quarry_shm_channels_count", "shared-memory clients attached", c.shm_channels);
  w.Counter("quarry_shm_channels_opened_total", "shared-memory handshakes accepted",
            c.shm_channels_opened);
  w.Counter("quarry_shm_handshakes_refused_total", "shared-memory handshakes refused",
            c.shm_handshakes_refused);
  w.Counter("quarry_shm_channels_malformed_total", "channels closed for what the client wrote",
            c.shm_channels_malformed);
  w.Counter("quarry_shm_request_errors_total", "requests answered with an error",
            c.shm_request_errors);
  w.Counter("quarry_shm_bulk_refused_total", "requests refused because the bulk queue was full",
            c.shm_bulk_refused);
  w.Counter("quarry_shm_parks_total", "times the poller went to sleep", c.shm_parks);
  w.Counter("quarry_grpc_calls_total", "gRPC calls", c.grpc_calls);
  w.Counter("quarry_grpc_call_errors_total", "gRPC calls that failed", c.grpc_call_errors);
  w.Gauge("quarry_grpc_sessions_count", "gRPC sessions open", c.grpc_sessions);
  w.Gauge("quarry_grpc_connections_count", "connections of the gRPC Unix socket",
          c.grpc_connections);
  w.Counter("quarry_grpc_connections_refused_total", "gRPC connections refused",
            c.grpc_connections_refused);
  w.Counter("quarry_grpc_calls_refused_total", "gRPC calls refused by limits and full queues",
            c.grpc_calls_refused);
}

}  // namespace

Metrics::Metrics(const Engine& engine, std::function<double()> uptime_seconds)
    : engine_(engine), uptime_seconds_(std::move(uptime_seconds)) {}

MetricsSnapshot Metrics::Collect() const {
  MetricsSnapshot out;
  Writer w(&out);
  const EngineStats stats = engine_.Stats();
  w.Gauge("quarry_daemon_uptime_seconds", "since the start", uptime_seconds_());
  WriteStore(stats.store, w);
  WriteEngine(stats, w);
  WriteLatency("quarry_engine_attend_seconds", "attend batches inside the engine, since the start",
               stats.attend, &out);
  WriteLatency("quarry_engine_append_seconds", "appends inside the engine, since the start",
               stats.append, &out);
  WriteLatency("quarry_engine_open_seconds", "opens inside the engine, since the start", stats.open,
               &out);
  WriteTransports(counters_, w);
  for (size_t i = 0; i < counters_.shm_requests.size(); ++i) {
    out.samples.push_back({MetricSample::Type::kCounter, "quarry_shm_requests_total",
                           "shared-memory requests by kind", "opcode", std::string(kOpcodeNames[i]),
                           static_cast<double>(counters_.shm_requests[i].load())});
  }
  out.histograms.push_back({"quarry_shm_attend_latency_seconds",
                            "attend over shared memory, from request seen to answer written",
                            counters_.shm_attend.Read()});
  out.histograms.push_back({"quarry_grpc_attend_latency_seconds",
                            "attend over gRPC, inside the daemon", counters_.grpc_attend.Read()});
  return out;
}

std::map<std::string, double> Metrics::Flat() const {
  std::map<std::string, double> flat;
  const MetricsSnapshot snapshot = Collect();
  for (const MetricSample& s : snapshot.samples) {
    std::string name = s.name;
    if (!s.label_name.empty())
      absl::StrAppend(&name, "{", s.label_name, "=\"", s.label_value, "\"}");
    flat[name] = s.value;
  }
  for (const MetricHistogram& h : snapshot.histograms) {
    flat[h.name + "_count"] = static_cast<double>(h.snapshot.count());
    flat[h.name + "_sum"] = h.snapshot.sum_seconds;
    flat[h.name + "{quantile=\"0.5\"}"] = h.snapshot.Quantile(0.5);
    flat[h.name + "{quantile=\"0.99\"}"] = h.snapshot.Quantile(0.99);
    for (int i = 0; i < LatencyHistogram::kBounds; ++i) {
      flat[absl::StrFormat("%s_bucket{le=\"%g\"}", h.name, LatencyHistogram::BoundSeconds(i))] =
          static_cast<double>(h.snapshot.cumulative[i]);
    }
  }
  return flat;
}

}  // namespace quarry

#include "daemon/metrics.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace quarry {
namespace {

constexpr std::string_view kOpcodeNames[8] = {"unknown", "call",    "append", "attend",
                                              "lease",   "release", "put",    "nop"};

// A figure of Source. A name that ends in _total is a counter's, any other a gauge's.
template <typename Source, typename Number = uint64_t>
struct Figure {
  std::string_view name, help;
  Number Source::*value;
};

template <typename Source, typename Number, size_t N>
void Write(const Figure<Source, Number> (&figures)[N], const Source& source, MetricsSnapshot* out) {
  for (const Figure<Source, Number>& figure : figures) {
    const auto type =
        figure.name.ends_with("_total") ? MetricSample::Type::kCounter : MetricSample::Type::kGauge;
    const uint64_t value = source.*figure.value;
    out->samples.push_back(
        {type, std::string(figure.name), std::string(figure.help), {}, static_cast<double>(value)});
  }
}

constexpr Figure<ArenaStats> kArena[] = {
    {"quarry_arena_capacity_bytes", "RAM the arena may hold", &ArenaStats::capacity_bytes},
    {"quarry_arena_extent_bytes", "RAM in extents now", &ArenaStats::extent_bytes},
    {"quarry_arena_used_bytes", "RAM in slots in use", &ArenaStats::used_bytes},
    {"quarry_arena_huge_page_bytes", "extent bytes on huge pages", &ArenaStats::huge_page_bytes},
    {"quarry_arena_committed_bytes", "RAM of extents, those being made and those on their way back",
     &ArenaStats::committed_bytes},
    {"quarry_arena_spare_bytes", "RAM in extents in which nothing is used",
     &ArenaStats::spare_bytes},
    {"quarry_arena_given_back_bytes_total", "bytes of extents given back to the system",
     &ArenaStats::given_back_bytes},
    {"quarry_arena_huge_page_fallbacks_total", "extents that got small pages for huge ones",
     &ArenaStats::huge_page_fallbacks},
    {"quarry_arena_extents_count", "extents now", &ArenaStats::extents},
};

constexpr Figure<BlockStoreStats> kStore[] = {
    {"quarry_store_blocks_count", "blocks in any state", &BlockStoreStats::blocks},
    {"quarry_store_published_blocks_count", "blocks that can be found",
     &BlockStoreStats::published},
    {"quarry_store_leased_blocks_count", "blocks some client holds", &BlockStoreStats::leased},
    {"quarry_store_pinned_blocks_count", "blocks kept by a pin", &BlockStoreStats::pinned},
    {"quarry_store_used_bytes", "bytes of blocks", &BlockStoreStats::bytes},
    {"quarry_store_reserved_bytes", "bytes set aside for open contexts",
     &BlockStoreStats::reserved_bytes},
    {"quarry_store_hits_total", "block look-ups that found one", &BlockStoreStats::hits},
    {"quarry_store_misses_total", "block look-ups that found none", &BlockStoreStats::misses},
    {"quarry_store_evictions_total", "blocks evicted for room", &BlockStoreStats::evictions},
    {"quarry_store_ghost_hits_total", "blocks that came back soon after s3-fifo had evicted them",
     &BlockStoreStats::ghost_hits},
    {"quarry_store_refused_total", "reservations refused for lack of room",
     &BlockStoreStats::refused},
    {"quarry_store_digest_failures_total", "blocks lost to a wrong checksum",
     &BlockStoreStats::digest_failures},
    {"quarry_store_duplicate_publishes_total", "blocks dropped for an earlier equal one",
     &BlockStoreStats::duplicate_publishes},
};

constexpr Figure<DiskTierStats> kDiskTier[] = {
    {"quarry_disk_queued_bytes", "bytes of blocks that wait to be written",
     &DiskTierStats::queued_bytes},
    {"quarry_disk_not_admitted_total", "blocks not queued for the disk, or not written",
     &DiskTierStats::not_admitted},
    {"quarry_disk_promoted_total", "blocks read from the disk into RAM", &DiskTierStats::promoted},
    {"quarry_disk_failed_promotions_total", "look-ups of a block on the disk that were a miss",
     &DiskTierStats::failed_promotions},
};

constexpr Figure<PageCacheStats> kPages[] = {
    {"quarry_disk_page_capacity_bytes", "for pages of blocks that are used on the disk",
     &PageCacheStats::capacity_bytes},
    {"quarry_disk_page_bytes", "of such pages that are in RAM", &PageCacheStats::bytes},
    {"quarry_disk_page_hits_total", "pages that were wanted and in RAM", &PageCacheStats::hits},
    {"quarry_disk_page_reads_total", "pages that were wanted and read", &PageCacheStats::reads},
    {"quarry_disk_page_scans_total", "pages that scans read, which are not kept",
     &PageCacheStats::once},
    {"quarry_disk_page_evictions_total", "pages that made room for others",
     &PageCacheStats::evictions},
    {"quarry_disk_page_failures_total", "reads of pages that failed", &PageCacheStats::failures},
};

constexpr Figure<BlockLogStats> kLog[] = {
    {"quarry_disk_capacity_bytes", "of all segments", &BlockLogStats::capacity_bytes},
    {"quarry_disk_segments_count", "of the log", &BlockLogStats::segments},
    {"quarry_disk_free_segments_count", "that the next blocks go to",
     &BlockLogStats::free_segments},
    {"quarry_disk_condemned_segments_count", "not written until the next start",
     &BlockLogStats::condemned_segments},
    {"quarry_disk_blocks_count", "blocks on the disk", &BlockLogStats::blocks},
    {"quarry_disk_used_bytes", "bytes of blocks on the disk", &BlockLogStats::bytes},
    {"quarry_disk_appended_blocks_total", "blocks made durable", &BlockLogStats::appended_blocks},
    {"quarry_disk_appended_bytes_total", "bytes of blocks made durable",
     &BlockLogStats::appended_bytes},
    {"quarry_disk_written_bytes_total", "bytes written to the disk, with all that goes with blocks",
     &BlockLogStats::written_bytes},
    {"quarry_disk_moved_bytes_total", "bytes moved so that a segment could be used anew",
     &BlockLogStats::moved_bytes},
    {"quarry_disk_dropped_blocks_total", "blocks dropped for room", &BlockLogStats::dropped_blocks},
    {"quarry_disk_dropped_bytes_total", "bytes of blocks dropped for room",
     &BlockLogStats::dropped_bytes},
    {"quarry_disk_read_blocks_total", "blocks read", &BlockLogStats::read_blocks},
    {"quarry_disk_read_bytes_total", "bytes of blocks read", &BlockLogStats::read_bytes},
    {"quarry_disk_broken_blocks_total", "blocks that were not what was written",
     &BlockLogStats::broken_blocks},
    {"quarry_disk_read_errors_total", "reads that the disk failed", &BlockLogStats::read_errors},
    {"quarry_disk_write_errors_total", "group commits that the disk failed",
     &BlockLogStats::write_errors},
    {"quarry_disk_scrub_bytes_total", "bytes read by the scrubber", &BlockLogStats::scrubbed_bytes},
    {"quarry_disk_scrub_passes_total", "times that it has been through the log",
     &BlockLogStats::scrub_passes},
    {"quarry_disk_scrub_segments_count", "segments that it has been to in this pass",
     &BlockLogStats::scrubbed_segments},
    {"quarry_disk_scrub_broken_total", "parts, purges and footers that it found broken",
     &BlockLogStats::scrub_broken},
    {"quarry_disk_scrub_read_errors_total", "its reads that the disk failed",
     &BlockLogStats::scrub_read_errors},
    {"quarry_disk_recovered_blocks_count", "blocks found at the start",
     &BlockLogStats::recovered_blocks},
    {"quarry_disk_incomplete_blocks_count", "blocks of which the start found a part",
     &BlockLogStats::incomplete_blocks},
    {"quarry_disk_hidden_blocks_count", "blocks not found while a purge of them cannot be read",
     &BlockLogStats::hidden_blocks},
    {"quarry_disk_unreadable_keys_count", "tenants' keys that the start could not read",
     &BlockLogStats::unreadable_keys},
    {"quarry_disk_scanned_segments_count", "segments that the start read frame by frame",
     &BlockLogStats::scanned_segments},
};

constexpr Figure<EngineStats> kEngine[] = {
    {"quarry_engine_contexts_count", "contexts open", &EngineStats::contexts},
    {"quarry_engine_sessions_count", "clients attached", &EngineStats::sessions},
    {"quarry_context_opened_total", "contexts opened", &EngineStats::opened},
    {"quarry_context_reused_tokens_total", "prompt tokens found in the cache",
     &EngineStats::reused_tokens},
    {"quarry_context_shifted_tokens_total",
     "prompt tokens found in the cache at another position or behind other text",
     &EngineStats::shifted_tokens},
    {"quarry_append_tokens_total", "token-layers appended", &EngineStats::append_tokens},
    {"quarry_append_bytes_total", "bytes of K and V appended", &EngineStats::append_bytes},
    {"quarry_attend_rows_total", "rows answered", &EngineStats::attend_rows},
    {"quarry_attend_shifted_rows_total",
     "rows answered over tokens reused from another position or behind other text",
     &EngineStats::attend_shifted_rows},
    {"quarry_attend_failures_total", "rows answered with an error", &EngineStats::attend_failures},
    {"quarry_attend_read_bytes_total", "bytes of K, V and index read", &EngineStats::attend_bytes},
    {"quarry_attend_tokens_total", "tokens attended, summed over heads",
     &EngineStats::attend_tokens},
    {"quarry_attend_queued_batches_count", "attend batches waiting", &EngineStats::queued_batches},
    {"quarry_attend_refused_batches_total", "attend batches refused: queue full",
     &EngineStats::refused_batches},
    {"quarry_engine_runs_count", "runs that contexts use now", &EngineStats::runs_live},
    {"quarry_engine_runs_made_total", "runs made since the start", &EngineStats::runs_made},
    {"quarry_engine_leases_count", "leases of all sessions", &EngineStats::leases},
    {"quarry_engine_publish_failures_total", "full blocks that stayed private",
     &EngineStats::publish_failures},
    {"quarry_engine_read_digest_failures_total", "reads that met a wrong checksum",
     &EngineStats::read_digest_failures},
};

constexpr Figure<IndexStats> kIndex[] = {
    {"quarry_index_queued_runs_count", "runs to index, or being indexed", &IndexStats::queued_runs},
    {"quarry_index_runs_count", "runs that contexts use now, indexed at least once",
     &IndexStats::indexed_runs},
    {"quarry_index_built_total", "indexes of one layer and KV head built", &IndexStats::built},
    {"quarry_index_relearned_runs_total",
     "runs indexed anew, as often as their layer that was most often", &IndexStats::relearned},
    {"quarry_index_failed_total",
     "heads that are unfit for an index, and times that a layer met a full index.max_bytes",
     &IndexStats::failed},
    {"quarry_index_saved_layers_total", "layers of runs whose indexes were written to the disk",
     &IndexStats::saved_layers},
    {"quarry_index_saved_bytes_total", "bytes of them", &IndexStats::saved_bytes},
    {"quarry_index_loaded_layers_total",
     "layers whose indexes came from the disk and were not built", &IndexStats::loaded_layers},
    {"quarry_index_failed_loads_total", "layers whose indexes on the disk could not be used",
     &IndexStats::failed_loads},
    {"quarry_index_waiting_layers_count", "layers of contexts that wait for index.max_bytes",
     &IndexStats::waiting_layers},
    {"quarry_index_build_micros_total", "time of the threads that build",
     &IndexStats::build_micros},
    {"quarry_index_bytes", "memory of all indexes", &IndexStats::bytes},
    {"quarry_index_sample_bytes", "memory of the queries that indexes are fitted to",
     &IndexStats::sample_bytes},
};

constexpr Figure<AuditStats> kAudit[] = {
    {"quarry_audit_queued_count", "answers waiting to be audited", &AuditStats::queued},
    {"quarry_audit_done_total", "answers compared with exact attention", &AuditStats::done},
    {"quarry_audit_passed_by_total", "drawn answers that found the audit's queue full",
     &AuditStats::full},
    {"quarry_audit_given_up_total", "audits given up: the context closed, or the daemon drains",
     &AuditStats::given_up},
    {"quarry_audit_drifts_total", "times that indexes did not fit live queries any more",
     &AuditStats::drifts},
    {"quarry_audit_micros_total", "time of the threads that audit", &AuditStats::micros},
};

constexpr Figure<TransportCounters, std::atomic<uint64_t>> kTransports[] = {
    {"quarry_shm_channels_count", "shared-memory clients attached",
     &TransportCounters::shm_channels},
    {"quarry_shm_channels_opened_total", "shared-memory handshakes accepted",
     &TransportCounters::shm_channels_opened},
    {"quarry_shm_handshakes_refused_total", "shared-memory handshakes refused",
     &TransportCounters::shm_handshakes_refused},
    {"quarry_shm_channels_malformed_total", "channels closed for what the client wrote",
     &TransportCounters::shm_channels_malformed},
    {"quarry_shm_request_errors_total", "requests answered with an error",
     &TransportCounters::shm_request_errors},
    {"quarry_shm_bulk_refused_total", "requests refused because the bulk queue was full",
     &TransportCounters::shm_bulk_refused},
    {"quarry_shm_parks_total", "times the poller went to sleep", &TransportCounters::shm_parks},
    {"quarry_grpc_calls_total", "gRPC calls", &TransportCounters::grpc_calls},
    {"quarry_grpc_call_errors_total", "gRPC calls that failed",
     &TransportCounters::grpc_call_errors},
    {"quarry_grpc_sessions_count", "gRPC sessions open", &TransportCounters::grpc_sessions},
    {"quarry_grpc_connections_count", "connections of the gRPC Unix socket",
     &TransportCounters::grpc_connections},
    {"quarry_grpc_connections_refused_total", "gRPC connections refused",
     &TransportCounters::grpc_connections_refused},
    {"quarry_grpc_calls_refused_total", "gRPC calls refused by limits and full queues",
     &TransportCounters::grpc_calls_refused},
};

// The engine's own percentiles since the start, one sample per quantile.
void WriteLatency(std::string_view name, std::string_view help, const LatencySummary& latency,
                  MetricsSnapshot* out) {
  const std::pair<const char*, double> quantiles[] = {{"0.5", latency.p50_us},
                                                      {"0.9", latency.p90_us},
                                                      {"0.99", latency.p99_us},
                                                      {"0.999", latency.p999_us},
                                                      {"1", latency.max_us}};
  for (const auto& [quantile, microseconds] : quantiles) {
    out->samples.push_back({MetricSample::Type::kGauge,
                            std::string(name),
                            std::string(help),
                            {{"quantile", quantile}},
                            microseconds * 1e-6});
  }
}

}  // namespace

Metrics::Metrics(const Engine& engine, std::function<double()> uptime_seconds)
    : engine_(engine), uptime_seconds_(std::move(uptime_seconds)) {}

MetricsSnapshot Metrics::Collect() const {
  MetricsSnapshot out;
  const EngineStats stats = engine_.Stats();
  out.samples.push_back({MetricSample::Type::kGauge,
                         "quarry_daemon_uptime_seconds",
                         "since the start",
                         {},
                         uptime_seconds_()});
  Write(kArena, stats.store.arena, &out);
  Write(kStore, stats.store, &out);
  if (stats.store.disk.has_value()) {
    Write(kDiskTier, *stats.store.disk, &out);
    Write(kPages, stats.store.disk->pages, &out);
    Write(kLog, stats.store.disk->log, &out);
    out.samples.push_back({MetricSample::Type::kGauge,
                           "quarry_disk_load_bytes_per_second",
                           "that blocks are expected to be loaded at, by the last ones",
                           {},
                           stats.store.disk->load_bytes_per_second});
    out.samples.push_back({MetricSample::Type::kGauge,
                           "quarry_disk_recovery_seconds",
                           "that the start took to read the log",
                           {},
                           stats.store.disk->log.recovery_seconds});
    out.samples.push_back({MetricSample::Type::kGauge,
                           "quarry_disk_refuses",
                           "1 for a while after a write that failed: nothing is queued",
                           {},
                           stats.store.disk->refuses ? 1.0 : 0.0});
  }
  Write(kEngine, stats, &out);
  Write(kIndex, stats.index, &out);
  Write(kAudit, stats.audit, &out);
  WriteLatency("quarry_engine_attend_seconds", "attend batches inside the engine, since the start",
               stats.attend, &out);
  WriteLatency("quarry_engine_append_seconds", "appends inside the engine, since the start",
               stats.append, &out);
  WriteLatency("quarry_engine_open_seconds", "opens inside the engine, since the start", stats.open,
               &out);
  Write(kTransports, counters_, &out);
  for (size_t i = 0; i < counters_.shm_requests.size(); ++i) {
    out.samples.push_back({MetricSample::Type::kCounter,
                           "quarry_shm_requests_total",
                           "shared-memory requests by kind",
                           {{"opcode", std::string(kOpcodeNames[i])}},
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
    for (const auto& [label, text] : s.labels) {
      absl::StrAppend(&name, name == s.name ? "{" : ",", label, "=\"", text, "\"");
    }
    if (!s.labels.empty()) name += "}";
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

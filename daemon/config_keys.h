// Every key of the configuration, listed once; parsing, checking and printing walk this list.
#pragma once

#include "daemon/config.h"

namespace quarry {

// Calls the visitor once per key with its dotted name, its value and its allowed range:
// Text(key, string), Count(key, uint32, min, max), Number(key, double, min, max), Bytes(key,
// uint64, min, max), Flag(key, bool), Mode(key, mode_t), Choice(key, enum, {names in the enum's
// order}), Users(key, map), UserSet(key, set), LevelName(key, string).
template <typename Visitor, typename ConfigRef>
void VisitConfigKeys(Visitor& v, ConfigRef& c) {
  constexpr uint64_t kKiB = 1024, kMiB = kKiB * 1024, kTiB = kMiB * kMiB;

  v.Bytes("engine.arena_bytes", c.engine.arena.capacity_bytes, 16 * kMiB, 64 * kTiB);
  v.Bytes("engine.extent_bytes", c.engine.arena.extent_bytes, 2 * kMiB, kTiB);
  v.Bytes("engine.spare_bytes", c.engine.arena.spare_bytes, 0, 64 * kTiB);
  v.Choice("engine.huge_pages", c.engine.arena.huge_pages, {"never", "try"});
  v.Flag("engine.prefault", c.engine.arena.prefault);
  v.Count("engine.max_contexts", c.engine.max_contexts, 1, 1u << 20);
  v.Count("engine.max_sessions", c.engine.max_sessions, 1, 1u << 16);
  v.Bytes("engine.max_pinned_bytes_per_tenant", c.engine.max_pinned_bytes_per_tenant, 0, 64 * kTiB);
  v.Count("engine.max_pins_per_tenant", c.engine.max_pins_per_tenant, 0, 1u << 20);
  v.Count("engine.executor_threads", c.engine.executor_threads, 0, 1024);
  v.Count("engine.run_tokens", c.engine.run_tokens, 256, 1u << 20);
  v.Count("engine.first_run_token", c.engine.first_run_token, 0, 1u << 20);
  v.Count("engine.task_tokens", c.engine.task_tokens, 256, 1u << 20);
  v.Bytes("engine.inline_bytes", c.engine.inline_bytes, 0, 1024 * kMiB);
  v.Bytes("engine.max_attend_scratch_bytes", c.engine.max_attend_scratch_bytes, 16 * kMiB,
          kTiB);
  v.Count("engine.max_queued_batches", c.engine.max_queued_batches, 1, 1u << 20);
  v.Count("engine.max_leases_per_session", c.engine.max_leases_per_session, 1, 1u << 24);
  v.Count("engine.max_context_tokens", c.engine.max_context_tokens, 256, 1u << 30);

  v.Choice("eviction.policy", c.engine.eviction.kind, {"lru", "s3-fifo", "cost"});
  v.Bytes("eviction.recompute_bytes_per_s", c.engine.eviction.recompute_bytes_per_s, kMiB, kTiB);
  v.Count("eviction.recompute_doubling_blocks", c.engine.eviction.recompute_doubling_blocks, 1,
          1u << 20);

  v.Text("disk.path", c.engine.disk.file.path);
  v.Bytes("disk.bytes", c.engine.disk.file.bytes, 0, 64 * kTiB);
  v.Bytes("disk.segment_bytes", c.engine.disk.log.segment_bytes, 64 * kKiB, 1024 * kMiB);
  v.Text("disk.key_file", c.engine.disk.log.key.file);
  v.Text("disk.key_environment", c.engine.disk.log.key.environment);
  v.Choice("disk.io", c.engine.disk.file.io, {"auto", "uring", "threads"});
  v.Bytes("disk.scrub_bytes_per_s", c.engine.disk.log.scrub_bytes_per_s, 0, kTiB);
  v.Count("disk.queue_depth", c.engine.disk.file.queue_depth, 1, 1024);
  v.Bytes("disk.page_bytes", c.engine.disk.page_bytes, 0, 64 * kTiB);
  v.Bytes("disk.max_queued_bytes", c.engine.disk.tier.max_queued_bytes, kMiB, 64 * kTiB);

  v.Choice("index.kind", c.engine.index.choice.kind,
           {"auto", "exact", "codes", "clusters", "graph"});
  v.Choice("index.codes", c.engine.index.choice.codes,
           {"all", "learned"});
  v.Count("index.min_run_tokens", c.engine.index.choice.min_run_tokens, 0, 1u << 20);
  v.Count("index.threads", c.engine.index.threads, 1, 1024);
  v.Count("index.query_samples", c.engine.index.query_samples, 1, 65536);
  v.Bytes("index.max_sample_bytes", c.engine.index.max_sample_bytes, 0, 64 * kTiB);
  v.Bytes("index.max_bytes", c.engine.index.max_bytes, 0, 64 * kTiB);

  v.Number("audit.fraction", c.engine.audit.fraction, 0, 1);
  v.Count("audit.threads", c.engine.audit.threads, 1, 1024);
  v.Count("audit.queue", c.engine.audit.queue, 1, 65536);
  v.Number("audit.drift_factor", c.engine.audit.drift_factor, 0.01, 1000);

  v.Text("shm.socket", c.shm.socket);
  v.Mode("shm.socket_mode", c.shm.socket_mode);
  v.Count("shm.max_channels", c.shm.max_channels, 1, 4096);
  v.Bytes("shm.max_total_bytes", c.shm.max_total_bytes, kMiB, 64 * kTiB);
  v.Count("shm.default_slots", c.shm.default_slots, 1, 256);
  v.Count("shm.max_slots", c.shm.max_slots, 1, 256);
  v.Bytes("shm.default_slot_bytes", c.shm.default_slot_bytes, 16 * kKiB, 64 * kMiB);
  v.Bytes("shm.max_slot_bytes", c.shm.max_slot_bytes, 16 * kKiB, 64 * kMiB);
  v.Count("shm.armed_idle_ms", c.shm.armed_idle_ms, 1, 10000);
  v.Count("shm.linger_us", c.shm.linger_us, 0, 10000);
  v.Count("shm.hello_timeout_ms", c.shm.hello_timeout_ms, 10, 60000);
  v.Count("shm.bulk_threads", c.shm.bulk_threads, 1, 256);
  v.Count("shm.bulk_queue", c.shm.bulk_queue, 1, 65536);
  v.Count("shm.bulk_queue_per_client", c.shm.bulk_queue_per_client, 1, 65536);

  v.Text("grpc.socket", c.grpc.socket);
  v.Mode("grpc.socket_mode", c.grpc.socket_mode);
  v.Text("grpc.listen", c.grpc.listen);
  v.Text("grpc.tcp_tenant", c.grpc.tcp_tenant);
  v.Text("grpc.tls_certificate", c.grpc.tls_certificate);
  v.Text("grpc.tls_key", c.grpc.tls_key);
  v.Text("grpc.tls_client_ca", c.grpc.tls_client_ca);
  v.Bytes("grpc.max_message_bytes", c.grpc.max_message_bytes, 64 * kKiB, 1024 * kMiB);
  v.Bytes("grpc.max_put_bytes", c.grpc.max_put_bytes, 64 * kKiB, 16384 * kMiB);
  v.Count("grpc.threads", c.grpc.threads, 1, 1024);
  v.Count("grpc.queue", c.grpc.queue, 1, 65536);
  v.Count("grpc.max_calls_per_tenant", c.grpc.max_calls_per_tenant, 1, 65536);
  v.Count("grpc.max_sessions_per_tenant", c.grpc.max_sessions_per_tenant, 1, 65536);
  v.Count("grpc.max_connections", c.grpc.max_connections, 1, 4096);

  v.Users("tenants.users", c.tenants.tenants);
  v.Flag("tenants.refuse_unknown_users", c.tenants.refuse_unknown_users);
  v.UserSet("admin.users", c.tenants.admins);

  v.Text("metrics.listen", c.metrics.listen);
  v.Flag("metrics.allow_remote", c.metrics.allow_remote);
  v.LevelName("log.level", c.log.level);
  v.Choice("log.format", c.log.format, {"text", "json"});
  v.Count("daemon.drain_deadline_ms", c.drain_deadline_ms, 0, 3600000);
}

}  // namespace quarry

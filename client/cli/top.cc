// `quarry top`: one frame a second of tiers, hit rates and latencies.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include <nlohmann/json.hpp>

#include "absl/time/clock.h"
#include "client/cli/commands.h"
#include "client/cli/connection.h"
#include "proto/status_macros.h"

namespace quarry::cli {
namespace {

using Values = std::map<std::string, double>;

// A value that the daemon does not have is shown as nan: 0 would be a statement.
double Get(const Values& values, const char* name) {
  auto it = values.find(name);
  return it == values.end() ? std::nan("") : it->second;
}

double Share(double part, double whole) { return whole == 0 ? 0.0 : 100 * part / whole; }

// What changed between two frames, per second.
class Rates {
 public:
  Rates(const Values& now, const Values& before, double seconds)
      : now_(now), before_(before), seconds_(seconds) {}
  double operator()(const char* name) const {
    if (seconds_ == 0) return 0 * Get(now_, name);  // the first frame: nothing to compare with
    return (Get(now_, name) - Get(before_, name)) / seconds_;
  }

 private:
  const Values& now_;
  const Values& before_;
  const double seconds_;
};

void PrintFrame(const Values& v, const Rates& rate) {
  constexpr double kMiB = 1 << 20;
  const double hits = Get(v, "quarry_store_hits_total");
  const double lookups = hits + Get(v, "quarry_store_misses_total");
  std::printf("quarryd  up %.0f s   sessions %.0f   contexts %.0f   channels %.0f\n\n",
              Get(v, "quarry_daemon_uptime_seconds"), Get(v, "quarry_engine_sessions_count"),
              Get(v, "quarry_engine_contexts_count"), Get(v, "quarry_shm_channels_count"));
  std::printf("%-8s %12s %12s %7s %9s %8s %9s\n", "tier", "used MiB", "of MiB", "", "blocks",
              "leased", "pinned");
  const double used = Get(v, "quarry_arena_used_bytes");
  const double capacity = Get(v, "quarry_arena_capacity_bytes");
  std::printf("%-8s %12.1f %12.1f %6.1f%% %9.0f %8.0f %9.0f\n", "RAM", used / kMiB, capacity / kMiB,
              Share(used, capacity), Get(v, "quarry_store_published_blocks_count"),
              Get(v, "quarry_store_leased_blocks_count"),
              Get(v, "quarry_store_pinned_blocks_count"));
  if (v.contains("quarry_disk_capacity_bytes")) {
    const double disk = Get(v, "quarry_disk_used_bytes"), of = Get(v, "quarry_disk_capacity_bytes");
    std::printf(
        "%-8s %12.1f %12.1f %6.1f%% %9.0f   queued %.1f MiB, written %.1f MiB/s, read back "
        "%.1f/s\n",
        "disk", disk / kMiB, of / kMiB, Share(disk, of), Get(v, "quarry_disk_blocks_count"),
        Get(v, "quarry_disk_queued_bytes") / kMiB, rate("quarry_disk_written_bytes_total") / kMiB,
        rate("quarry_disk_promoted_total"));
  }
  std::printf("\n");
  std::printf("hit rate %.1f%% of %.0f block look-ups   evictions %.1f/s   refused %.0f\n",
              Share(hits, lookups), lookups, rate("quarry_store_evictions_total"),
              Get(v, "quarry_store_refused_total"));
  std::printf("append   %.0f tokens/s, %.1f MiB/s\n", rate("quarry_append_tokens_total"),
              rate("quarry_append_bytes_total") / kMiB);
  std::printf("attend   %.0f rows/s, %.2f GB/s read, %.0f failures\n",
              rate("quarry_attend_rows_total"), rate("quarry_attend_read_bytes_total") / 1e9,
              Get(v, "quarry_attend_failures_total"));
  std::printf("latency  attend p50 %.1f us, p99 %.1f us; digest failures %.0f\n",
              1e6 * Get(v, "quarry_engine_attend_seconds{quantile=\"0.5\"}"),
              1e6 * Get(v, "quarry_engine_attend_seconds{quantile=\"0.99\"}"),
              Get(v, "quarry_store_digest_failures_total"));
  std::fflush(stdout);
}

}  // namespace

absl::Status Top(const Arguments& a) {
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  Values before;
  absl::Time before_time = absl::Now();
  for (bool first = true;; first = false) {
    QUARRY_ASSIGN_OR_RETURN(Values now, client->Statistics());
    const absl::Time time = absl::Now();
    const double seconds = first ? 0 : absl::ToDoubleSeconds(time - before_time);
    if (a.json) {
      std::printf("%s\n", nlohmann::json(now).dump().c_str());
      std::fflush(stdout);
    } else {
      if (!a.once) std::printf("\033[H\033[2J");  // home, clear
      PrintFrame(now, Rates(now, before, seconds));
    }
    if (a.once) return absl::OkStatus();
    before = std::move(now);
    before_time = time;
    std::this_thread::sleep_for(std::chrono::milliseconds(a.interval_ms));
  }
}

}  // namespace quarry::cli

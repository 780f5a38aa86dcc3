#include "perf/prefill/report.h"

#include <algorithm>
#include <cstdio>

#include <nlohmann/json.hpp>

namespace quarry::perf {
namespace {

using nlohmann::json;

json Common(const ReportedLayer& r, const char* line) {
  const LayerShape& shape = r.layer.shape;
  return {{"bench", "prefill"},         {"line", line},
          {"device", r.device},         {"shape", std::string(shape.name)},
          {"heads", shape.heads},       {"kv_heads", shape.kv_heads},
          {"head_dim", shape.head_dim}, {"dtype", std::string(DTypeName(r.layer.dtype))},
          {"tokens", r.layer.tokens},   {"seed", r.layer.seed},
          {"kinds", r.kinds_name}};
}

void Add(const std::string& name, const Quantiles& q, json* out) {
  (*out)[name] = q.p50;
  (*out)[name + "_p10"] = q.p10;
  (*out)[name + "_p90"] = q.p90;
}

void Add(const std::string& prefix, const Fidelity& f, json* out) {
  const bool known = f.answers > 0;
  (*out)[prefix + "mass"] = known ? json(f.mass) : json();
  (*out)[prefix + "least_mass"] = known ? json(f.least_mass) : json();
  (*out)[prefix + "error"] = known ? json(f.error) : json();
}

json OfKind(const KindRow& kind) {
  json out = {{"kind", std::string(MadeHeadName(kind.kind))},
              {"heads", kind.heads},
              {"tiles_share", kind.tiles_share}};
  Add("", kind.sampled, &out);
  Add("last_", kind.last, &out);
  return out;
}

json ByPeer(const MeasuredRow& row, const Peer& peer) {
  const double ms = peer.seconds * 1e3;
  return {{"backend", peer.backend},
          {"ms", ms},
          {"tflops", peer.tflops},
          {"rate_share", row.tflops / peer.tflops},
          {"speedup", ms / row.attend_ms.p50},
          {"speedup_with_plan", ms / (row.attend_ms.p50 + row.plan_ms.p50)}};
}

json OfRow(const ReportedLayer& r, const MeasuredRow& row) {
  json out = Common(r, "row");
  out["pattern"] = row.pattern;
  out["asked_density"] = row.asked_density > 0 ? json(row.asked_density) : json();
  out["asked_mass"] = row.asked_mass > 0 ? json(row.asked_mass) : json();
  out["head0"] = row.head0;
  out["tiles_share"] = row.tiles / row.dense_tiles;
  out["tiles_estimated"] = row.tiles_estimated;
  out["dense_scaled"] = row.dense_scaled;
  out["tflops"] = row.tflops;
  Add("plan_ms", row.plan_ms, &out);
  Add("attend_ms", row.attend_ms, &out);
  Add("dense_ms", row.dense_ms, &out);
  Add("rate_share", row.rate_share, &out);
  Add("speedup", row.speedup, &out);
  Add("speedup_with_plan", row.speedup_with_plan, &out);
  Add("", row.sampled, &out);
  Add("last_", row.last, &out);
  out["by_kind"] = json::array();
  for (const KindRow& kind : row.kinds) out["by_kind"].push_back(OfKind(kind));
  out["peers"] = json::array();
  for (const Peer& peer : r.peers) out["peers"].push_back(ByPeer(row, peer));
  out["peak_bytes"] = r.stats.peak_bytes;
  out["overhead_bytes"] = r.stats.overhead_bytes;
  return out;
}

void PrintOracle(const ReportedLayer& r) {
  for (const MadeHead kind :
       {MadeHead::kLines, MadeHead::kLocal, MadeHead::kBlocks, MadeHead::kDiffuse}) {
    double least = 1, most = 0, blocks = 0;
    int heads = 0;
    for (size_t h = 0; h < r.kinds.size(); ++h) {
      if (r.kinds[h] != kind) continue;
      ++heads;
      least = std::min(least, r.measured.oracle[h].tiles);
      most = std::max(most, r.measured.oracle[h].tiles);
      blocks += r.measured.oracle[h].blocks;
    }
    if (heads == 0) continue;
    std::printf(
        "  %2d heads %-8s oracle of %.2f of the mass: %.1f%% to %.1f%% of the tiles; key "
        "blocks %.1f%%\n",
        heads, std::string(MadeHeadName(kind)).c_str(), kOracleMass, 100 * least, 100 * most,
        100 * blocks / heads);
  }
}

std::string Asked(const MeasuredRow& row) {
  char text[32] = "";
  if (row.asked_density > 0) std::snprintf(text, sizeof(text), "%.1f%%", 100 * row.asked_density);
  if (row.asked_mass > 0) std::snprintf(text, sizeof(text), "mass %.4g", row.asked_mass);
  return text;
}

}  // namespace

std::vector<std::string> JsonLines(const ReportedLayer& r) {
  std::vector<std::string> out;
  for (size_t h = 0; h < r.kinds.size(); ++h) {
    json line = Common(r, "head");
    line["head"] = h;
    line["kind"] = std::string(MadeHeadName(r.kinds[h]));
    line["oracle_tiles_share"] = r.measured.oracle[h].tiles;
    line["oracle_blocks_share"] = r.measured.oracle[h].blocks;
    out.push_back(line.dump());
  }
  for (const MeasuredRow& row : r.measured.rows) out.push_back(OfRow(r, row).dump());
  return out;
}

void PrintTable(const ReportedLayer& r) {
  const LayerShape& shape = r.layer.shape;
  std::printf("%s: %s, %u/%u heads of %u, %s, %u tokens, heads: %s\n", r.device.c_str(),
              std::string(shape.name).c_str(), shape.heads, shape.kv_heads, shape.head_dim,
              std::string(DTypeName(r.layer.dtype)).c_str(), r.layer.tokens, r.kinds_name.c_str());
  PrintOracle(r);
  std::printf("  %-19s %-12s %6s %9s %10s %7s %6s %7s %7s %7s %7s %7s %7s\n", "pattern", "asked",
              "tiles", "plan ms", "attend ms", "TFLOP/s", "rate", "speed", "planned", "mass",
              "error", "last", "error");
  for (const MeasuredRow& row : r.measured.rows) {
    std::printf(
        "  %-19s %-12s %5.1f%% %9.2f %10.2f %7.1f %6.2f %7.2f %7.2f %7.4f %7.4f %7.4f "
        "%7.4f\n",
        row.pattern.c_str(), Asked(row).c_str(), 100 * row.tiles / row.dense_tiles, row.plan_ms.p50,
        row.attend_ms.p50, row.tflops, row.rate_share.p50, row.speedup.p50,
        row.speedup_with_plan.p50, row.sampled.mass, row.sampled.error, row.last.mass,
        row.last.error);
    if (row.kinds.size() > 1) {
      for (const KindRow& kind : row.kinds) {
        std::printf("    %2u %-8s %17.1f%% %55s %7.4f %7.4f %7.4f %7.4f\n", kind.heads,
                    std::string(MadeHeadName(kind.kind)).c_str(), 100 * kind.tiles_share, "",
                    kind.sampled.mass, kind.sampled.error, kind.last.mass, kind.last.error);
      }
    }
    for (const Peer& peer : r.peers) {
      const double ms = peer.seconds * 1e3;
      std::printf(
          "    by %s's %.2f ms, %.1f TFLOP/s: rate %.2f, %.2f times as fast, %.2f with "
          "planning\n",
          peer.backend.c_str(), ms, peer.tflops, row.tflops / peer.tflops, ms / row.attend_ms.p50,
          ms / (row.attend_ms.p50 + row.plan_ms.p50));
    }
  }
  std::printf("  peak %.2f GiB handed out, %.2f GiB of the device's own\n",
              static_cast<double>(r.stats.peak_bytes) * 0x1p-30,
              static_cast<double>(r.stats.overhead_bytes) * 0x1p-30);
}

}  // namespace quarry::perf

// What a measured layer is printed as: JSON lines, or tables for people.
//
// Every line has bench ("prefill"), line, device, shape, heads, kv_heads, head_dim, dtype, tokens,
// seed and kinds (of the heads). Shares of tiles are of dense attention's, times are milliseconds
// of the whole layer, and of times and ratios there are _p10 and _p90 beside the median.
// line "head": head, kind, oracle_tiles_share, oracle_blocks_share (oracle.h)
// line "row": pattern, asked_density or asked_mass (null: not asked), head0, tiles_share,
//   tiles_estimated, plan_ms, attend_ms, dense_ms, dense_scaled, tflops (of tiles), rate_share (of
//   dense attention's tiles per second), speedup, speedup_with_plan; mass, least_mass and error of
//   sampled rows and last_... of the last 64, null where none was attended; peak_bytes,
//   overhead_bytes (of the device so far); by_kind: kind, heads, tiles_share, and the same of rows;
//   peers: backend, ms, tflops, and this row's rate_share, speedup and speedup_with_plan by it
#pragma once

#include <string>
#include <vector>

#include "gpu/device.h"
#include "perf/prefill/made_layer.h"
#include "perf/prefill/measure_layer.h"
#include "perf/prefill/peers.h"

namespace quarry::perf {

struct ReportedLayer {
  std::string device;
  MadeLayer::Options layer;
  std::string kinds_name;
  std::vector<MadeHead> kinds;  // [heads]
  MeasuredLayer measured;
  DeviceStats stats;
  std::vector<Peer> peers;  // of this shape
};

// A line each.
std::vector<std::string> JsonLines(const ReportedLayer& layer);
void PrintTable(const ReportedLayer& layer);

}  // namespace quarry::perf

// Dense attention of a made layer and sparse attention by patterns, in turns.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/thread_team.h"
#include "perf/prefill/fidelity.h"
#include "perf/prefill/layer_on_device.h"
#include "perf/prefill/made_layer.h"
#include "perf/prefill/oracle.h"
#include "perf/statistics.h"

namespace quarry::perf {

// The mass that oracles have and that --mix aims at without --masses.
inline constexpr double kOracleMass = 0.99;

struct MeasureOptions {
  std::vector<std::string> patterns;  // of FittedPatterns
  std::vector<double> densities;      // each pattern is fitted to each
  std::vector<double> masses;         // kLinesByMass, or heads by their kinds
  uint32_t repetitions = 5;
  uint32_t chunk_rows = 131072;  // attended at a time, a multiple of 128
  uint32_t sampled_rows = 64, sampled_row_tiles = 8;
  // Of a prefill of several chunks, dense attention by all rows; else by the last eighth of each
  // chunk's, scaled by tiles.
  bool full = false;
};

// Heads of one kind under one row's pattern.
struct KindRow {
  MadeHead kind = MadeHead::kLines;
  uint32_t heads = 0;
  double tiles_share = 1;  // of the dense tiles
  Fidelity sampled, last;  // of rows spread over the prefill, and of its last 64
};

// Times are of the whole layer, all rows. Of times and ratios quantiles over the repetitions, each
// ratio between times of one repetition.
struct MeasuredRow {
  std::string pattern;                       // "dense", one of FittedPatterns, or "by_kind"
  double asked_density = 0, asked_mass = 0;  // 0: that was not asked
  std::string head0;                         // its pattern, for people
  double tiles = 0, dense_tiles = 0;         // of all heads
  bool tiles_estimated = false;              // of some heads by sampled row tiles
  bool dense_scaled = false;
  Quantiles plan_ms, attend_ms, dense_ms;
  Quantiles rate_share;  // of tiles per second, by those of dense attention
  Quantiles speedup, speedup_with_plan;
  double tflops = 0;  // of the tiles, at the median
  Fidelity sampled, last;
  std::vector<KindRow> kinds;
};

struct MeasuredLayer {
  std::vector<OracleShare> oracle;  // [heads], for kOracleMass
  std::vector<MeasuredRow> rows;    // dense attention first
};

// Rows that are sampled for fidelity: `sampled` spread over what is before the last 64, then those.
std::vector<uint32_t> FidelityRows(uint32_t tokens, uint32_t sampled);

// `kinds` is a name of LayerKinds. InvalidArgument: no kind of that name.
absl::StatusOr<MeasuredLayer> MeasureLayer(const MadeLayer& layer, const std::string& kinds,
                                           const MeasureOptions& options, LayerOnDevice* device,
                                           ThreadTeam* team);

}  // namespace quarry::perf

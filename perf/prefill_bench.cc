// Sparse prefill attention of one layer against dense attention of the same device, through the
// seam that the worker uses (gpu/device.h).
//
// Workload: made K, V and queries (prefill/made_layer.h) of the heads of Llama-3-8B (32 query and 8
// KV heads of 128) or Phi-3-mini (32 and 32 of 96), 8K to 1M tokens, all rows, in chunks of up to
// --chunk-rows. Which heads: --kinds, and with --mix layers of heads of all kinds, each with the
// pattern that suits it. Per pattern and density:
//   plan    what each head attends, by the last 64 queries (PlanSparse)
//   attend  all rows by that plan (AttendSparse), with the index of each chunk
//   dense   the same rows by Attend
// in turns, each by itself and waited for. Tiles are counted as they are run: 64 keys for 128
// queries, 4 * 64 * 128 * head_dim operations. Floor of attention: its tiles at the rate of dense
// attention, so a speed-up of one by the density; expected: at least 80% of that where row tiles
// have more than some 30 key tiles (131,072 tokens at 5%), less below.
// Fidelity is against exact attention of sampled rows on the host (prefill/fidelity.h), beside what
// an oracle would have needed (prefill/oracle.h).
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>

#include "absl/strings/str_cat.h"
#include "cpu_index/simd.h"
#include "gpu/cuda/cuda_device.h"
#include "perf/prefill/measure_layer.h"
#include "perf/prefill/pattern_fit.h"
#include "perf/prefill/peers.h"
#include "perf/prefill/report.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr uint32_t kLeastTokens = 256, kMostTokens = 1u << 22;

struct Settings {
  std::vector<uint32_t> tokens = {8192, 32768, 131072};
  std::vector<std::string> shapes = {"llama-3-8b"}, kinds = {"lines"};
  std::string device = "host", dtype = "bf16", peers;
  uint64_t device_bytes = 16ull << 30;
  uint32_t threads = 0, seed = 1;
  bool mix = false, json = false;
  perf::MeasureOptions measure = {perf::FittedPatterns(), {0.05, 0.1, 0.2}, {}};
};

std::vector<std::string> ShapeNames() {
  std::vector<std::string> out;
  for (const perf::LayerShape& shape : perf::LayerShapes()) out.emplace_back(shape.name);
  return out;
}

const perf::LayerShape& ShapeOf(const std::string& name) {
  return *std::find_if(perf::LayerShapes().begin(), perf::LayerShapes().end(),
                       [&](const perf::LayerShape& shape) { return shape.name == name; });
}

absl::StatusOr<std::unique_ptr<Device>> MakeDevice(const Settings& s) {
  if (s.device == "cuda") return MakeCudaDevice({s.device_bytes});
  return MakeHostDevice({s.device_bytes, s.threads});
}

// A device of its own for each length, so that its peak is that length's.
absl::Status MeasureTokens(const Settings& s, const perf::MadeLayer::Options& shape,
                           const std::vector<perf::Peer>& peers, uint64_t* overhead_bytes,
                           ThreadTeam* team) {
  QUARRY_ASSIGN_OR_RETURN(const std::unique_ptr<Device> device, MakeDevice(s));
  const perf::MadeLayer layer(shape, team);
  QUARRY_ASSIGN_OR_RETURN(
      perf::LayerOnDevice on_device,
      perf::LayerOnDevice::Put(device.get(), layer, std::min(s.measure.chunk_rows, shape.tokens)));
  std::vector<std::string> kinds = s.kinds;
  if (s.mix) kinds.push_back("mixed");
  for (const std::string& name : kinds) {
    QUARRY_ASSIGN_OR_RETURN(perf::MeasuredLayer measured,
                            perf::MeasureLayer(layer, name, s.measure, &on_device, team));
    perf::ReportedLayer report{std::string(device->name()),
                               shape,
                               name,
                               perf::MadeHeads(name, shape.shape.heads),
                               std::move(measured),
                               device->Stats(),
                               perf::PeersOf(peers, shape)};
    // What the first device of a process loads, later ones find loaded.
    *overhead_bytes = std::max(*overhead_bytes, report.stats.overhead_bytes);
    report.stats.overhead_bytes = *overhead_bytes;
    if (!s.json) {
      perf::PrintTable(report);
    } else {
      for (const std::string& line : perf::JsonLines(report)) std::printf("%s\n", line.c_str());
    }
    std::fflush(stdout);
  }
  return absl::OkStatus();
}

absl::Status Run(const Settings& s) {
  QUARRY_RETURN_IF_ERROR(ChooseSimdLevel().status());
  if (s.measure.chunk_rows % kRowTile != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--chunk-rows ", s.measure.chunk_rows, " is no multiple of ", kRowTile));
  }
  std::vector<perf::Peer> peers;
  if (!s.peers.empty()) {
    QUARRY_ASSIGN_OR_RETURN(peers, perf::ReadPeers(s.peers));
  }
  ThreadTeam team(s.threads != 0 ? s.threads : std::max(1u, std::thread::hardware_concurrency()));
  const DType dtype = s.dtype == "bf16" ? DType::kBf16 : DType::kFp16;
  uint64_t overhead_bytes = 0;
  for (const std::string& shape : s.shapes) {
    for (const uint32_t tokens : s.tokens) {
      QUARRY_RETURN_IF_ERROR(
          MeasureTokens(s, {ShapeOf(shape), dtype, tokens, s.seed}, peers, &overhead_bytes, &team));
    }
  }
  return absl::OkStatus();
}

void Describe(CLI::App* app, Settings* s) {
  const CLI::Range share(1e-6, 1.0);
  app->add_option("--tokens", s->tokens, "lengths of the prefill")
      ->check(CLI::Range(kLeastTokens, kMostTokens))
      ->capture_default_str();
  app->add_option("--shape", s->shapes, "whose heads")
      ->check(CLI::IsMember(ShapeNames()))
      ->capture_default_str();
  app->add_option("--kinds", s->kinds, "layers of which heads")
      ->check(CLI::IsMember(perf::LayerKinds()))
      ->capture_default_str();
  app->add_flag("--mix", s->mix, "also a layer of all kinds, each head by a pattern for it");
  app->add_option("--patterns", s->measure.patterns, "beside dense attention")
      ->check(CLI::IsMember(perf::FittedPatterns()))
      ->capture_default_str();
  app->add_option("--densities", s->measure.densities, "shares of the dense tiles to fit each to")
      ->check(share)
      ->capture_default_str();
  app->add_option("--masses", s->measure.masses,
                  "also vertical_slash_mass that captures so much of the last queries' mass")
      ->check(share);
  app->add_option("--dtype", s->dtype, "of K and V")
      ->check(CLI::IsMember({"bf16", "fp16"}))
      ->capture_default_str();
  app->add_option("--device", s->device, "host or cuda (the first card that CUDA may see)")
      ->check(CLI::IsMember({"host", "cuda"}))
      ->capture_default_str();
  app->add_option("--device-bytes", s->device_bytes, "the device's budget")->capture_default_str();
  app->add_option("--repetitions", s->measure.repetitions, "turns that are timed")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--chunk-rows", s->measure.chunk_rows, "attended at a time")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_flag("--full", s->measure.full,
                "dense attention of all rows, where there are several chunks, not of an eighth");
  app->add_option("--sampled-rows", s->measure.sampled_rows,
                  "rows that are compared with exact ones, beside the last 64")
      ->capture_default_str();
  app->add_option("--sampled-tiles", s->measure.sampled_row_tiles,
                  "row tiles that oracles and block patterns are counted in")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--peers", s->peers, "lines of prefill_peers.py --json, to put beside rows");
  app->add_option("--threads", s->threads, "of the host; 0: all cores");
  app->add_option("--seed", s->seed, "of the made layers")->capture_default_str();
  app->add_flag("--json", s->json, "print JSON lines");
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::Settings settings;
  CLI::App app("prefill_bench: sparse prefill attention of one layer beside dense attention");
  quarry::Describe(&app, &settings);
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = quarry::Run(settings);
  if (status.ok()) return 0;
  std::fprintf(stderr, "prefill_bench: %s\n", std::string(status.message()).c_str());
  return 1;
}

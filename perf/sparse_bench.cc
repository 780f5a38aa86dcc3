// Sparse prefill on the host: what a key tile costs in each pattern, and what choosing costs.
//
// Workload: one layer of 2 query heads over one KV head, head_dim 128, bf16 K and V of 16K tokens
// (--tokens), normal numbers; on one thread, so that tiles can be counted. Per pattern:
//   plan    columns and slashes from the last 64 queries (PlanHeads)
//   index   of all rows (BuildIndex)
//   attend  all rows (AttendSparse); per key tile of 64 keys and 128 rows
// The roof is dense attention over the same rows, measured in turns with each pattern: `of dense`
// is the time of a tile by that of a dense one, the worth of which kSparseTileEighths guesses.
//
// Prints milliseconds and microseconds per tile, the best of --rounds; --json prints JSON lines.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "gpu/sparse/build_index.h"
#include "gpu/sparse/sparse_attention.h"
#include "gpu/thread_team.h"
#include "perf/statistics.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr uint32_t kHeads = 2, kDim = 128;

struct Settings {
  uint32_t tokens = 16384, rounds = 3, seed = 1;
  bool json = false;
};

struct Layer {
  std::vector<uint16_t> k, v;
  std::vector<float> q, o, lse;
  LayerKv kv;
};

Layer MakeLayer(const Settings& settings) {
  std::mt19937 random(settings.seed);
  std::normal_distribution<float> normal;
  Layer out;
  for (auto* side : {&out.k, &out.v}) {
    side->resize(size_t{settings.tokens} * kDim);
    for (uint16_t& x : *side) x = FloatToBf16(normal(random));
  }
  out.q.resize(size_t{settings.tokens} * kHeads * kDim);
  for (float& x : out.q) x = normal(random);
  out.o.resize(out.q.size());
  out.lse.resize(size_t{settings.tokens} * kHeads);
  out.kv = {{out.k.data(), out.v.data(), out.k.size() * 2, {0, settings.tokens}},
            DType::kBf16,
            kHeads,
            1,
            kDim};
  return out;
}

struct Times {
  double plan_ms = std::numeric_limits<double>::infinity(), index_ms = plan_ms, attend_ms = plan_ms;
  uint64_t tiles = 0;
};

template <typename F>
void Best(double* best_ms, const F& f) {
  *best_ms = std::min(*best_ms, perf::Microseconds(f) / 1e3);
}

void Measure(const Pattern& pattern, Layer* layer, ThreadTeam* team, Times* times) {
  const auto tokens = static_cast<uint32_t>(layer->k.size() / kDim);
  const std::vector<HeadPattern> patterns(kHeads, HeadPattern{pattern});
  const float* last_q =
      layer->q.data() + size_t{tokens - std::min(tokens, kLastQueries)} * kHeads * kDim;
  std::vector<HeadPlan> plans;
  Best(&times->plan_ms, [&] {
    plans = PlanHeads({layer->kv, {0, tokens}, patterns, last_q, DenseFallback::kNever}, team);
  });
  SparseIndex index;
  Best(&times->index_ms, [&] {
    index = BuildIndex(plans, {layer->kv, 0, tokens, layer->q.data(), DenseFallback::kNever}, team);
  });
  Best(&times->attend_ms, [&] {
    times->tiles =
        AttendSparse({layer->kv, &index, {}, layer->q.data(), layer->o.data(), layer->lse.data()},
                     team)
            .tiles;
  });
}

void Run(const Settings& settings) {
  Layer layer = MakeLayer(settings);
  ThreadTeam team(1);
  const Pattern patterns[] = {AShapePattern{1024, 4096},      VerticalSlashPattern{0, 300},
                              VerticalSlashPattern{500, 300}, VerticalSlashPattern{3000, 200},
                              BlockSparsePattern{64},         BlockScoredPattern{0.6}};
  if (!settings.json) {
    std::printf("%-28s %9s %9s %10s %9s %9s %9s\n", "pattern", "plan ms", "index ms", "attend ms",
                "tiles", "us/tile", "of dense");
  }
  for (const Pattern& pattern : patterns) {
    Times sparse, dense;
    for (uint32_t round = 0; round < settings.rounds; ++round) {
      Measure(pattern, &layer, &team, &sparse);
      Measure(DensePattern{}, &layer, &team, &dense);
    }
    const double us = 1e3 * sparse.attend_ms / static_cast<double>(sparse.tiles);
    const double dense_us = 1e3 * dense.attend_ms / static_cast<double>(dense.tiles);
    if (settings.json) {
      std::printf("%s\n", nlohmann::json({{"pattern", PatternText(pattern)},
                                          {"tokens", settings.tokens},
                                          {"plan_ms", sparse.plan_ms},
                                          {"index_ms", sparse.index_ms},
                                          {"attend_ms", sparse.attend_ms},
                                          {"tiles", sparse.tiles},
                                          {"tile_us", us},
                                          {"dense_attend_ms", dense.attend_ms},
                                          {"dense_tiles", dense.tiles},
                                          {"dense_tile_us", dense_us}})
                              .dump()
                              .c_str());
    } else {
      std::printf("%-28s %9.1f %9.1f %10.1f %9llu %9.2f %9.2f\n", PatternText(pattern).c_str(),
                  sparse.plan_ms, sparse.index_ms, sparse.attend_ms,
                  static_cast<unsigned long long>(sparse.tiles), us, us / dense_us);
    }
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::Settings settings;
  CLI::App app("sparse_bench: what sparse prefill costs on the host");
  app.add_option("--tokens", settings.tokens, "of K, V and queries")
      ->check(CLI::Range(1u, 1u << 22))
      ->capture_default_str();
  app.add_option("--rounds", settings.rounds, "the best of so many")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--seed", settings.seed, "of the numbers");
  app.add_flag("--json", settings.json, "print JSON lines");
  CLI11_PARSE(app, argc, argv);
  quarry::Run(settings);
  return 0;
}

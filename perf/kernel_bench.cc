// The exact scan against the machine's read bandwidth, measured in the same run.
//
// Workload: K and V of one KV head in blocks of 256 tokens, as the arena holds them, over at least
// 2 GiB that are walked through so that no pass finds its keys in a cache; 131,072 tokens a pass.
// m queries share the pass: the group of a KV head times the rows of a batch.
// Floor: 2 * tokens * head_dim * element bytes over the read bandwidth. At head_dim 128 of bf16 a
// token's 512 bytes take one core 34 ns from 15 GB/s; with AMX its arithmetic takes 16 ns for up to
// 8 queries, 20 for 16 and 38 for 32 (from the second cache level). Expected: at least 85% of the
// roof up to 16 queries, if fetches go on beside all of the arithmetic; not with 32.
// Roof: the maximum over the same memory, 64 bytes a load. Ratios are of interleaved pairs. Times
// are processor time of the slowest thread, so that other work on the machine's cores does not
// count.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "cpu_index/key_index.h"
#include "cpu_index/simd.h"
#include "perf/head_dim_option.h"
#include "perf/statistics.h"
#include "perf/walked_memory.h"
#include "proto/half.h"

namespace quarry {
namespace {

using perf::WalkedMemory;

struct Settings {
  std::vector<uint32_t> queries = {1, 4, 8, 16, 32};
  std::vector<uint32_t> head_dims = {64, 96, 128};
  std::vector<std::string> dtypes = {"bf16", "fp16", "fp32"};
  std::vector<uint32_t> threads = {1, 2};
  uint64_t total_bytes = 2ull << 30;
  uint32_t pass_tokens = 131072;
  uint32_t pairs = 9;
  uint32_t seed = 1;
  bool json = false;
};

struct Shape {
  uint32_t head_dim;
  DType dtype;
  uint64_t strip_bytes() const { return uint64_t{kBlockTokens} * head_dim * DTypeBytes(dtype); }
};

// Random values of the dtype everywhere, from one random megabyte.
void FillWith(DType dtype, WalkedMemory* memory, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<std::byte> pattern(1 << 20);
  for (size_t i = 0; i < pattern.size() / DTypeBytes(dtype); ++i) {
    StoreFromFloat(pattern.data(), i, dtype, normal(*random));
  }
  memory->Fill(pattern);
}

// The segments of one pass, the next ones at every call: blocks of a strip of K and a strip of V.
std::vector<KvSegment> NextPass(WalkedMemory* memory, const Shape& shape, uint32_t tokens) {
  std::vector<KvSegment> out;
  for (uint32_t t = 0; t < tokens; t += kBlockTokens) {
    const std::byte* block = memory->Next(2 * shape.strip_bytes());
    out.push_back({block, block + shape.strip_bytes(), {t, t + kBlockTokens}});
  }
  return out;
}

std::span<const KvSegment> PartOf(const std::vector<KvSegment>& all, uint32_t i, uint32_t n) {
  const size_t each = all.size() / n;
  return std::span(all).subspan(i * each, each);
}

void ReadSegments(std::span<const KvSegment> segments, const Shape& shape, float* sink) {
  for (const KvSegment& s : segments) {
    for (const void* part : {s.k, s.v}) perf::ReadAll(part, shape.strip_bytes(), sink);
  }
}

void Scan(std::span<const KvSegment> segments, const Shape& shape, const std::vector<float>& q,
          uint32_t queries) {
  std::vector<TokenRange> ranges(queries, {segments.front().tokens.lo, segments.back().tokens.hi});
  std::vector<float> acc(q.size());
  std::vector<Partial> partials(queries);
  for (uint32_t i = 0; i < queries; ++i) {
    partials[i].acc = std::span(acc).subspan(size_t{i} * shape.head_dim, shape.head_dim);
  }
  const QueryBlock block{q.data(),
                         DType::kBf16,
                         queries,
                         shape.head_dim,
                         1.0f / std::sqrt(static_cast<float>(shape.head_dim)),
                         ranges};
  ExactScan().AttendAll({segments, shape.head_dim, shape.dtype}, block, partials);
}

void Measure(const Settings& settings, WalkedMemory* memory, const Shape& shape, uint32_t queries,
             uint32_t threads, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<float> q(size_t{queries} * shape.head_dim);
  for (float& x : q) x = Bf16ToFloat(FloatToBf16(normal(*random)));
  const double bytes = 2.0 * settings.pass_tokens * shape.head_dim * DTypeBytes(shape.dtype);
  std::vector<double> ratio, scan_us, roof_gb;
  std::vector<float> sinks(threads * 16, -1.0f);
  for (uint32_t pair = 0; pair <= settings.pairs; ++pair) {
    const auto roof_pass = NextPass(memory, shape, settings.pass_tokens);
    const double roof = perf::OnThreads(threads, [&](uint32_t i) {
      ReadSegments(PartOf(roof_pass, i, threads), shape, &sinks[i * 16]);
    });
    const auto scan_pass = NextPass(memory, shape, settings.pass_tokens);
    const double scan = perf::OnThreads(
        threads, [&](uint32_t i) { Scan(PartOf(scan_pass, i, threads), shape, q, queries); });
    if (pair == 0) continue;  // warms up threads and pages
    ratio.push_back(roof / scan);
    scan_us.push_back(scan);
    roof_gb.push_back(bytes / roof / 1e3);
  }
  const auto r = perf::QuantilesOf(ratio), us = perf::QuantilesOf(scan_us);
  const auto gb = perf::QuantilesOf(roof_gb);
  const std::string dtype(DTypeName(shape.dtype));
  if (settings.json) {
    std::printf("%s\n", nlohmann::json({{"bench", "exact_scan"},
                                        {"level", Kernels().name},
                                        {"dtype", dtype},
                                        {"head_dim", shape.head_dim},
                                        {"queries", queries},
                                        {"threads", threads},
                                        {"tokens", settings.pass_tokens},
                                        {"us", us.p50},
                                        {"gb_per_s", bytes / us.p50 / 1e3},
                                        {"roof_gb_per_s", gb.p50},
                                        {"share_of_roof", r.p50},
                                        {"share_p10", r.p10},
                                        {"share_p90", r.p90}})
                            .dump()
                            .c_str());
  } else {
    std::printf(
        "%-6s %-4s d %3u  m %2u  threads %u  %8.0f us  %5.1f GB/s  roof %5.1f  "
        "share %.2f [%.2f, %.2f]\n",
        Kernels().name, dtype.c_str(), shape.head_dim, queries, threads, us.p50,
        bytes / us.p50 / 1e3, gb.p50, r.p50, r.p10, r.p90);
  }
  std::fflush(stdout);
}

int Run(const Settings& settings) {
  if (absl::Status status = ChooseSimdLevel().status(); !status.ok()) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    return 1;
  }
  std::mt19937 random(settings.seed);
  WalkedMemory memory(settings.total_bytes);
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    if (std::find(settings.dtypes.begin(), settings.dtypes.end(), DTypeName(dtype)) ==
        settings.dtypes.end()) {
      continue;
    }
    FillWith(dtype, &memory, &random);
    for (uint32_t head_dim : settings.head_dims) {
      for (uint32_t threads : settings.threads) {
        for (uint32_t queries : settings.queries) {
          Measure(settings, &memory, {head_dim, dtype}, queries, threads, &random);
        }
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::Settings settings;
  CLI::App app("Exact scan against the read bandwidth; QUARRY_SIMD chooses the level");
  app.add_option("--queries", settings.queries, "queries that share a pass");
  app.add_option("--head-dims", settings.head_dims, "head dimensions")
      ->check(quarry::perf::HeadDim());
  app.add_option("--dtypes", settings.dtypes, "bf16, fp16, fp32");
  app.add_option("--threads", settings.threads, "threads");
  app.add_option("--bytes", settings.total_bytes, "memory that is walked through");
  app.add_option("--pairs", settings.pairs, "interleaved pairs");
  app.add_option("--seed", settings.seed, "of the random values");
  app.add_flag("--json", settings.json, "JSON lines");
  CLI11_PARSE(app, argc, argv);
  return quarry::Run(settings);
}

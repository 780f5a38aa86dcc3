// Codecs of K and V: what they cost, what attention over their codes saves, and what they lose.
//
// Workload: K and V of one KV head in blocks of 256 tokens, bf16 or coded, over at least 1 GiB each
// that is walked through so that no pass finds its data in a cache.
//   encode   rows of bf16 to strips, decode the way back: over 64 MiB of rows, walked through too
//   attend   131,072 tokens a pass, m queries that share it; beside it, in turns, the exact scan of
//            bf16 and the roof: the maximum over as many bytes as the codes have, 64 a load
// Floor of attend: its bytes over the read bandwidth. At head_dim 128 of a token's 512 bytes of
// bf16 int8 and fp8 leave 260, int4 152: at best 0.51 and 0.30 of the bf16 scan's time. Arithmetic,
// by instructions of 16 floats a token: 16 products a query and 48 (int8, K and V) to 32 (int4) to
// make floats of codes; with two a cycle at 3 GHz m = 1 takes 11 ns, m = 4 19 ns beside the 20 that
// 260 bytes take one core from 13 GB/s, and the 12 of int4's. Expected: half of bf16's time up to
// four queries with int8, and a third with one with int4, if codes are multiplied as floats; with
// products of whole numbers (VNNI, 64 a vector; AMX) arithmetic is a fifth of it. With --traces:
// errors of the output (relative L2) and of its log sum of exponentials (absolute) by the codec
// alone, in double, with the first 128 and the last 512 tokens uncoded.
//
// Times are processor time of the slowest thread; ratios are of interleaved passes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "cpu_index/coded_attend.h"
#include "cpu_index/simd.h"
#include "perf/codec_errors.h"
#include "perf/die.h"
#include "perf/head_dim_option.h"
#include "perf/statistics.h"
#include "perf/walked_memory.h"
#include "proto/half.h"
#include "storage/codecs/kv_codecs.h"

namespace quarry {
namespace {

using perf::Quantiles;
using perf::QuantilesOf;
using perf::WalkedMemory;

struct Settings {
  std::vector<std::string> codecs = {"fp8", "int8", "int4"};
  std::vector<uint32_t> queries = {1, 4, 8, 16};
  std::vector<uint32_t> head_dims = {128};
  std::vector<uint32_t> threads = {1, 2};
  uint64_t bytes = 1ull << 30;  // of bf16, and of codes
  uint32_t pass_tokens = 131072;
  uint32_t pairs = 9;
  uint32_t seed = 1;
  std::string traces;
  bool json = false;
};

void Print(const Settings& settings, const nlohmann::json& row, const std::string& text) {
  std::printf("%s\n", settings.json ? row.dump().c_str() : text.c_str());
  std::fflush(stdout);
}

std::string Text(const char* format, auto... values) {
  char line[256];
  std::snprintf(line, sizeof(line), format, values...);
  return line;
}

constexpr KvPart kParts[] = {KvPart::kKey, KvPart::kValue};

// A block of one head as rows and as strips, K before V.
struct Block {
  KvCodec codec;
  uint32_t head_dim;
  std::vector<std::byte> rows, coded;

  Block(KvCodec codec, uint32_t head_dim, std::mt19937* random)
      : codec(codec), head_dim(head_dim), rows(row_bytes()), coded(coded_bytes()) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < rows.size() / 2; ++i) {
      StoreFromFloat(rows.data(), i, DType::kBf16, normal(*random));
    }
    Encode(rows.data(), coded.data());
  }
  size_t row_bytes() const { return size_t{2} * 2 * kBlockTokens * head_dim; }
  size_t coded_bytes() const { return Strip(KvPart::kKey).bytes() + Strip(KvPart::kValue).bytes(); }
  CodedStrip Strip(KvPart part) const { return {codec, part, head_dim, kBlockTokens}; }

  void Encode(const std::byte* from, std::byte* to) const {
    for (KvPart part : kParts) {
      EncodeStrip(Strip(part), DType::kBf16, from, {to, Strip(part).bytes()});
      from += row_bytes() / 2;
      to += Strip(part).bytes();
    }
  }
  void Decode(const std::byte* from, std::byte* to) const {
    for (KvPart part : kParts) {
      perf::Die(DecodeStrip(Strip(part), {from, Strip(part).bytes()}, DType::kBf16, to), "decode");
      from += Strip(part).bytes();
      to += row_bytes() / 2;
    }
  }
};

// --- Encoding and decoding.

void MeasureCoding(const Settings& settings, const Block& block, WalkedMemory* rows,
                   WalkedMemory* coded) {
  constexpr size_t kPassBytes = 64 << 20;  // of rows
  const size_t blocks = kPassBytes / block.row_bytes();
  std::vector<double> encode_us, decode_us, copy_us;
  for (uint32_t pair = 0; pair <= settings.pairs; ++pair) {
    // Copying the rows is what any coder is held against: it moves more bytes than they do.
    const double copy = perf::OnThreads(1, [&](uint32_t) {
      for (size_t i = 0; i < blocks; ++i) {
        const std::byte* from = rows->Next(block.row_bytes());
        std::copy_n(from, block.row_bytes(), rows->Next(block.row_bytes()));
      }
    });
    const double encode = perf::OnThreads(1, [&](uint32_t) {
      for (size_t i = 0; i < blocks; ++i) {
        block.Encode(rows->Next(block.row_bytes()), coded->Next(block.coded_bytes()));
      }
    });
    const double decode = perf::OnThreads(1, [&](uint32_t) {
      for (size_t i = 0; i < blocks; ++i) {
        block.Decode(coded->Next(block.coded_bytes()), rows->Next(block.row_bytes()));
      }
    });
    if (pair == 0) continue;  // warms up pages
    copy_us.push_back(copy);
    encode_us.push_back(encode);
    decode_us.push_back(decode);
  }
  const double bytes = static_cast<double>(blocks * block.row_bytes());
  const auto rate = [&](const std::vector<double>& us) {
    return bytes / QuantilesOf(us).p50 / 1e3;
  };
  const std::string codec(KvCodecName(block.codec));
  Print(settings,
        {{"bench", "codec"},
         {"level", codecs::TableOf(SimdLevelInUse()).name},
         {"codec", codec},
         {"head_dim", block.head_dim},
         {"coded_bytes_per_token", static_cast<double>(block.coded_bytes()) / kBlockTokens},
         {"encode_gb_per_s", rate(encode_us)},
         {"decode_gb_per_s", rate(decode_us)},
         {"copy_gb_per_s", rate(copy_us)}},
        Text("%-6s %-4s d %3u  %5.0f bytes/token  encode %5.2f GB/s of bf16  decode %5.2f  memcpy "
             "%5.2f",
             codecs::TableOf(SimdLevelInUse()).name, codec.c_str(), block.head_dim,
             static_cast<double>(block.coded_bytes()) / kBlockTokens, rate(encode_us),
             rate(decode_us), rate(copy_us)));
}

// --- Attention.

// Some queries and room for their answers, for one thread.
struct Queries {
  std::vector<float> acc;
  std::vector<Partial> partials;
  std::vector<TokenRange> ranges;

  Queries(uint32_t queries, uint32_t head_dim, TokenRange range)
      : acc(size_t{queries} * head_dim), partials(queries), ranges(queries, range) {
    for (uint32_t i = 0; i < queries; ++i) {
      partials[i].acc = std::span(acc).subspan(size_t{i} * head_dim, head_dim);
    }
  }
  QueryBlock Of(const std::vector<float>& q, uint32_t head_dim) const {
    return {q.data(),
            DType::kBf16,
            static_cast<uint32_t>(partials.size()),
            head_dim,
            1.0f / std::sqrt(static_cast<float>(head_dim)),
            ranges};
  }
};

void MeasureAttend(const Settings& settings, const Block& block, uint32_t queries, uint32_t threads,
                   WalkedMemory* rows, WalkedMemory* coded, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<float> q(size_t{queries} * block.head_dim);
  for (float& x : q) x = Bf16ToFloat(FloatToBf16(normal(*random)));
  const uint32_t blocks = settings.pass_tokens / kBlockTokens / threads;  // of each thread
  const TokenRange range{0, blocks * kBlockTokens};
  const auto take = [&](WalkedMemory* memory, size_t bytes) {
    std::vector<std::byte*> out(threads);
    for (std::byte*& at : out) at = memory->Next(blocks * bytes);
    return out;
  };
  std::vector<double> share, of_bf16, coded_us, bf16_us, roof_gb;
  std::vector<float> sinks(threads * 16, -1.0f);
  const double bytes = static_cast<double>(blocks) * threads * block.coded_bytes();
  for (uint32_t pair = 0; pair <= settings.pairs; ++pair) {
    const auto at_roof = take(coded, block.coded_bytes());
    const double roof = perf::OnThreads(threads, [&](uint32_t i) {
      perf::ReadAll(at_roof[i], blocks * block.coded_bytes(), &sinks[i * 16]);
    });
    const auto at_rows = take(rows, block.row_bytes());
    const double exact = perf::OnThreads(threads, [&](uint32_t i) {
      std::vector<KvSegment> segments;
      for (uint32_t b = 0; b < blocks; ++b) {
        const std::byte* at = at_rows[i] + b * block.row_bytes();
        segments.push_back(
            {at, at + block.row_bytes() / 2, {b * kBlockTokens, (b + 1) * kBlockTokens}});
      }
      Queries mine(queries, block.head_dim, range);
      ExactScan().AttendAll({segments, block.head_dim, DType::kBf16}, mine.Of(q, block.head_dim),
                            mine.partials);
    });
    const auto at_coded = take(coded, block.coded_bytes());
    const double attend = perf::OnThreads(threads, [&](uint32_t i) {
      std::vector<CodedSegment> segments;
      const size_t k_bytes = block.Strip(KvPart::kKey).bytes();
      for (uint32_t b = 0; b < blocks; ++b) {
        const std::byte* at = at_coded[i] + b * block.coded_bytes();
        segments.push_back({{at, k_bytes},
                            {at + k_bytes, block.coded_bytes() - k_bytes},
                            {b * kBlockTokens, (b + 1) * kBlockTokens}});
      }
      Queries mine(queries, block.head_dim, range);
      AttendCoded({segments, block.head_dim, block.codec}, mine.Of(q, block.head_dim),
                  mine.partials);
    });
    if (pair == 0) continue;
    share.push_back(roof / attend);
    of_bf16.push_back(attend / exact);
    coded_us.push_back(attend);
    bf16_us.push_back(exact);
    roof_gb.push_back(bytes / roof / 1e3);
  }
  const Quantiles r = QuantilesOf(share), b = QuantilesOf(of_bf16), us = QuantilesOf(coded_us);
  const std::string codec(KvCodecName(block.codec));
  const double roof = QuantilesOf(roof_gb).p50, exact_us = QuantilesOf(bf16_us).p50;
  Print(settings,
        {{"bench", "coded_attend"},
         {"level", Kernels().name},
         {"codec", codec},
         {"head_dim", block.head_dim},
         {"queries", queries},
         {"threads", threads},
         {"tokens", blocks * threads * kBlockTokens},
         {"us", us.p50},
         {"bf16_us", exact_us},
         {"gb_per_s", bytes / us.p50 / 1e3},
         {"roof_gb_per_s", roof},
         {"share_of_roof", r.p50},
         {"share_p10", r.p10},
         {"share_p90", r.p90},
         {"time_of_bf16", b.p50},
         {"time_p10", b.p10},
         {"time_p90", b.p90}},
        Text("%-6s %-4s d %3u  m %2u  threads %u  %7.0f us  %5.1f GB/s  roof %5.1f  share %.2f "
             "[%.2f, %.2f]  bf16 %7.0f us  of it %.2f [%.2f, %.2f]",
             Kernels().name, codec.c_str(), block.head_dim, queries, threads, us.p50,
             bytes / us.p50 / 1e3, roof, r.p50, r.p10, r.p90, exact_us, b.p50, b.p10, b.p90));
}

// --- Errors.

void MeasureErrors(const Settings& settings, const std::vector<KvCodec>& codecs) {
  const auto files = perf::ValueOrDie(perf::ListTraces(settings.traces), "traces");
  for (const std::string& file : files) {
    const perf::Trace trace = perf::ValueOrDie(perf::ReadTrace(file), "trace");
    for (KvCodec codec : codecs) {
      const perf::CodecErrors errors = perf::ErrorsOn(trace, {.codec = codec});
      const Quantiles o = QuantilesOf(errors.o), lse = QuantilesOf(errors.lse);
      const std::string name(KvCodecName(codec));
      Print(settings,
            {{"bench", "codec_error"},
             {"codec", name},
             {"trace", trace.name},
             {"model", trace.model},
             {"layer", trace.layer},
             {"tokens", trace.tokens},
             {"answers", errors.o.size()},
             {"o_mean", perf::Mean(errors.o)},
             {"o_p50", o.p50},
             {"o_p90", o.p90},
             {"o_p99", o.p99},
             {"o_max", o.max},
             {"lse_mean", perf::Mean(errors.lse)},
             {"lse_p99", lse.p99},
             {"lse_max", lse.max}},
            Text("%-40s %-4s o mean %.4f p90 %.4f p99 %.4f max %.4f  lse mean %.4f p99 %.4f",
                 trace.name.c_str(), name.c_str(), perf::Mean(errors.o), o.p90, o.p99, o.max,
                 perf::Mean(errors.lse), lse.p99));
    }
  }
}

int Run(const Settings& settings) {
  perf::Die(ChooseSimdLevel().status(), "QUARRY_SIMD");
  std::vector<KvCodec> codecs;
  for (const std::string& name : settings.codecs) {
    const std::optional<KvCodec> codec = KvCodecNamed(name);
    if (!codec || *codec == KvCodec::kNone) {
      std::fprintf(stderr, "%s is no codec\n", name.c_str());
      return 1;
    }
    codecs.push_back(*codec);
  }
  if (!settings.traces.empty()) {
    MeasureErrors(settings, codecs);
    return 0;
  }
  std::mt19937 random(settings.seed);
  WalkedMemory rows(settings.bytes), coded(settings.bytes);
  for (KvCodec codec : codecs) {
    for (uint32_t head_dim : settings.head_dims) {
      const Block block(codec, head_dim, &random);
      rows.Fill(block.rows);
      coded.Fill(block.coded);
      MeasureCoding(settings, block, &rows, &coded);
      rows.Fill(block.rows);
      coded.Fill(block.coded);
      for (uint32_t threads : settings.threads) {
        for (uint32_t queries : settings.queries) {
          MeasureAttend(settings, block, queries, threads, &rows, &coded, &random);
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
  CLI::App app("Codecs of K and V against the read bandwidth; QUARRY_SIMD chooses the level");
  app.add_option("--codecs", settings.codecs, "fp8, int8, int4");
  app.add_option("--queries", settings.queries, "queries that share a pass");
  app.add_option("--head-dims", settings.head_dims, "head dimensions")
      ->check(quarry::perf::HeadDim());
  app.add_option("--threads", settings.threads, "threads")->check(CLI::Range(1, 256));
  app.add_option("--bytes", settings.bytes, "of bf16, and of codes, that are walked through");
  app.add_option("--tokens", settings.pass_tokens, "of a pass")->check(CLI::Range(256, 1 << 24));
  app.add_option("--pairs", settings.pairs, "interleaved passes")->check(CLI::Range(1, 1000));
  app.add_option("--seed", settings.seed, "of the random values");
  app.add_option("--traces", settings.traces, "only errors, on the traces of this directory");
  app.add_flag("--json", settings.json, "JSON lines");
  CLI11_PARSE(app, argc, argv);
  return quarry::Run(settings);
}

#include "perf/prefill/measure_layer.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/sparse/pattern.h"
#include "perf/prefill/pattern_fit.h"
#include "perf/prefill/plan_tiles.h"
#include "proto/status_macros.h"

namespace quarry::perf {
namespace {

// What is measured in turns; the first one is dense attention, without patterns.
struct Contender {
  MeasuredRow row;
  std::vector<HeadPattern> patterns;  // [heads]
  std::vector<double> tiles;          // [heads]
  LayerPlan plan;
  std::vector<double> plan_ms, attend_ms;   // [repetitions]
  std::vector<CapturedSums> sampled, last;  // [heads]
};

class Measurement {
 public:
  Measurement(const MadeLayer& layer, std::vector<MadeHead> kinds, const MeasureOptions& options,
              LayerOnDevice* device, ThreadTeam* team)
      : layer_(layer), kinds_(std::move(kinds)), options_(options), device_(*device), team_(team) {}

  absl::StatusOr<MeasuredLayer> Run(const std::string& name) {
    const std::vector<uint32_t> row_tiles = SampledRowTiles(tokens(), options_.sampled_row_tiles);
    MeasuredLayer out;
    out.oracle = OracleShares(layer_, kinds_, row_tiles, kOracleMass, team_);
    QUARRY_RETURN_IF_ERROR(device_.PutLastQueries(kinds_, team_));
    const PlanTiles tiles(layer_, kinds_, row_tiles, team_);
    Add(MeasuredRow{.pattern = "dense"}, {});
    QUARRY_RETURN_IF_ERROR(name == "mixed" ? AddByKind(out.oracle, tiles) : AddAll(tiles));
    for (Contender& c : contenders_) QUARRY_RETURN_IF_ERROR(PlanOnce(tiles, &c));
    QUARRY_RETURN_IF_ERROR(Time());
    for (Contender& c : contenders_) {
      Finish(&c);
      out.rows.push_back(std::move(c.row));
    }
    return out;
  }

 private:
  uint32_t tokens() const { return layer_.options().tokens; }
  uint32_t heads() const { return layer_.kv().heads; }
  std::vector<HeadPattern> Same(const Pattern& pattern) const {
    return std::vector<HeadPattern>(heads(), HeadPattern{pattern});
  }

  void Add(MeasuredRow row, std::vector<HeadPattern> patterns) {
    Contender& c = contenders_.emplace_back();
    c.row = std::move(row);
    c.patterns = std::move(patterns);
    c.sampled.resize(heads());
    c.last.resize(heads());
    c.attend_ms.assign(options_.repetitions, 0.0);
  }

  absl::Status AddAll(const PlanTiles& tiles) {
    for (const std::string& name : options_.patterns) {
      for (const double density : options_.densities) {
        QUARRY_ASSIGN_OR_RETURN(
            std::vector<HeadPattern> patterns,
            FitPatterns(name, std::vector<double>(heads(), density), &device_, tiles, team_));
        Add(MeasuredRow{.pattern = name, .asked_density = density}, std::move(patterns));
      }
      if (name != kLinesByMass) continue;
      for (const double mass : options_.masses) {
        Add(MeasuredRow{.pattern = name, .asked_mass = mass},
            Same(VerticalSlashMassPattern{mass, 1}));
      }
    }
    return absl::OkStatus();
  }

  // Each head by the pattern that its kind asks for. Blocks get half as many again as an oracle
  // needs; heads for which lines do not pay turn dense.
  absl::Status AddByKind(std::span<const OracleShare> oracle, const PlanTiles& tiles) {
    std::vector<double> shares;
    for (const OracleShare& head : oracle) shares.push_back(std::min(1.0, 1.5 * head.blocks));
    QUARRY_ASSIGN_OR_RETURN(const std::vector<HeadPattern> blocks,
                            FitPatterns("block_sparse", shares, &device_, tiles, team_));
    std::vector<double> masses = options_.masses;
    if (masses.empty()) masses.push_back(kOracleMass);
    for (const double mass : masses) {
      std::vector<HeadPattern> patterns = Same(VerticalSlashMassPattern{mass, 0.5});
      for (uint32_t h = 0; h < heads(); ++h) {
        if (kinds_[h] == MadeHead::kBlocks) patterns[h] = blocks[h];
        if (kinds_[h] == MadeHead::kLocal) patterns[h] = {AShapePattern{kKeyTile, 1024}};
      }
      Add(MeasuredRow{.pattern = "by_kind", .asked_mass = mass}, std::move(patterns));
    }
    return absl::OkStatus();
  }

  absl::Status PlanOnce(const PlanTiles& tiles, Contender* c) {
    const double dense = PlanTiles::Dense({0, tokens()});
    c->row.dense_tiles = dense * heads();
    c->tiles.assign(heads(), dense);
    c->row.head0 = "dense";
    if (c->patterns.empty()) return absl::OkStatus();
    QUARRY_RETURN_IF_ERROR(device_.Plan(c->patterns, &c->plan).status());
    QUARRY_ASSIGN_OR_RETURN(const std::vector<HeadPlan> planned, LayerOnDevice::HeadsOf(c->plan));
    c->tiles = tiles.Of(planned, team_);
    c->row.head0 = PatternText(c->patterns[0].pattern);
    c->row.tiles_estimated = std::any_of(planned.begin(), planned.end(), [](const HeadPlan& p) {
      return p.kind == HeadKind::kBlocks;
    });
    return absl::OkStatus();
  }

  absl::Status Time() {
    for (uint32_t i = 0; i < options_.repetitions; ++i) {
      for (Contender& c : contenders_) {
        double ms = 0;
        if (!c.patterns.empty()) {
          QUARRY_ASSIGN_OR_RETURN(ms, device_.Plan(c.patterns, &c.plan));
        }
        c.plan_ms.push_back(ms);
      }
    }
    const ExactRows exact(layer_, kinds_, FidelityRows(tokens(), options_.sampled_rows), team_);
    for (uint32_t lo = 0; lo < tokens();) {
      const uint32_t hi = lo + std::min(options_.chunk_rows, tokens() - lo);
      QUARRY_RETURN_IF_ERROR(device_.PutRows(kinds_, {lo, hi}, team_));
      for (Contender& c : contenders_) {  // also warms up
        QUARRY_RETURN_IF_ERROR(Attend({lo, hi}, &c).status());
        QUARRY_RETURN_IF_ERROR(Compare(exact, AttendedOf({lo, hi}, c), &c));
      }
      for (uint32_t i = 0; i < options_.repetitions; ++i) {
        for (Contender& c : contenders_) {
          QUARRY_ASSIGN_OR_RETURN(const double ms, Attend({lo, hi}, &c));
          c.attend_ms[i] += ms;
        }
      }
      lo = hi;
    }
    return absl::OkStatus();
  }

  bool DenseIsScaled() const { return !options_.full && tokens() > options_.chunk_rows; }
  // The rows of a chunk that a contender attends.
  TokenRange AttendedOf(TokenRange chunk, const Contender& c) const {
    if (!c.patterns.empty() || !DenseIsScaled()) return chunk;
    const uint32_t rows = (chunk.size() / 8 + kRowTile - 1) / kRowTile * kRowTile;
    // The last chunk's last row tile may be a part of one: ranges begin at whole ones.
    const uint32_t before = chunk.size() > rows ? (chunk.size() - rows) / kRowTile * kRowTile : 0;
    return {chunk.lo + before, chunk.hi};
  }
  // Milliseconds of all of the chunk's rows.
  absl::StatusOr<double> Attend(TokenRange chunk, Contender* c) {
    if (!c->patterns.empty()) return device_.AttendSparse(c->plan);
    const TokenRange rows = AttendedOf(chunk, *c);
    QUARRY_ASSIGN_OR_RETURN(const double ms, device_.AttendDense(rows.size()));
    return ms * PlanTiles::Dense(chunk) / PlanTiles::Dense(rows);
  }

  absl::Status Compare(const ExactRows& exact, TokenRange rows, Contender* c) {
    std::vector<float> o(size_t{heads()} * layer_.kv().head_dim), lse(heads());
    for (size_t r = 0; r < exact.tokens().size(); ++r) {
      const uint32_t token = exact.tokens()[r];
      if (token < rows.lo || token >= rows.hi) continue;
      QUARRY_RETURN_IF_ERROR(device_.Read(token, o, lse));
      exact.meter().Add(r, o, lse, token + kLastQueries >= tokens() ? c->last : c->sampled);
    }
    return absl::OkStatus();
  }

  void Finish(Contender* c) const {
    MeasuredRow& row = c->row;
    const std::vector<double>& dense_ms = contenders_.front().attend_ms;
    row.tiles = std::accumulate(c->tiles.begin(), c->tiles.end(), 0.0);
    row.dense_scaled = DenseIsScaled();
    std::vector<double> share, speedup, with_plan;
    for (size_t i = 0; i < c->attend_ms.size(); ++i) {
      speedup.push_back(dense_ms[i] / c->attend_ms[i]);
      with_plan.push_back(dense_ms[i] / (c->attend_ms[i] + c->plan_ms[i]));
      share.push_back(speedup.back() * row.tiles / row.dense_tiles);
    }
    row.plan_ms = QuantilesOf(c->plan_ms);
    row.attend_ms = QuantilesOf(c->attend_ms);
    row.dense_ms = QuantilesOf(dense_ms);
    row.rate_share = QuantilesOf(share);
    row.speedup = QuantilesOf(speedup);
    row.speedup_with_plan = QuantilesOf(with_plan);
    const double tile_flops = 4.0 * kKeyTile * kRowTile * layer_.kv().head_dim;
    row.tflops = row.tiles * tile_flops / row.attend_ms.p50 * 1e-9;
    row.sampled = Of(c->sampled);
    row.last = Of(c->last);
    for (const MadeHead kind :
         {MadeHead::kLines, MadeHead::kLocal, MadeHead::kBlocks, MadeHead::kDiffuse}) {
      AddKind(*c, kind, &row);
    }
  }

  void AddKind(const Contender& c, MadeHead kind, MeasuredRow* row) const {
    KindRow out{.kind = kind};
    std::vector<CapturedSums> sampled, last;
    double tiles = 0;
    for (uint32_t h = 0; h < heads(); ++h) {
      if (kinds_[h] != kind) continue;
      ++out.heads;
      tiles += c.tiles[h];
      sampled.push_back(c.sampled[h]);
      last.push_back(c.last[h]);
    }
    if (out.heads == 0) return;
    out.tiles_share = tiles / (PlanTiles::Dense({0, tokens()}) * out.heads);
    out.sampled = Of(sampled);
    out.last = Of(last);
    row->kinds.push_back(out);
  }

  const MadeLayer& layer_;
  const std::vector<MadeHead> kinds_;
  const MeasureOptions& options_;
  LayerOnDevice& device_;
  ThreadTeam* const team_;
  std::vector<Contender> contenders_;
};

}  // namespace

std::vector<uint32_t> FidelityRows(uint32_t tokens, uint32_t sampled) {
  const uint32_t last = std::min(kLastQueries, tokens), before = tokens - last;
  sampled = std::min(sampled, before);
  std::vector<uint32_t> out;
  for (uint32_t i = 0; i < sampled; ++i) {
    out.push_back(static_cast<uint32_t>((2 * uint64_t{i} + 1) * before / (2 * uint64_t{sampled})));
  }
  for (uint32_t token = before; token < tokens; ++token) out.push_back(token);
  return out;
}

absl::StatusOr<MeasuredLayer> MeasureLayer(const MadeLayer& layer, const std::string& kinds,
                                           const MeasureOptions& options, LayerOnDevice* device,
                                           ThreadTeam* team) {
  std::vector<MadeHead> heads = MadeHeads(kinds, layer.kv().heads);
  if (heads.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("no kind of made heads is called ", kinds));
  }
  return Measurement(layer, std::move(heads), options, device, team).Run(kinds);
}

}  // namespace quarry::perf

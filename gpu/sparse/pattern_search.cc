#include "gpu/sparse/pattern_search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <variant>

#include "absl/strings/str_cat.h"
#include "gpu/sparse/captured.h"
#include "proto/check.h"

namespace quarry {
namespace {

// At this step a candidate of two counts is as it was given.
constexpr double kStepOfOne = 256;
// The smallest threshold of block-scored candidates is e to minus this.
constexpr double kMostLog = 24;

uint32_t Scaled(uint32_t count, uint32_t step, uint32_t tokens) {
  const double scaled = std::ceil(count * (step / kStepOfOne));
  return static_cast<uint32_t>(std::min<double>(scaled, tokens));
}

class Search {
 public:
  Search(const SearchSample& sample, ThreadTeam* team) : sample_(sample), team_(team) {}

  // The index of all heads, head h's pattern being patterns[h], dense only where nothing is saved.
  SparseIndex IndexOf(std::span<const HeadPattern> patterns) {
    const uint32_t rows = sample_.prefill.size();
    const uint32_t last = std::min(kLastQueries, rows);
    const size_t width = size_t{sample_.layer.heads} * sample_.layer.head_dim;
    const std::vector<HeadPlan> plans =
        PlanHeads({sample_.layer, sample_.prefill, patterns,
                   sample_.q + size_t{rows - last} * width, DenseFallback::kNever},
                  team_);
    return BuildIndex(
        plans, {sample_.layer, sample_.prefill.lo, rows, sample_.q, DenseFallback::kNever}, team_);
  }

  // For each head the largest step of a candidate within `tiles`; 0 if there is none. All heads
  // at once: one index serves them.
  std::vector<uint32_t> LargestSteps(const Pattern& candidate, uint64_t tiles) {
    const uint32_t heads = sample_.layer.heads;
    std::vector<uint32_t> fits(heads, 0), fails(heads, kMostStep + 1);
    std::vector<HeadPattern> patterns(heads);
    for (uint32_t width = kMostStep; width > 0; width /= 2) {
      for (uint32_t h = 0; h < heads; ++h) {
        const uint32_t step = std::max(1u, (fits[h] + fails[h]) / 2);
        patterns[h].pattern = Adjusted(candidate, step, sample_.prefill.hi);
      }
      const SparseIndex index = IndexOf(patterns);
      for (uint32_t h = 0; h < heads; ++h) {
        const uint32_t step = std::max(1u, (fits[h] + fails[h]) / 2);
        (index.HeadCost(h) <= tiles ? fits : fails)[h] = step;
      }
    }
    return fits;
  }

 private:
  const SearchSample& sample_;
  ThreadTeam* const team_;
};

}  // namespace

absl::Status ValidatePatternSearch(const PatternSearchOptions& options) {
  if (!(options.tiles_share > 0 && options.tiles_share <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tiles_share ", options.tiles_share, " is not in (0, 1]"));
  }
  if (!(options.max_error >= 0)) {
    return absl::InvalidArgumentError(absl::StrCat("max_error ", options.max_error, " is below 0"));
  }
  return absl::OkStatus();
}

std::vector<Pattern> PatternCandidates() {
  return {AShapePattern{1024, 4096},       VerticalSlashPattern{30, 2048},
          VerticalSlashPattern{100, 1800}, VerticalSlashPattern{500, 1500},
          VerticalSlashPattern{3000, 200}, BlockSparsePattern{100},
          BlockScoredPattern{0.1}};
}

Pattern Adjusted(const Pattern& candidate, uint32_t step, uint32_t tokens) {
  const double share = double{1} * step / kMostStep;
  if (const auto* p = std::get_if<AShapePattern>(&candidate)) {
    return AShapePattern{Scaled(p->sinks, step, tokens), Scaled(p->local, step, tokens)};
  }
  if (const auto* p = std::get_if<VerticalSlashPattern>(&candidate)) {
    return VerticalSlashPattern{Scaled(p->columns, step, tokens), Scaled(p->slashes, step, tokens)};
  }
  if (std::holds_alternative<BlockSparsePattern>(candidate)) {
    const double blocks = std::ceil(share * KeyTilesOf(tokens));
    return BlockSparsePattern{std::max(1u, static_cast<uint32_t>(blocks))};
  }
  if (std::holds_alternative<BlockScoredPattern>(candidate)) {
    return BlockScoredPattern{std::exp(-kMostLog * (step - 1) / kMostStep)};
  }
  return candidate;
}

std::vector<SearchedHead> SearchPatterns(const SearchSample& sample,
                                         std::span<const Pattern> candidates,
                                         const PatternSearchOptions& options, ThreadTeam* team) {
  const uint32_t heads = sample.layer.heads;
  const size_t width = size_t{heads} * sample.layer.head_dim;
  std::vector<float> q(sample.tokens.size() * width);
  for (size_t i = 0; i < sample.tokens.size(); ++i) {
    std::memcpy(&q[i * width], sample.q + (sample.tokens[i] - sample.prefill.lo) * width,
                width * sizeof(float));
  }
  const CaptureMeter meter(sample.layer, sample.prefill, sample.tokens, q.data(), team);
  std::vector<SearchedHead> out(heads);
  Search search(sample, team);
  for (uint32_t c = 0; c < candidates.size(); ++c) {
    std::vector<HeadPattern> patterns(heads);
    const SparseIndex dense = search.IndexOf(patterns);
    const auto whole = static_cast<double>(dense.DenseHeadCost());
    const auto most = static_cast<uint64_t>(options.tiles_share * whole);
    const std::vector<uint32_t> steps = search.LargestSteps(candidates[c], most);
    for (uint32_t h = 0; h < heads; ++h) {
      if (steps[h] > 0) {
        patterns[h].pattern = Adjusted(candidates[c], steps[h], sample.prefill.hi);
      }
    }
    const SparseIndex index = search.IndexOf(patterns);
    const std::vector<Captured> captured = meter.Measure(index, team);
    for (uint32_t h = 0; h < heads; ++h) {
      if (steps[h] == 0) continue;
      out[h].candidates.push_back({c, patterns[h].pattern,
                                   static_cast<double>(index.HeadCost(h)) / whole, captured[h].mass,
                                   captured[h].error});
    }
  }
  for (SearchedHead& head : out) {
    head.best = {DensePattern{}, 1, 0};
    double least = options.max_error;
    for (const SearchedCandidate& c : head.candidates) {
      const bool first = IsDense(head.best.pattern);
      if (first ? c.error > least : c.error >= least) continue;
      least = c.error;
      head.best = {c.pattern, c.tiles_share, c.error};
    }
  }
  return out;
}

}  // namespace quarry

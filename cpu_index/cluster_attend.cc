// How clustered indexes attend: tokens exactly or by their rows, all others by estimates.
#include "cpu_index/cluster_attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "cpu_index/run_rows.h"
#include "cpu_index/simd.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kAll = std::numeric_limits<float>::infinity();
constexpr float kLeast = std::numeric_limits<float>::lowest();
// Leaves of less than this share of the tolerated error, by the root of their number, stand for their
// super.
constexpr float kNegligible = 0.05f, kLeastNegligible = 1e-3f;
// Rows' scores are not believed beyond so much more than anything had before.
constexpr float kMostSurprise = 40;

// In four sums, so that additions need not wait for one another.
float Sum(std::span<const float> x) {
  float sum[4] = {};
  size_t i = 0;
  for (; i + 4 <= x.size(); i += 4) {
    for (size_t j = 0; j < 4; ++j) sum[j] += x[i + j];
  }
  for (; i < x.size(); ++i) sum[0] += x[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// out [queries][dims] += weight[i] * slope * query i
void AddSlope(std::span<const uint16_t> slope, const QueryBlock& queries,
              std::span<const float> weight, std::span<Partial> parts) {
  const uint32_t d = queries.head_dim;
  std::vector<float> along(size_t{queries.queries} * d);
  kernels::ScoreTile tile{};
  tile.q = queries.q;
  tile.queries = queries.queries;
  tile.head_dim = d;
  tile.k = slope.data();
  tile.tokens = d;
  tile.dtype = kernels::kBf16;
  tile.scale = queries.scale;
  tile.out = along.data();
  tile.ld_out = d;
  Kernels().score(tile);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    for (uint32_t c = 0; c < d; ++c) parts[i].acc[c] += weight[i] * along[size_t{i} * d + c];
  }
}

}  // namespace

// f(run, the first entry's number, how many) for the entries of each run.
void ClusterSearch::ForTaken(std::span<const uint32_t> entries, auto&& f) const {
  size_t lo = 0;
  for (size_t r = 0; r < runs_.size() && lo < entries.size(); ++r) {
    const size_t end = size_t{s_.run_ends[r]} * kLeafRows;
    const size_t hi = std::lower_bound(entries.begin() + static_cast<ptrdiff_t>(lo), entries.end(), end) -
                      entries.begin();
    if (hi > lo) f(r, lo, hi - lo);
    lo = hi;
  }
}

void ClusterSearch::Attend(std::span<Partial> acc, std::vector<uint32_t>* refined) {
  if (!ranked_from_.empty()) RankTokens();
  std::vector<float> o(size_t{count_} * queries_.head_dim);
  std::vector<Partial> parts(count_);
  for (uint32_t i = 0; i < count_; ++i) {
    parts[i].acc = std::span(o).subspan(size_t{i} * queries_.head_dim, queries_.head_dim);
  }
  WeighGroups(parts);
  for (uint32_t i = 0; i < count_; ++i) {
    cuts_.push_back(limits_.depth == Depth::kAsNeeded ? CutOf(i, parts[i].max) : ForcedCut(i));
  }
  TakeTokens();
  const std::vector<uint32_t> exact = SplitExact(parts);
  if (refined != nullptr) ListTokens(s_.taken.all(), refined);
  for (uint32_t i = 0; i < count_; ++i) {
    // Those of its own that are read by their rows.
    const auto seen = [&](std::span<const uint32_t> entries) {
      return static_cast<uint64_t>(std::count_if(entries.begin(), entries.end(), [&](uint32_t e) {
        return TokenScores(i)[e] != kNone;
      }));
    };
    acc[i].tokens += seen(s_.taken.all()) - seen(exact);
    parts[i].doubt = cuts_[i].error * cuts_[i].error * std::exp(2 * model_.log_length);
  }
  AttendExactly(exact, acc);
  AddValues(parts);
  acc[0].bytes += bytes_;
  for (uint32_t i = 0; i < count_; ++i) acc[i].Merge(parts[i]);
}

// Scores the best tokens by their rows.
void ClusterSearch::RankTokens() {
  std::vector<float> least;
  for (uint32_t i = 0; i < count_; ++i) {
    // Scores of tokens count in what codes miss.
    least.push_back(ranked_from_[i] + 0.5f * code_variance_[i]);
  }
  const size_t row = token_row();
  uint32_t* const ranked = s_.ranked.Take(row + kLeafRows);
  const size_t n =
      Kernels().select(s_.token_score.data(), row, count_, row, least.data(), ranked);
  s_.ranked.Shrink(n);
  float* const score = s_.row_score.Take(count_ * n);
  ScoreRows(s_.ranked.all(), score);
  for (uint32_t i = 0; i < count_; ++i) {
    float* const of_query = TokenScores(i);
    for (size_t e = 0; e < n; ++e) of_query[ranked[e]] = score[i * n + e];
  }
}

// What every group weighs by its estimate, by e^max of the parts.
void ClusterSearch::WeighGroups(std::span<Partial> parts) {
  const size_t leaves = leaf_row(), opened = s_.opened.size();
  float* const leaf_sum = s_.leaf_sum.Take(count_ * opened);
  by_code_.resize(count_);
  by_leaf_.resize(count_);
  by_super_.resize(count_);
  for (uint32_t i = 0; i < count_; ++i) {
    float* const supers = s_.super_score.data() + size_t{i} * supers_;
    float* const leaf = s_.leaf_score.data() + i * leaves;
    const float largest =
        std::max({Kernels().max(supers, supers_), Kernels().max(leaf, leaves),
                  Kernels().max(TokenScores(i), token_row())});
    parts[i].max = largest;
    const float shift = largest == kNone ? 0 : largest;
    Kernels().exp_groups(TokenScores(i), opened, shift, leaf_sum + i * opened);
    by_code_[i] = Sum({leaf_sum + i * opened, opened});
    by_leaf_[i] = Kernels().exp_sum(leaf, leaves, shift - kLogLeaf);
    by_super_[i] = Kernels().exp_sum(supers, supers_, shift - kLogSuper);
    closed_[i] = by_leaf_[i] * model_.leaf_doubt * unrest_[i].leaf +
                 by_super_[i] * model_.super_doubt * unrest_[i].super;
  }
}

ErrorCut ClusterSearch::CutOf(uint32_t query, float top) {
  if (top == kNone) return {kAll, kAll, 0, 0};
  const double own = double{by_code_[query]} + by_leaf_[query] + by_super_[query];
  const double length = std::hypot(own, std::exp(double{Elsewhere(query)} - top));
  ErrorCutInput in;
  in.scores = {TokenScores(query), token_row()};
  in.top = top;
  in.token_doubt = model_.token_doubt * unrest_[query].token;
  in.common_part = model_.common_doubt / model_.token_doubt;
  in.refined_part = model_.row_doubt / model_.token_doubt;
  in.closed = closed_[query];
  in.allowed = static_cast<float>(limits_.tolerance * length);
  in.most_tokens = limits_.most_tokens;
  if (limits_.tolerance <= 0) return {kLeast, kLeast, 0, 0};
  return FindErrorCut(in);
}

ErrorCut ClusterSearch::ForcedCut(uint32_t query) {
  const size_t row = token_row();
  if (limits_.best_tokens == 0 || row == 0) return {kAll, kAll, 0, 0};
  float least = kLeast;
  if (limits_.best_tokens < row) {
    float* const copy = s_.copy.Take(row);
    std::copy_n(TokenScores(query), row, copy);
    std::nth_element(copy, copy + limits_.best_tokens - 1, copy + row, std::greater<>());
    least = std::max(kLeast, copy[limits_.best_tokens - 1]);
  }
  return {least, limits_.depth == Depth::kExact ? least : kAll, 0, 0};
}

void ClusterSearch::TakeTokens() {
  std::vector<float> least;
  for (const ErrorCut& cut : cuts_) least.push_back(cut.refine);
  const size_t row = token_row();
  uint32_t* const taken = s_.taken.Take(row + kLeafRows);
  s_.taken.Shrink(
      Kernels().select(s_.token_score.data(), row, count_, row, least.data(), taken));
}

// [queries][entries]; what a query must not see has none.
void ClusterSearch::ScoreRows(std::span<const uint32_t> entries, float* out) {
  const size_t n = entries.size(), opened = s_.opened.size();
  uint32_t* const place = s_.row_place.Take(n);
  if (row_queries_.scale.empty()) {
    row_queries_ = KeyRows(0, model_.row_variance).Prepare(coordinates_, count_);
  }
  ForTaken(entries, [&](size_t r, size_t lo, size_t some) {
    const ClusterIndex::Parts& p = runs_[r].index->parts();
    for (size_t e = lo; e < lo + some; ++e) {
      place[e] = s_.opened_leaf[entries[e] / kLeafRows] * kLeafRows + entries[e] % kLeafRows;
    }
    const std::span<const uint32_t> which(place + lo, some);
    p.key_rows.Score(row_queries_, which, p.scale, out + lo, n);
    bytes_ += p.key_rows.BytesOf(which);
    for (uint32_t i = 0; i < count_; ++i) {
      const float* const centre = s_.centre.data() + i * opened;
      const float* const coded = TokenScores(i);
      const float spread = 0.5f * code_variance_[i];
      for (size_t e = lo; e < lo + some; ++e) {
        const float score = out[i * n + e] + centre[entries[e] / kLeafRows] - spread;
        // In this order what is no number has none.
        out[i * n + e] = std::max(kNone, score);
      }
      for (size_t e = lo; e < lo + some && !whole_[r]; ++e) {
        if (coded[entries[e]] == kNone) out[i * n + e] = kNone;
      }
    }
  });
}

// Scores the rows of what was taken, moves their weight from the codes' estimate to the rows', and
// returns those that are to be read exactly.
std::vector<uint32_t> ClusterSearch::SplitExact(std::span<Partial> parts) {
  const std::span<const uint32_t> taken = s_.taken.all();
  const size_t n = taken.size(), opened = s_.opened.size();
  float* const row = s_.row_score.Take(count_ * n);
  const bool rows = std::any_of(cuts_.begin(), cuts_.end(),
                                [](const ErrorCut& cut) { return cut.exact > cut.refine; });
  if (rows) {
    ScoreRows(taken, row);
  } else {
    std::fill_n(row, count_ * n, kNone);
  }
  std::vector<uint32_t> exact;
  float* const coded = s_.copy.Take(n);
  std::vector<uint8_t> is_exact(n);
  for (uint32_t i = 0; i < count_; ++i) {
    const float* const score = TokenScores(i);
    const float shift = parts[i].max == kNone ? 0 : parts[i].max;
    const float most = shift + kMostSurprise, least = cuts_[i].exact;
    float* const own = row + i * n;
    for (size_t e = 0; e < n; ++e) coded[e] = score[taken[e]];
    // By its code or by its row: what was counted on, and what turned out.
    for (size_t e = 0; e < n; ++e) is_exact[e] |= std::max(coded[e], own[e]) >= least ? 1 : 0;
    for (size_t e = 0; e < n; ++e) own[e] = std::min(own[e], most);
    Kernels().exp_sum(coded, n, shift);
    CountOthers(i, {coded, n});
    float* const leaf_sum = s_.leaf_sum.data() + i * opened;
    for (size_t e = 0; e < n; ++e) leaf_sum[taken[e] / kLeafRows] -= coded[e];
    for (size_t j = 0; j < opened; ++j) leaf_sum[j] = std::max(0.0f, leaf_sum[j]);
    by_code_[i] = Sum({leaf_sum, opened});
  }
  for (size_t e = 0; e < n; ++e) {
    if (is_exact[e] == 0) continue;
    exact.push_back(taken[e]);
    for (uint32_t i = 0; i < count_; ++i) row[i * n + e] = kNone;
  }
  for (uint32_t i = 0; i < count_; ++i) {
    const float shift = parts[i].max == kNone ? 0 : parts[i].max;
    parts[i].sum = by_code_[i] + by_leaf_[i] + by_super_[i] +
                   Kernels().exp_sum(row + i * n, n, shift);
  }
  return exact;
}

// What other queries had read of those that this one had left to their codes. weight: of all taken.
void ClusterSearch::CountOthers(uint32_t query, std::span<const float> weight) {
  ErrorCut& cut = cuts_[query];
  if (!(cut.error > 0)) return;
  const float* const score = TokenScores(query);
  const std::span<const uint32_t> taken = s_.taken.all();
  float sum = 0, squares = 0;
  for (size_t e = 0; e < weight.size(); ++e) {
    const float left = score[taken[e]] < cut.refine ? weight[e] : 0;
    sum += left;
    squares += left * left;
  }
  const float doubt = model_.token_doubt * unrest_[query].token;
  const float apart = cut.error * cut.error - cut.together * cut.together;
  cut.together = std::max(closed_[query],
                          cut.together - model_.common_doubt * unrest_[query].token * sum);
  cut.error = std::sqrt(std::max(0.0f, apart - doubt * doubt * squares) + cut.together * cut.together);
}

void ClusterSearch::ListTokens(std::span<const uint32_t> entries,
                               std::vector<uint32_t>* out) const {
  ForTaken(entries, [&](size_t r, size_t lo, size_t some) {
    const uint32_t first = runs_[r].view->tokens().lo;
    for (size_t e = lo; e < lo + some; ++e) {
      const uint32_t place =
          s_.opened_leaf[entries[e] / kLeafRows] * kLeafRows + entries[e] % kLeafRows;
      out->push_back(first + runs_[r].index->parts().order[place]);
    }
  });
}

// Gathered in the order of tokens, so that what a query may see lies together, and attended like
// any other run.
void ClusterSearch::AttendExactly(std::span<const uint32_t> entries, std::span<Partial> acc) {
  constexpr uint32_t kTogether = 512, kAhead = 8;
  std::vector<uint32_t> tokens;
  std::vector<TokenRange> ranges(count_);
  ForTaken(entries, [&](size_t r, size_t lo, size_t some) {
    const KvView& view = *runs_[r].view;
    const RunRows keys(view, KvPart::kKey), values(view, KvPart::kValue);
    const size_t row = size_t{view.head_dim} * DTypeBytes(view.dtype);
    tokens.clear();
    ListTokens(entries.subspan(lo, some), &tokens);
    std::sort(tokens.begin(), tokens.end());
    bytes_ += some * sizeof(uint32_t);
    std::byte* const gathered = s_.gathered.Take(2 * kTogether * row);
    for (size_t first = 0; first < some; first += kTogether) {
      const size_t n = std::min<size_t>(kTogether, some - first);
      const std::span<const uint32_t> part = std::span(tokens).subspan(first, n);
      const std::byte* key[kTogether];
      const std::byte* value[kTogether];
      for (size_t t = 0; t < n; ++t) {
        key[t] = keys.At(part[t] - view.tokens().lo);
        value[t] = values.At(part[t] - view.tokens().lo);
      }
      for (size_t t = 0; t < n; ++t) {
        const size_t ahead = std::min(t + kAhead, n - 1);
        for (size_t line = 0; line < row; line += 64) {
          __builtin_prefetch(key[ahead] + line);
          __builtin_prefetch(value[ahead] + line);
        }
        std::memcpy(gathered + t * row, key[t], row);
        std::memcpy(gathered + (kTogether + t) * row, value[t], row);
      }
      for (uint32_t i = 0; i < count_; ++i) {
        const auto place = [&](uint32_t token) {
          return static_cast<uint32_t>(std::lower_bound(part.begin(), part.end(), token) -
                                       part.begin());
        };
        ranges[i] = {place(runs_[r].ranges[i].lo), place(runs_[r].ranges[i].hi)};
      }
      const KvSegment segment{gathered, gathered + kTogether * row,
                              {0, static_cast<uint32_t>(n)}};
      QueryBlock block = queries_;
      block.ranges = ranges;
      ExactScan().AttendAll({{&segment, 1}, view.head_dim, view.dtype}, block, acc);
    }
  });
}

// Every token weighs in its leaf's mean, every leaf in its super's; rows add differences.
void ClusterSearch::AddValues(std::span<Partial> parts) {
  std::vector<float> sums(size_t{count_} * queries_.head_dim);
  AddTokenValues(sums);
  AddLeafValues(parts, sums);
  AddSuperValues(sums);
  for (uint32_t i = 0; i < count_; ++i) {
    for (uint32_t d = 0; d < queries_.head_dim; ++d) {
      parts[i].acc[d] += sums[size_t{i} * queries_.head_dim + d];
    }
  }
  AddSlope(model_.token_slope, queries_, by_code_, parts);
  AddSlope(model_.leaf.slope, queries_, by_leaf_, parts);
  AddSlope(model_.super.slope, queries_, by_super_, parts);
}

void ClusterSearch::AddTokenValues(std::span<float> sums) {
  const std::span<const uint32_t> taken = s_.taken.all();
  const size_t n = taken.size(), opened = s_.opened.size();
  uint32_t* const place = s_.row_place.Take(n);
  ForTaken(taken, [&](size_t r, size_t lo, size_t some) {
    const ClusterIndex::Parts& p = runs_[r].index->parts();
    // Those that no query weighs by its row were read exactly, or are not to be seen.
    size_t rows = 0;
    for (size_t e = lo; e < lo + some; ++e) {
      bool weighs = false;
      for (uint32_t i = 0; i < count_; ++i) {
        const float weight = s_.row_score[i * n + e];
        weighs |= weight > 0;
        s_.leaf_sum[i * opened + taken[e] / kLeafRows] += weight;
        s_.row_score[i * n + lo + rows] = weight;
      }
      place[rows] = s_.opened_leaf[taken[e] / kLeafRows] * kLeafRows + taken[e] % kLeafRows;
      rows += weighs ? 1 : 0;
    }
    const std::span<const uint32_t> which(place, rows);
    p.token_values.AddWeighted(which, s_.row_score.data() + lo, n, count_, sums);
    bytes_ += p.token_values.BytesOf(which);
  });
}

// Of the leaves that matter to some query; all leaves' weights go up to their supers.
void ClusterSearch::AddLeafValues(std::span<const Partial> parts, std::span<float> sums) {
  const size_t row = leaf_row(), opened = s_.opened.size();
  std::vector<float> least;
  for (uint32_t i = 0; i < count_; ++i) {
    float* const leaf = s_.leaf_score.data() + i * row;
    for (size_t j = 0; j < opened; ++j) leaf[s_.opened[j]] = s_.leaf_sum[i * opened + j];
    float* const supers = s_.super_score.data() + size_t{i} * supers_;
    for (size_t s = 0; s < s_.opened_supers.size(); ++s) {
      supers[s_.opened_supers[s]] = Sum({leaf + s * kLeavesPerSuper, kLeavesPerSuper});
    }
    const float share = std::max(kLeastNegligible, kNegligible * limits_.tolerance);
    least.push_back(std::max(share * parts[i].sum / std::sqrt(static_cast<float>(row + 1)),
                             std::numeric_limits<float>::min()));
  }
  uint32_t* const weighty = s_.weighty.Take(row + kLeafRows);
  ForOpenedSupers([&](size_t r, size_t lo, size_t supers) {
    const size_t from = lo * kLeavesPerSuper;
    const size_t n = Kernels().select(s_.leaf_score.data() + from, row, count_,
                                      supers * kLeavesPerSuper, least.data(), weighty);
    float* const weight = s_.leaf_weight.Take(count_ * n);
    for (uint32_t i = 0; i < count_; ++i) {
      const float* const leaf = s_.leaf_score.data() + i * row + from;
      for (size_t j = 0; j < n; ++j) weight[i * n + j] = leaf[weighty[j]];
    }
    for (size_t j = 0; j < n; ++j) {
      const uint32_t super = s_.opened_supers[lo + weighty[j] / kLeavesPerSuper] - first_super_[r];
      weighty[j] = super * kLeavesPerSuper + weighty[j] % kLeavesPerSuper;
    }
    const ValueRows& values = runs_[r].index->parts().leaf_values;
    values.AddWeighted({weighty, n}, weight, n, count_, sums);
    bytes_ += values.BytesOf({weighty, n});
  });
}

void ClusterSearch::AddSuperValues(std::span<float> sums) {
  kernels::AccumulateTile tile{};
  tile.ld_p = supers_;
  tile.queries = count_;
  tile.head_dim = queries_.head_dim;
  tile.dtype = kernels::kBf16;
  tile.acc = sums.data();
  for (size_t r = 0; r < runs_.size(); ++r) {
    const ClusterIndex::Parts& p = runs_[r].index->parts();
    tile.p = s_.super_score.data() + first_super_[r];
    tile.v = p.super_values.data();
    tile.tokens = p.supers.nodes();
    Kernels().accumulate(tile);
    bytes_ += p.super_values.size() * sizeof(uint16_t);
  }
}

}  // namespace quarry

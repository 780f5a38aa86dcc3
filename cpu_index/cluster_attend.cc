// How a part of a search attends: tokens exactly or by their rows, all others by estimates.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include "cpu_index/cluster_part.h"
#include "cpu_index/float_sum.h"
#include "cpu_index/run_rows.h"
#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kAll = std::numeric_limits<float>::infinity();
constexpr float kLeast = std::numeric_limits<float>::lowest();
// Rows' scores are not believed beyond so much more than anything had before.
constexpr float kMostSurprise = 40;

// Tokens that are gathered at once.
constexpr uint32_t kTogether = 512;

// Copies keys and values of a run's tokens from where they lie.
class RowGatherer {
 public:
  explicit RowGatherer(const KvView& view) : view_(view) {
    if (view.fetcher != nullptr) return;
    keys_.emplace(view, KvPart::kKey);
    values_.emplace(view, KvPart::kValue);
  }

  // As RowFetcher::Fetch, of kTogether tokens at most.
  bool operator()(std::span<const uint32_t> tokens, std::byte* k, std::byte* v) const {
    if (view_.fetcher != nullptr) return view_.fetcher->Fetch(tokens, k, v);
    constexpr size_t kAhead = 8;
    const size_t row = keys_->row_bytes(), n = tokens.size();
    QUARRY_CHECK(n <= kTogether);
    const std::byte* key[kTogether];
    const std::byte* value[kTogether];
    for (size_t t = 0; t < n; ++t) {
      key[t] = keys_->At(tokens[t] - view_.tokens().lo);
      value[t] = values_->At(tokens[t] - view_.tokens().lo);
    }
    for (size_t t = 0; t < n; ++t) {
      const size_t ahead = std::min(t + kAhead, n - 1);
      for (size_t line = 0; line < row; line += 64) {
        __builtin_prefetch(key[ahead] + line);
        __builtin_prefetch(value[ahead] + line);
      }
      std::memcpy(k + t * row, key[t], row);
      std::memcpy(v + t * row, value[t], row);
    }
    return true;
  }

 private:
  const KvView& view_;
  std::optional<RunRows> keys_, values_;
};

}  // namespace

// f(run, the first entry's number, how many) for the entries of each run.
void ClusterPart::ForTaken(std::span<const uint32_t> entries, auto&& f) const {
  size_t lo = 0;
  for (size_t r = 0; r < runs_.size() && lo < entries.size(); ++r) {
    const size_t end = size_t{s_.run_ends[r]} * kLeafRows;
    const size_t hi = std::lower_bound(entries.begin() + static_cast<ptrdiff_t>(lo), entries.end(), end) -
                      entries.begin();
    if (hi > lo) f(r, lo, hi - lo);
    lo = hi;
  }
}

void ClusterPart::Attend(std::span<const ErrorCut> cuts, std::span<const float> least,
                         const std::vector<bool>& scanned) {
  const size_t floats = size_t{count_} * q_.block.head_dim;
  acc_.resize(2 * floats);
  for (uint32_t i = 0; i < count_; ++i) {
    const size_t at = size_t{i} * q_.block.head_dim;
    exact_[i].acc = std::span(acc_).subspan(at, q_.block.head_dim);
    estimated_[i].acc = std::span(acc_).subspan(floats + at, q_.block.head_dim);
    estimated_[i].max = found_[i].max;
  }
  const auto any = [&](bool is) {
    return std::find(scanned.begin(), scanned.end(), is) != scanned.end();
  };
  if (any(false)) Estimate(cuts, least, scanned);
  if (any(true)) Scan(scanned);
}

void ClusterPart::Estimate(std::span<const ErrorCut> cuts, std::span<const float> least,
                           const std::vector<bool>& scanned) {
  TakeTokens(cuts);
  const std::vector<uint32_t> exact = SplitExact(cuts);
  CountRead(exact);
  AttendExactly(exact, scanned);
  AddValues(least);
  for (Partial& estimated : estimated_) {
    // All of it may be too little for a float beside what codes took for the most.
    if (!(estimated.sum > 0)) estimated.max = kNone;
  }
}

void ClusterPart::Scan(const std::vector<bool>& scanned) {
  scanned_ = true;
  std::vector<TokenRange> ranges(count_);
  QueryBlock block = q_.block;
  block.ranges = ranges;
  for (const ClusterRun& run : runs_) {
    for (uint32_t i = 0; i < count_; ++i) ranges[i] = scanned[i] ? run.ranges[i] : TokenRange{};
    RowFetcher* const fetcher = run.view->fetcher;
    const KvView* const view = fetcher == nullptr ? run.view : fetcher->Whole();
    if (view != nullptr) ExactScan().AttendAll(*view, block, exact_);
  }
  for (uint32_t i = 0; i < count_; ++i) {
    if (!scanned[i]) continue;
    // What was looked at before says nothing beside that.
    const uint64_t bytes = estimated_[i].bytes;
    std::fill(estimated_[i].acc.begin(), estimated_[i].acc.end(), 0.0f);
    estimated_[i] = {.bytes = bytes, .acc = estimated_[i].acc};
  }
}

// By which weights are divided.
float ClusterPart::Shift(uint32_t query) const {
  return found_[query].max == kNone ? 0 : found_[query].max;
}

// Those of a query's own that are read by their rows.
void ClusterPart::CountRead(std::span<const uint32_t> exact) {
  for (uint32_t i = 0; i < count_; ++i) {
    const auto seen = [&](std::span<const uint32_t> entries) {
      return static_cast<uint64_t>(std::count_if(entries.begin(), entries.end(), [&](uint32_t e) {
        return TokenScores(i)[e] != kNone;
      }));
    };
    estimated_[i].tokens = seen(s_.taken.all()) - seen(exact);
  }
}

// Scores the best tokens by their rows, and those that may be heavy.
void ClusterPart::RankTokens(const TokenFloors& floors) {
  const size_t row = token_row();
  float* const rank = s_.rank.Take(count_ * row);  // above either floor
  const float* const scale = s_.token_scale.data();
  for (uint32_t i = 0; i < count_; ++i) {
    const float* const score = TokenScores(i).data();
    const float miss = q_.code_miss[i], best = floors.ranked[i], heavy = floors.heavy[i];
    for (size_t e = 0; e < row; ++e) {
      rank[i * row + e] = std::max(score[e] - best, score[e] + miss * scale[e] - heavy);
    }
  }
  uint32_t* const ranked = s_.ranked.Take(row + kLeafRows);
  const std::vector<float> above(count_, 0.0f);
  const size_t n = Kernels().select(rank, row, count_, row, above.data(), ranked);
  s_.ranked.Shrink(n);
  float* const score = s_.row_score.Take(count_ * n);
  ScoreRows(s_.ranked.all(), score);
  for (uint32_t i = 0; i < count_; ++i) {
    float* const of_query = OwnTokenScores(i);
    for (size_t e = 0; e < n; ++e) of_query[ranked[e]] = score[i * n + e];
  }
}

// What every group weighs by its estimate.
void ClusterPart::WeighGroups() {
  const size_t leaves = leaf_row(), opened = s_.opened.size();
  float* const leaf_sum = s_.leaf_sum.Take(count_ * opened);
  for (uint32_t i = 0; i < count_; ++i) {
    float* const supers = s_.super_score.data() + size_t{i} * supers_;
    float* const leaf = s_.leaf_score.data() + i * leaves;
    ClusterFindings& found = found_[i];
    found.max = std::max({Kernels().max(supers, supers_), Kernels().max(leaf, leaves),
                          Kernels().max(TokenScores(i).data(), token_row())});
    const float shift = Shift(i);
    Kernels().exp_groups(TokenScores(i).data(), opened, shift, leaf_sum + i * opened);
    found.by_code = FloatSum({leaf_sum + i * opened, opened});
    found.by_leaf = Kernels().exp_sum(leaf, leaves, shift - kLogLeaf);
    found.by_super = Kernels().exp_sum(supers, supers_, shift - kLogSuper);
  }
}

void ClusterPart::TakeTokens(std::span<const ErrorCut> cuts) {
  std::vector<float> least;
  for (const ErrorCut& cut : cuts) least.push_back(cut.refine);
  const size_t row = token_row();
  uint32_t* const taken = s_.taken.Take(row + kLeafRows);
  s_.taken.Shrink(Kernels().select(s_.token_score.data(), row, count_, row, least.data(), taken));
}

// [queries][entries]; what a query must not see has none.
void ClusterPart::ScoreRows(std::span<const uint32_t> entries, float* out) {
  const size_t n = entries.size(), opened = s_.opened.size();
  uint32_t* const place = s_.row_place.Take(n);
  ForTaken(entries, [&](size_t r, size_t lo, size_t some) {
    const ClusterIndex::Parts& p = runs_[r].index->parts();
    for (size_t e = lo; e < lo + some; ++e) {
      place[e] = s_.opened_leaf[entries[e] / kLeafRows] * kLeafRows + entries[e] % kLeafRows;
    }
    const std::span<const uint32_t> which(place + lo, some);
    p.key_rows.Score(q_.row, which, p.scale, out + lo, n);
    bytes_ += p.key_rows.BytesOf(which);
    for (uint32_t i = 0; i < count_; ++i) {
      const float* const centre = s_.centre.data() + i * opened;
      const std::span<const float> coded = TokenScores(i);
      const float spread = 0.5f * q_.code_variance[i];
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
  PutKnown(entries, out);
}

// Rows know no more of uncoded keys than codes do.
void ClusterPart::PutKnown(std::span<const uint32_t> entries, float* out) const {
  auto at = entries.begin();
  for (size_t k = 0; k < s_.known.size(); ++k) {
    at = std::lower_bound(at, entries.end(), s_.known[k]);
    if (at == entries.end()) return;
    if (*at != s_.known[k]) continue;
    for (uint32_t i = 0; i < count_; ++i) {
      out[i * entries.size() + static_cast<size_t>(at - entries.begin())] =
          s_.known_score[k * count_ + i];
    }
  }
}

// Scores the rows of what was taken, moves their weight from the codes' estimate to the rows', and
// returns those that are to be read exactly.
std::vector<uint32_t> ClusterPart::SplitExact(std::span<const ErrorCut> cuts) {
  const std::span<const uint32_t> taken = s_.taken.all();
  const size_t n = taken.size(), opened = s_.opened.size();
  float* const row = s_.row_score.Take(count_ * n);
  const bool rows = std::any_of(cuts.begin(), cuts.end(),
                                [](const ErrorCut& cut) { return cut.exact > cut.refine; });
  if (rows) {
    ScoreRows(taken, row);
  } else {
    std::fill_n(row, count_ * n, kNone);
  }
  std::vector<uint32_t> exact;
  float* const coded = s_.copy.Take(n);
  std::vector<uint8_t> is_exact(n);
  const std::vector<uint32_t> coarse_step = CoarseSteps(taken);
  for (uint32_t i = 0; i < count_; ++i) {
    const std::span<const float> score = TokenScores(i);
    const float shift = Shift(i);
    const float most = shift + kMostSurprise, least = cuts[i].exact;
    float* const own = row + i * n;
    for (size_t e = 0; e < n; ++e) coded[e] = score[taken[e]];
    // By its code or by its row: what was counted on, and what turned out.
    for (size_t e = 0; e < n; ++e) is_exact[e] |= std::max(coded[e], own[e]) >= least ? 1 : 0;
    for (size_t e = 0; e < n; ++e) {
      if (coarse_step[e] > 0) coded[e] -= q_.coarse[i].unrest[coarse_step[e]];
    }
    for (size_t e = 0; e < n; ++e) own[e] = std::min(own[e], most);
    Kernels().exp_sum(coded, n, shift);
    CountOthers(i, cuts[i].refine, {coded, n});
    float* const leaf_sum = s_.leaf_sum.data() + i * opened;
    for (size_t e = 0; e < n; ++e) leaf_sum[taken[e] / kLeafRows] -= coded[e];
    for (size_t j = 0; j < opened; ++j) leaf_sum[j] = std::max(0.0f, leaf_sum[j]);
    found_[i].by_code = FloatSum({leaf_sum, opened});
  }
  for (size_t e = 0; e < n; ++e) {
    if (is_exact[e] == 0) continue;
    exact.push_back(taken[e]);
    for (uint32_t i = 0; i < count_; ++i) row[i * n + e] = kNone;
  }
  for (uint32_t i = 0; i < count_; ++i) {
    estimated_[i].sum = found_[i].by_code + found_[i].by_leaf + found_[i].by_super +
                        Kernels().exp_sum(row + i * n, n, Shift(i));
  }
  return exact;
}

// Of entries, rising: the steps of their scales; 0 of those that are not coarse.
std::vector<uint32_t> ClusterPart::CoarseSteps(std::span<const uint32_t> entries) const {
  std::vector<uint32_t> steps(entries.size());
  size_t c = 0;
  for (size_t e = 0; e < entries.size(); ++e) {
    while (c < s_.coarse.size() && s_.coarse[c] < entries[e]) ++c;
    if (c < s_.coarse.size() && s_.coarse[c] == entries[e]) steps[e] = s_.coarse_step[c];
  }
  return steps;
}

// weight: of all that are taken.
void ClusterPart::CountOthers(uint32_t query, float refine, std::span<const float> weight) {
  const std::span<const float> score = TokenScores(query);
  const std::span<const uint32_t> taken = s_.taken.all();
  float sum = 0, squares = 0;
  for (size_t e = 0; e < weight.size(); ++e) {
    const float left = score[taken[e]] < refine ? weight[e] : 0;
    sum += left;
    squares += left * left;
  }
  found_[query].others = sum;
  found_[query].others_squares = squares;
}

void ClusterPart::ListRead(std::vector<uint32_t>* out) const {
  if (!scanned_) return ListTokens(s_.taken.all(), out);
  for (const ClusterRun& run : runs_) {
    const TokenRange all = run.view->tokens();
    for (uint32_t token = all.lo; token < all.hi; ++token) out->push_back(token);
  }
}

void ClusterPart::ListTokens(std::span<const uint32_t> entries,
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
void ClusterPart::AttendExactly(std::span<const uint32_t> entries,
                                const std::vector<bool>& scanned) {
  std::vector<uint32_t> tokens;
  std::vector<TokenRange> ranges(count_);
  ForTaken(entries, [&](size_t r, size_t lo, size_t some) {
    const KvView& view = *runs_[r].view;
    const size_t row = size_t{view.head_dim} * DTypeBytes(view.dtype);
    tokens.clear();
    ListTokens(entries.subspan(lo, some), &tokens);
    std::sort(tokens.begin(), tokens.end());
    bytes_ += some * sizeof(uint32_t);
    const RowGatherer gather(view);
    std::byte* const gathered = s_.gathered.Take(2 * kTogether * row);
    for (size_t first = 0; first < some; first += kTogether) {
      const size_t n = std::min<size_t>(kTogether, some - first);
      const std::span<const uint32_t> part = std::span(tokens).subspan(first, n);
      if (!gather(part, gathered, gathered + kTogether * row)) return;
      for (uint32_t i = 0; i < count_; ++i) {
        const auto place = [&](uint32_t token) {
          return static_cast<uint32_t>(std::lower_bound(part.begin(), part.end(), token) -
                                       part.begin());
        };
        if (scanned[i]) continue;
        ranges[i] = {place(runs_[r].ranges[i].lo), place(runs_[r].ranges[i].hi)};
      }
      const KvSegment segment{gathered, gathered + kTogether * row,
                              {0, static_cast<uint32_t>(n)}};
      QueryBlock block = q_.block;
      block.ranges = ranges;
      ExactScan().AttendAll({{&segment, 1}, view.head_dim, view.dtype}, block, exact_);
    }
  });
}

// Every token weighs in its leaf's mean, every leaf in its super's; rows add differences.
void ClusterPart::AddValues(std::span<const float> least) {
  std::vector<float> sums(size_t{count_} * q_.block.head_dim);
  AddTokenValues(sums);
  AddLeafValues(least, sums);
  AddSuperValues(sums);
  for (uint32_t i = 0; i < count_; ++i) {
    std::copy_n(sums.data() + size_t{i} * q_.block.head_dim, q_.block.head_dim,
                estimated_[i].acc.data());
  }
}

void ClusterPart::AddTokenValues(std::span<float> sums) {
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
void ClusterPart::AddLeafValues(std::span<const float> least, std::span<float> sums) {
  const size_t row = leaf_row(), opened = s_.opened.size();
  for (uint32_t i = 0; i < count_; ++i) {
    float* const leaf = s_.leaf_score.data() + i * row;
    for (size_t j = 0; j < opened; ++j) leaf[s_.opened[j]] = s_.leaf_sum[i * opened + j];
    float* const supers = s_.super_score.data() + size_t{i} * supers_;
    for (size_t s = 0; s < s_.opened_supers.size(); ++s) {
      supers[s_.opened_supers[s]] = FloatSum({leaf + s * kLeavesPerSuper, kLeavesPerSuper});
    }
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

void ClusterPart::AddSuperValues(std::span<float> sums) {
  kernels::AccumulateTile tile{};
  tile.ld_p = supers_;
  tile.queries = count_;
  tile.head_dim = q_.block.head_dim;
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

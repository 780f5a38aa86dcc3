#include "gpu/sparse/choose_lines.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "cpu_index/simd.h"

namespace quarry {
namespace {

// Queries scored at a time: their scores are the memory that choosing needs.
constexpr uint32_t kQueriesAtATime = 16;

// The first of these by falling score, ties by the lower number; the first `forced` before all.
class Ranking {
 public:
  Ranking(std::span<const double> scores, uint32_t forced)
      : scores_(scores), forced_(forced), order_(scores.size()) {
    std::iota(order_.begin(), order_.end(), 0u);
  }
  // The best `count`, rising.
  std::vector<uint32_t> Best(uint32_t count) {
    count = static_cast<uint32_t>(std::min<size_t>(count, order_.size()));
    Sort(count);
    std::vector<uint32_t> out(order_.begin(), order_.begin() + count);
    std::sort(out.begin(), out.end());
    return out;
  }
  // The one at `place`, which sorts as far as needed.
  uint32_t At(uint32_t place) {
    if (place >= sorted_) Sort(std::max(2 * place, 256u));
    return order_[place];
  }
  uint32_t size() const { return static_cast<uint32_t>(order_.size()); }

 private:
  bool Before(uint32_t a, uint32_t b) const {
    const bool a_forced = a < forced_, b_forced = b < forced_;
    if (a_forced != b_forced) return a_forced;
    if (a_forced || scores_[a] == scores_[b]) return a < b;
    return scores_[a] > scores_[b];
  }
  void Sort(uint32_t count) {
    count = std::min(count, size());
    if (count <= sorted_) return;
    const auto before = [this](uint32_t a, uint32_t b) { return Before(a, b); };
    const auto from = order_.begin() + sorted_, to = order_.begin() + count;
    if (to != order_.end()) std::nth_element(from, to, order_.end(), before);
    std::sort(from, to, before);
    sorted_ = count;
  }

  const std::span<const double> scores_;
  const uint32_t forced_;
  std::vector<uint32_t> order_;
  uint32_t sorted_ = 0;  // so many are in their places
};

}  // namespace

std::vector<TokenRange> LastRowTiles(TokenRange prefill) {
  const uint32_t first = prefill.hi - std::min(kLastQueries, prefill.size());
  std::vector<TokenRange> out;
  for (uint32_t lo = prefill.lo + (first - prefill.lo) / kRowTile * kRowTile; lo < prefill.hi;
       lo += kRowTile) {
    out.push_back({lo, std::min(lo + kRowTile, prefill.hi)});
  }
  return out;
}

LineSums SumLines(const PlanInputs& in, uint32_t head) {
  const uint32_t tokens = in.prefill.hi, d = in.layer.head_dim;
  const uint32_t queries = std::min(kLastQueries, in.prefill.size());
  LineSums sums;
  sums.slashes.assign(tokens, 0);
  for (const TokenRange& rows : LastRowTiles(in.prefill)) {
    sums.tiles.push_back({rows, std::vector<double>(tokens, 0.0)});
  }
  std::vector<float> q(size_t{kQueriesAtATime} * d), scores(size_t{kQueriesAtATime} * tokens);
  for (uint32_t first = 0; first < queries; first += kQueriesAtATime) {
    const uint32_t n = std::min(kQueriesAtATime, queries - first);
    for (uint32_t i = 0; i < n; ++i) {
      const float* from = in.last_q + (size_t{first + i} * in.layer.heads + head) * d;
      std::copy_n(from, d, &q[size_t{i} * d]);
    }
    kernels::ScoreTile tile{};
    tile.q = q.data();
    tile.queries = n;
    tile.head_dim = d;
    tile.k = in.layer.Keys(head);
    tile.tokens = tokens;
    tile.dtype = static_cast<uint8_t>(in.layer.dtype);
    tile.scale = 1.0f / std::sqrt(static_cast<float>(d));
    tile.out = scores.data();
    tile.ld_out = tokens;
    Kernels().score(tile);
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t token = in.prefill.hi - queries + first + i, keys = token + 1;
      float* const row = &scores[size_t{i} * tokens];
      Kernels().exp_sum(row, keys, Kernels().max(row, keys));
      double sum = 0;
      for (uint32_t j = 0; j < keys; ++j) sum += row[j];
      const bool first_tile = token < sums.tiles.front().rows.hi;
      std::vector<double>& mass = (first_tile ? sums.tiles.front() : sums.tiles.back()).mass;
      for (uint32_t j = 0; j < keys; ++j) {
        const double p = row[j] / sum;
        mass[j] += p;
        sums.slashes[token - j] += p;
      }
    }
  }
  return sums;
}

LineScores::LineScores(TokenRange prefill, LineSums sums)
    : prefill_(prefill), sums_(std::move(sums)) {
  const size_t tokens = prefill_.hi;
  columns_.assign(tokens, 0);
  for (const LineSums::Tile& tile : sums_.tiles) {
    std::vector<double>& before = before_.emplace_back(tokens + 1);
    for (size_t j = 0; j < tokens; ++j) {
      before[j + 1] = before[j] + tile.mass[j];
      columns_[j] += tile.mass[j];
    }
    total_ += before[tokens];
  }
}

double LineScores::Outside(std::span<const RelativeRange> ranges,
                           std::vector<double>* outside) const {
  *outside = columns_;
  double inside = 0;
  std::vector<TokenRange> clipped;
  for (size_t t = 0; t < sums_.tiles.size(); ++t) {
    const LineSums::Tile& tile = sums_.tiles[t];
    ClipRanges(ranges, tile.rows, &clipped);
    for (const TokenRange& keys : clipped) {
      inside += Sum(t, keys);
      // What rounding leaves of a key that is inside for all must not rank before any other.
      for (uint32_t j = keys.lo; j < keys.hi; ++j) {
        (*outside)[j] = std::max(0.0, (*outside)[j] - tile.mass[j]);
      }
    }
  }
  return inside;
}

double LineScores::Captured(std::span<const RelativeRange> ranges,
                            std::span<const uint32_t> columns, DenseFallback fallback) const {
  double inside = 0;
  std::vector<TokenRange> clipped, outside;
  for (size_t t = 0; t < sums_.tiles.size(); ++t) {
    const LineSums::Tile& tile = sums_.tiles[t];
    ClipRanges(ranges, tile.rows, &clipped);
    RowTileKeys keys{tile.rows, clipped, 0};
    keys.columns = static_cast<uint32_t>(
        std::lower_bound(columns.begin(), columns.end(), clipped.back().lo) - columns.begin());
    const uint32_t dense = KeyTilesOf(tile.rows.hi);
    if (!SparseIsCheaper(keys.tiles(), dense, fallback)) {
      inside += before_[t].back();
      continue;
    }
    for (const TokenRange& range : clipped) inside += Sum(t, range);
    ColumnsOutside(columns, keys.columns, clipped, &outside);
    for (const TokenRange& part : outside) {
      for (uint32_t c = part.lo; c < part.hi; ++c) inside += tile.mass[columns[c]];
    }
  }
  return inside / total_;
}

void ChooseLines(const LineScores& scores, const VerticalSlashPattern& pattern,
                 DenseFallback fallback, HeadPlan* plan) {
  plan->columns = Ranking(scores.columns(), kForcedColumns).Best(pattern.columns);
  plan->ranges = RangesOfSlashes(Ranking(scores.slashes(), kForcedSlashes).Best(pattern.slashes));
  plan->captured = scores.Captured(plan->ranges, plan->columns, fallback);
}

bool ChooseLines(const LineScores& scores, const VerticalSlashMassPattern& pattern,
                 DenseFallback fallback, HeadPlan* plan) {
  const TokenRange prefill = scores.prefill();
  Ranking slashes(scores.slashes(), kForcedSlashes);
  const double wanted = pattern.mass * scores.total();
  uint64_t best = std::numeric_limits<uint64_t>::max();
  std::vector<double> outside;
  for (uint32_t count = kForcedSlashes;; count = NextSlashes(count)) {
    const std::vector<RelativeRange> ranges = RangesOfSlashes(slashes.Best(count));
    const HeadCost bare = CostOf(ranges, {}, prefill, fallback);
    if (static_cast<double>(bare.tiles) >
        pattern.max_tiles_share * static_cast<double>(bare.dense_tiles)) {
      break;  // more slashes cost more
    }
    if (bare.tiles < best) {
      double mass = scores.Outside(ranges, &outside);
      Ranking columns(outside, kForcedColumns);
      uint32_t taken = 0;
      for (; taken < columns.size() && (taken < kForcedColumns || mass < wanted); ++taken) {
        const double more = outside[columns.At(taken)];
        if (taken >= kForcedColumns && more <= 0) break;
        mass += more;
      }
      // A tile that is begun is read whole.
      const uint32_t whole = std::min(KeyTilesOf(taken) * kKeyTile, columns.size());
      std::vector<uint32_t> chosen = columns.Best(whole);
      const HeadCost cost = CostOf(ranges, chosen, prefill, fallback);
      const double captured = scores.Captured(ranges, chosen, fallback);
      if (captured >= pattern.mass && cost.tiles < best &&
          static_cast<double>(cost.tiles) <=
              pattern.max_tiles_share * static_cast<double>(cost.dense_tiles)) {
        best = cost.tiles;
        plan->ranges = ranges;
        plan->columns = std::move(chosen);
        plan->captured = captured;
      }
    }
    if (count >= slashes.size()) break;
  }
  return best != std::numeric_limits<uint64_t>::max();
}

}  // namespace quarry

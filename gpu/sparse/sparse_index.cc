#include "gpu/sparse/sparse_index.h"

#include <algorithm>

#include "proto/check.h"

namespace quarry {
namespace {

constexpr int64_t kRow = kRowTile, kKey = kKeyTile;

// Rounded up, of any sign; b > 0.
int64_t CeilDivide(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

TokenRange Clip(const RelativeRange& range, TokenRange rows) {
  const int64_t lo = std::max<int64_t>(0, int64_t{rows.lo} + range.lo);
  const int64_t hi = std::min<int64_t>(rows.hi, int64_t{rows.lo} + range.hi);
  return lo < hi ? TokenRange{static_cast<uint32_t>(lo), static_cast<uint32_t>(hi)} : TokenRange{};
}

// Counts over row tiles that grow evenly or stay as they are for stretches of tiles.
class Stretches {
 public:
  explicit Stretches(uint32_t tiles) : constant_(tiles + 1, 0), slope_(tiles + 1, 0) {}
  // Adds constant + slope * t for tiles t of [from, to).
  void Add(int64_t from, int64_t to, int64_t constant, int64_t slope) {
    const auto most = static_cast<int64_t>(constant_.size()) - 1;
    from = std::clamp<int64_t>(from, 0, most);
    to = std::clamp<int64_t>(to, 0, most);
    if (from >= to) return;
    constant_[static_cast<size_t>(from)] += constant;
    constant_[static_cast<size_t>(to)] -= constant;
    slope_[static_cast<size_t>(from)] += slope;
    slope_[static_cast<size_t>(to)] -= slope;
  }
  std::vector<uint32_t> Sums() const {
    std::vector<uint32_t> out(constant_.size() - 1);
    int64_t constant = 0, slope = 0;
    for (size_t t = 0; t < out.size(); ++t) {
      constant += constant_[t];
      slope += slope_[t];
      out[t] = static_cast<uint32_t>(constant + slope * static_cast<int64_t>(t));
    }
    return out;
  }

 private:
  std::vector<int64_t> constant_, slope_;
};

}  // namespace

uint64_t SparseIndex::HeadCost(uint32_t head) const {
  uint64_t sum = 0;
  for (uint32_t t = 0; t < row_tiles(); ++t) sum += tiles[At(head, t)];
  return sum;
}

uint64_t SparseIndex::Cost() const {
  uint64_t sum = 0;
  for (const uint32_t n : tiles) sum += n;
  return sum;
}

uint64_t SparseIndex::DenseHeadCost() const {
  return DenseTilesOf({first_token, first_token + rows});
}

uint64_t DenseTilesOf(TokenRange rows) {
  uint64_t sum = 0;
  for (uint32_t lo = rows.lo; lo < rows.hi; lo += std::min(kRowTile, rows.hi - lo)) {
    sum += KeyTilesOf(std::min(lo + kRowTile, rows.hi));
  }
  return sum;
}

uint32_t RowTileKeys::tiles() const {
  uint32_t sum = KeyTilesOf(columns);
  for (const TokenRange& range : ranges) sum += KeyTilesOf(range.size());
  return sum;
}

void RowTileKeysOf(const SparseIndex& index, uint32_t head, uint32_t t, RowTileKeys* out) {
  out->rows = index.RowsOf(t);
  out->ranges.clear();
  out->columns = 0;
  if (index.IsDense(head, t)) {
    out->ranges.push_back({0, out->rows.hi});
    return;
  }
  if (index.kind[head] == HeadKind::kRanges) {
    ClipRanges(index.RangesOf(head), out->rows, &out->ranges);
    out->columns = index.columns_seen[index.At(head, t)];
    return;
  }
  for (const uint32_t block : index.BlocksOf(head, t)) {
    const TokenRange keys{block * kKeyTile, std::min((block + 1) * kKeyTile, out->rows.hi)};
    if (!out->ranges.empty() && out->ranges.back().hi == keys.lo) {
      out->ranges.back().hi = keys.hi;
    } else {
      out->ranges.push_back(keys);
    }
  }
}

void ColumnsOutside(std::span<const uint32_t> columns, uint32_t seen,
                    std::span<const TokenRange> ranges, std::vector<TokenRange>* out) {
  out->clear();
  const auto begin = columns.begin(), end = begin + seen;
  auto at = begin;
  const auto add = [&](auto to) {
    if (at < to) {
      out->push_back({static_cast<uint32_t>(at - begin), static_cast<uint32_t>(to - begin)});
    }
  };
  for (const TokenRange& range : ranges) {
    add(std::lower_bound(at, end, range.lo));
    at = std::lower_bound(at, end, range.hi);
  }
  add(end);
}

std::vector<RelativeRange> RangesOfSlashes(std::span<const uint32_t> slashes) {
  std::vector<RelativeRange> out;
  int64_t lo = 0, hi = kRow;  // of the range in work, from the diagonal back
  const auto whole_tiles = [&] { return hi - CeilDivide(hi - lo, kKey) * kKey; };
  const auto finish = [&] {
    out.push_back({static_cast<int32_t>(whole_tiles()), static_cast<int32_t>(hi)});
  };
  for (const uint32_t s : slashes) {
    const int64_t from = -int64_t{s};
    if (from + kRow < whole_tiles()) {
      finish();
      hi = from + kRow;
    }
    lo = from;
  }
  finish();
  std::reverse(out.begin(), out.end());
  return out;
}

void ClipRanges(std::span<const RelativeRange> ranges, TokenRange rows,
                std::vector<TokenRange>* out) {
  out->clear();
  for (const RelativeRange& range : ranges) {
    const TokenRange keys = Clip(range, rows);
    if (!keys.empty()) out->push_back(keys);
  }
}

RowTileCounts CountRowTiles(std::span<const RelativeRange> ranges,
                            std::span<const uint32_t> columns, TokenRange rows) {
  QUARRY_CHECK(!ranges.empty() && ranges.back().hi == kRow && !rows.empty());
  const uint32_t tiles = (rows.size() + kRowTile - 1) / kRowTile;
  const int64_t first = rows.lo;
  Stretches stretches(tiles);
  for (const RelativeRange& r : ranges) {
    // While clipped at token 0 a range has two tiles more for every row tile.
    const int64_t appears = CeilDivide(1 - r.hi - first, kRow);
    const int64_t whole = CeilDivide(-r.lo - first, kRow);
    stretches.Add(appears, whole, CeilDivide(first + r.hi, kKey), 2);
    stretches.Add(std::max(appears, whole), tiles, CeilDivide(int64_t{r.hi} - r.lo, kKey), 0);
  }
  RowTileCounts out{stretches.Sums(), std::vector<uint32_t>(tiles)};
  // The last row tile may be short of rows, which cuts the last range.
  const TokenRange last{rows.lo + (tiles - 1) * kRowTile, rows.hi};
  out.range_tiles.back() = 0;
  for (const RelativeRange& r : ranges) out.range_tiles.back() += KeyTilesOf(Clip(r, last).size());
  uint32_t seen = 0;
  for (uint32_t t = 0; t < tiles; ++t) {
    const int64_t diagonal = first + int64_t{t} * kRow + ranges.back().lo;
    while (seen < columns.size() && int64_t{columns[seen]} < diagonal) ++seen;
    out.columns_seen[t] = seen;
  }
  return out;
}

}  // namespace quarry
